"""A document between the reader of its file and the rows: a text, or tokens with what is to be predicted of them.

A reader (scorer/corpus.py and those of other formats) yields, in the order of the file, for each document
- a str, which the tokenizer of the pack encodes and EOS ends; all of it is predicted,
- a TokenDocument, which is taken as it is,
- or a BadDocument, which stops packing or is left out.
T = tokens of the document.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class TokenDocument:
    """A document as tokens.

    ids: int32 [T], with EOS where the document has it and as many special tokens as it has; nothing is added but the BOS
    of --bos. predict: bool [T], True where the token is to be predicted; None: all of them are. The loss of training is
    over these tokens; scoring takes all. has_bos: whether ids begin with the BOS of --bos already, so that the first piece
    gets no second one.
    """

    ids: np.ndarray
    predict: np.ndarray | None = None
    has_bos: bool = False

    def __post_init__(self) -> None:
        assert self.predict is None or len(self.predict) == len(self.ids)


def as_found(ids: np.ndarray, predict: np.ndarray | None, bos: int | None) -> TokenDocument:
    """A document whose own BOS, if it begins with the BOS of the pack, is the one that its first piece has."""
    return TokenDocument(ids, predict, has_bos=bos is not None and len(ids) > 0 and int(ids[0]) == bos)
