"""Text of the tokens of a row, in groups that show each character once, although a token may be a piece of one.

In: token ids. Out: groups of consecutive tokens, each with its text; the texts one after the other are the decoded row.
"""

import json
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from shards.folder import ShardFolder


class TokenText:
    """The tokenizer of a folder. ValueError where it cannot be loaded."""

    def __init__(self, folder: ShardFolder) -> None:
        self.tokenizer: Any = Tokenizer.from_str(json.dumps(folder.tokenizer_json()))

    def symbol(self, token_id: int) -> str:
        """How the vocabulary spells a token: byte-level symbols, where the tokenizer has such."""
        return self.tokenizer.id_to_token(token_id) or "?"

    def decode(self, input_ids: list[int]) -> str:
        return self.tokenizer.decode(input_ids, skip_special_tokens=False)

    def groups(self, input_ids: list[int]) -> tuple[list[tuple[int, str]], bool]:
        """Pairs of a number of tokens and their text, and whether the texts are those of the decoded row.

        They are not for a tokenizer that changes text across tokens; its groups are single tokens as it spells them.
        """
        groups: list[tuple[int, str]] = []
        pending: list[int] = []
        stream = DecodeStream(skip_special_tokens=False)
        try:
            for token_id in input_ids:
                pending.append(token_id)
                text = stream.step(self.tokenizer, token_id)
                if text is not None:
                    groups += self._split(pending, text)
                    pending = []
        except Exception:  # of the library: a prefix that decodes otherwise than before
            groups = [(0, "\ufffd")]
        done = "".join(text for _, text in groups)
        whole = self.decode(input_ids)
        if pending and whole.startswith(done):  # the row ends within a character
            groups += self._split(pending, whole[len(done) :])
            done = whole
        if done == whole and sum(count for count, _ in groups) == len(input_ids):
            return groups, True
        return [(1, self.symbol(token_id)) for token_id in input_ids], False

    def _split(self, input_ids: list[int], text: str) -> list[tuple[int, str]]:
        """Smaller groups, where their texts alone make up `text`: bytes of no character before a whole token."""
        groups: list[tuple[int, str]] = []
        while len(input_ids) > 1:
            for cut in range(1, len(input_ids)):
                left, right = self.decode(input_ids[:cut]), self.decode(input_ids[cut:])
                if left + right == text and left:
                    groups.append((cut, left))
                    input_ids, text = input_ids[cut:], right
                    break
            else:
                break
        return [*groups, (len(input_ids), text)]
