"""The tokens of rendered conversations, and which of them the assistant wrote.

In: text and the spans of characters between the marks of the chat template. Out: ids, and a mask as transformers'
apply_chat_template(..., return_assistant_tokens_mask=True) gives it, with three differences:

- Where a span begins or ends in a character that no token has (spaces, where the tokenizer's offsets leave them out),
  transformers drops this turn and all later ones, or takes everything up to the end; here the span begins and ends with the
  nearest characters in it that a token has.
- Where the last character of a span takes several tokens (an emoji, a character of Chinese, as bytes), transformers
  takes the first of them; here all of them count.
- A span that ends in the very first token ends there.

T = tokens.
"""

import numpy as np
from tokenizers import Encoding

from scorer.conversations import Rendered
from scorer.documents import TokenDocument, as_found


def chat_document(rendered: Rendered, encoding: Encoding, bos: int | None) -> TokenDocument:
    """The document of a conversation: its tokens as the template has them. encoding: of the text, with offsets where it
    has spans; bos: id with which pieces begin."""
    ids = np.array(encoding.ids, dtype=np.int32)
    predict = None if rendered.spans is None else assistant_mask(encoding, rendered.spans)
    return as_found(ids, predict, bos)


def assistant_mask(encoding: Encoding, spans: list[tuple[int, int]]) -> np.ndarray:
    """True for tokens that have a character of one of the spans, bool [T]."""
    mask = np.zeros(len(encoding.ids), dtype=bool)
    for start, end in spans:
        ends = _ends(encoding, start, end)
        if ends is not None:
            mask[ends[0] : ends[1] + 1] = True
    return mask


def _ends(encoding: Encoding, start: int, end: int) -> tuple[int, int] | None:
    """First and last token of a span, None where it has none."""
    if start == end:  # a token around an empty span counts, as it does for transformers
        after, before = encoding.char_to_token(start), encoding.char_to_token(start - 1) if start else None
        return None if after is None or before is None else (after, before)
    first = next((token for place in range(start, end) if (token := encoding.char_to_token(place)) is not None), None)
    if first is None:
        return None
    last = next(
        (place, token)
        for place in range(end - 1, start - 1, -1)
        if (token := encoding.char_to_token(place)) is not None
    )
    return first, _last_of(encoding, *last)


def _last_of(encoding: Encoding, place: int, token: int) -> int:
    """The last of the tokens that have the character at `place`. token: the first of them."""
    while token + 1 < len(encoding.ids):
        after = encoding.token_to_chars(token + 1)
        if after is None or not after[0] <= place < after[1]:
            break
        token += 1
    return token
