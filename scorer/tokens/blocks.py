"""Documents as tokens, many at a time: what the readers of token files hand on, and how a block of them is read.

D = documents of a block, T = their tokens, one document after the other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from scorer.faults import BadDocument, BadFile
from shards.store_errors import NOT_THE_FILES

BLOCK_TOKENS = 1 << 18  # of a block, unless one document has more
BLOCK_DOCUMENTS = 1 << 16
MAX_DOCUMENT_TOKENS = 1 << 26  # a document is in memory as a whole
CUT_OFF = "it was cut off, or is damaged; write it again"
DTYPES = ("uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64")


@dataclass
class TokenBlock:
    """Some documents of a file, in its order.

    ids: integers of any size [T]. lengths: int64 [D], 0 for an empty document. predict: bool [T], True for what is to be
    predicted; None: all. bad: documents that cannot be packed, by their place in the block; they have length 0.
    position: bytes of the file that were read so far. fields: the kept fields of each document [D], None where none are.
    """

    ids: np.ndarray
    lengths: np.ndarray
    position: int = 0
    predict: np.ndarray | None = None
    bad: dict[int, BadDocument] = field(default_factory=dict)
    fields: list[tuple] | None = None


class Numbers:
    """`count` little-endian numbers of one dtype in a file, from byte `first` on; read in pieces at any place.

    Pieces are read rather than mapped: a mapped file that somebody cuts off kills the process that reads it, and what was
    mapped counts as its memory.
    """

    def __init__(self, where: str, file: pa.NativeFile, dtype: str, first: int, count: int) -> None:
        self.where, self.dtype, self.count = where, np.dtype(dtype).newbyteorder("<"), count
        self._file, self._first = file, first

    def read(self, start: int, stop: int) -> np.ndarray:
        """Numbers start .. stop - 1."""
        size = self.dtype.itemsize
        try:
            data = self._file.read_at((stop - start) * size, self._first + start * size)
        except NOT_THE_FILES:
            raise
        except OSError as error:
            raise ValueError(
                f"{self.where}: cannot be read at number {start:,} ({error}); see that the disk is sound and run the same "
                "command again"
            ) from None
        if len(data) != (stop - start) * size:
            raise ValueError(f"{self.where}: became shorter while it was read; run again when nothing writes to it")
        return np.frombuffer(data, self.dtype)

    def end_byte(self, number: int) -> int:
        """Bytes of the file up to the end of the first `number` numbers."""
        return self._first + number * self.dtype.itemsize


def whole_numbers(where: str, size: int, dtype: str, option: str = "") -> int:
    """How many numbers a file of `size` bytes has; BadFile where it does not end with one. option: which may say another
    dtype."""
    count, rest = divmod(size, np.dtype(dtype).itemsize)
    if rest:
        other = f", or it is of another dtype ({option})" if option else ""
        raise BadFile(
            where, f"{size:,} bytes, expected a multiple of {np.dtype(dtype).itemsize} ({dtype}); {CUT_OFF}{other}"
        )
    return count


def indexed_blocks(
    ids: Numbers, lengths: Iterator[np.ndarray], mask: Callable[[int, int], np.ndarray] | None = None
) -> Iterator[TokenBlock]:
    """Blocks of documents that follow one another in `ids` and whose lengths, int64, come a chunk at a time.

    mask: gives what is to be predicted of tokens start .. stop - 1. ValueError where the lengths reach beyond the file.
    """
    document = token = 0
    for chunk in lengths:
        ends = np.cumsum(chunk)
        first = 0
        while first < len(chunk):
            before = int(ends[first - 1]) if first else 0
            last = max(first + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
            last = min(last, first + BLOCK_DOCUMENTS)
            count = int(ends[last - 1]) - before
            require_length(ids.where, document, count if last == first + 1 else 0)
            if token + count > ids.count:
                raise BadFile(
                    ids.where,
                    f"document {document + last - first - 1} ends at token {token + count:,} by its index, the file has "
                    f"{ids.count:,}; they do not belong together, or one was cut off",
                )
            predict = None if mask is None else mask(token, token + count)
            block = ids.read(token, token + count)
            token, document = token + count, document + last - first
            yield TokenBlock(block, chunk[first:last], ids.end_byte(token), predict)
            first = last


def require_length(where: str, document: int, tokens: int) -> None:
    """BadFile for a document that is too long to be one."""
    if tokens > MAX_DOCUMENT_TOKENS:
        raise BadFile(
            where,
            f"document {document} has more than {MAX_DOCUMENT_TOKENS:,} tokens; is the file of this tokenizer, whose EOS ends "
            "documents, and of this dtype (--tokens-dtype)?",
        )
