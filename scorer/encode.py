"""Tokens of the documents of a batch: texts, conversations as their template writes them, and what came as tokens.

In: documents and the tokenizer. Out: a TokenDocument for each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from scorer.chat_mask import chat_document
from scorer.conversations import ChatTemplate, Conversation, Rendered
from scorer.corpus import BadDocument, Documents
from scorer.documents import TokenDocument
from scorer.sources import Source
from scorer.tokens.documents import Found


def _encode(encoder: Tokenizer, texts: list[str], source: Source, offsets: bool = False) -> Any:
    """Encodings of the texts; ValueError where the tokenizer has no way to spell one of them."""
    encode = encoder.encode_batch if offsets else encoder.encode_batch_fast
    try:
        return encode(texts, add_special_tokens=False)
    except Exception as error:  # the library raises no other kind
        raise ValueError(
            f"{source.where}: the tokenizer cannot encode a document ({error}); give it an unknown token, or leave out what it "
            "cannot spell"
        ) from None


def may_mask(settings: dict) -> bool:
    """Whether documents of a pack with these settings may say what is to be predicted."""
    chat = settings.get("chat")
    return chat is not None and chat["train_on"] == "assistant"


def tokenise(
    encoder: Tokenizer,
    documents: list[tuple[int, str | Rendered | TokenDocument]],
    eos: int,
    bos: int | None,
    source: Source,
) -> Iterator[tuple[int, str, TokenDocument]]:
    """The tokens of each document, with its number and its text, which is empty where it came as tokens.

    EOS ends a text; one that has no tokens has none, and a conversation has what its template gives it.
    """
    texts = [
        text.text if isinstance(text, Rendered) else text
        for _, text in documents
        if not isinstance(text, TokenDocument)
    ]
    offsets = any(isinstance(document, Rendered) and document.spans for _, document in documents)
    encodings = iter(_encode(encoder, texts, source, offsets))
    for doc_id, document in documents:
        if isinstance(document, str):
            ids = next(encodings).ids
            yield doc_id, document, TokenDocument(np.array([*ids, eos] if ids else [], dtype=np.int32))
        elif isinstance(document, Rendered):
            chat = chat_document(document, next(encodings), bos)
            yield doc_id, document.text, chat
        else:
            yield doc_id, "", document


@dataclass
class EncodedDocuments:
    """Documents of one batch, without bad ones.

    documents: each with its ordinal in its file and its text, which is empty where it came as tokens. kept: their fields
    that --keep-fields names. position: bytes of the file that were read.
    """

    documents: list[tuple[int, str, TokenDocument]]
    kept: list[tuple[Any, ...]]
    position: int


def encode_documents(
    batches: Iterator[tuple[Documents, int]],
    encoder: Tokenizer,
    chat: ChatTemplate | None,
    eos: int,
    bos: int | None,
    stops: bool,
    source: Source,
    found: Found,
) -> Iterator[EncodedDocuments]:
    """The tokens of batches of documents, which are counted in `found`. The BadDocument itself where one `stops` packing."""
    for documents, position in batches:
        first = found.read
        good: list[tuple[int, str | Rendered | TokenDocument]] = []
        for doc_id, document in enumerate(documents, first):
            if isinstance(document, Conversation) and chat is not None:
                document = chat.render(document)
            if not isinstance(document, BadDocument):
                good.append((doc_id, document))
            elif stops:
                raise document
            else:
                found.rejected.append(str(document))
        found.read += len(documents)
        encoded = list(tokenise(encoder, good, eos, bos, source))
        packed = sum(len(document.ids) > 0 for *_, document in encoded)
        found.packed += packed
        found.empty += len(encoded) - packed
        yield EncodedDocuments(encoded, [documents.kept[doc_id - first] for doc_id, *_ in encoded], position)
