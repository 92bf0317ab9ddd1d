"""Megatron's indexed datasets: tokens in X.bin, and in X.idx where sequences and documents begin.

The layout of X.idx, all little-endian: the mark MMIDIDX and two zero bytes; the version, uint64 1; the code of the tokens'
dtype, uint8; the number of sequences, uint64; the number of document borders, uint64; of each sequence its length in
tokens, int32, then of each its first byte in X.bin, int64; then the document borders, int64, the first sequence of each
document and the number of sequences. Source: the documentation of Megatron Core's datasets.
"""

import struct
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from scorer.faults import BadFile
from scorer.tokens.blocks import BLOCK_DOCUMENTS, CUT_OFF, Numbers
from scorer.tokens.heads import INDEX_MARK

HEADER = struct.Struct("<9sQBQQ")
CODES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 6: "float64", 7: "float32", 8: "uint16"}
SEQUENCES_AT_ONCE = 1 << 20
TOGETHER = "X.bin and X.idx do not belong together, or one was cut off"


class Index:
    """An open X.idx. Raises BadFile for what is not one, before more than its header is read.

    where, bin_where: what messages call the files; bin_size: bytes of X.bin.
    """

    def __init__(self, where: str, file: pa.NativeFile, bin_where: str, bin_size: int) -> None:
        self.where = where
        size = file.size()
        head = file.read_at(HEADER.size, 0) if size >= HEADER.size else b""
        if not head.startswith(INDEX_MARK):
            raise BadFile(where, f"{size:,} bytes without the mark of Megatron's index ({INDEX_MARK!r}); {CUT_OFF}")
        _, version, code, sequences, borders = HEADER.unpack(head)
        if version != 1:
            swapped = int.from_bytes(struct.pack("<Q", version), "big")
            more = "; it is big-endian, write it on a little-endian machine" if swapped == 1 else f"; {CUT_OFF}"
            raise BadFile(where, f"version {version}, expected 1{more}")
        if code not in CODES or CODES[code].startswith("float"):
            raise BadFile(where, f"dtype code {code} ({CODES.get(code, 'unknown')}), expected an integer's; {CUT_OFF}")
        self.dtype = CODES[code]
        expected = HEADER.size + 12 * sequences + 8 * borders
        if size == expected + sequences and sequences:
            raise BadFile(where, "has a mode for each sequence, so it is multimodal; expected text alone")
        if size != expected:
            raise BadFile(
                where,
                f"{size:,} bytes, its header counts {sequences:,} sequences and {borders:,} document borders, which take "
                f"{expected:,}; {CUT_OFF}",
            )
        if borders < 1:
            raise BadFile(where, "has no document borders, expected at least one; write it again")
        self.tokens, rest = divmod(bin_size, np.dtype(self.dtype).itemsize)
        if rest:
            raise BadFile(
                bin_where,
                f"{bin_size:,} bytes, expected a multiple of {np.dtype(self.dtype).itemsize} ({self.dtype}, by its index); {CUT_OFF}",
            )
        at = HEADER.size
        self._lengths = Numbers(where, file, "int32", at, sequences)
        self._pointers = Numbers(where, file, "int64", at + 4 * sequences, sequences)
        self._borders = Numbers(where, file, "int64", at + 12 * sequences, borders)

    def document_lengths(self) -> Iterator[np.ndarray]:
        """Tokens of each document, int64, a chunk at a time. BadFile where the index does not describe X.bin from its
        first byte to its last."""
        borders, sequences = self._borders, self._lengths.count
        byte, last = 0, 0
        for start in range(0, max(1, borders.count - 1), BLOCK_DOCUMENTS):
            edges = borders.read(start, min(borders.count, start + BLOCK_DOCUMENTS + 1))
            if edges[0] != last or (np.diff(edges) < 0).any() or edges[-1] > sequences:
                at = start + int(np.argmax(np.diff(edges) < 0)) if (np.diff(edges) < 0).any() else start
                raise BadFile(
                    self.where,
                    f"its document borders are out of order at document {at}, expected them to rise from 0 to {sequences:,}; "
                    "write it again",
                )
            last = int(edges[-1])
            sums = np.zeros(len(edges) - 1, dtype=np.int64)
            for first in range(int(edges[0]), last, SEQUENCES_AT_ONCE):
                stop = min(last, first + SEQUENCES_AT_ONCE)
                lengths, byte = self._sequences(first, stop, byte)
                before = np.concatenate([[0], np.cumsum(lengths)])  # tokens before each of these sequences
                places = np.clip(edges, first, stop) - first
                sums += np.diff(before[places])
            if len(sums):
                yield sums
        if last != sequences:
            raise BadFile(self.where, f"its documents have {last:,} of its {sequences:,} sequences; write it again")
        if byte != self.tokens * np.dtype(self.dtype).itemsize:
            raise BadFile(
                self.where,
                f"its sequences have {byte // np.dtype(self.dtype).itemsize:,} tokens, X.bin has {self.tokens:,}; {TOGETHER}",
            )

    def _sequences(self, first: int, stop: int, byte: int) -> tuple[np.ndarray, int]:
        """Lengths of sequences first .. stop - 1, int64, and where the last one ends; the first begins at `byte`."""
        lengths, pointers = self._lengths.read(first, stop).astype(np.int64), self._pointers.read(first, stop)
        if (lengths < 0).any():
            at = int(np.argmax(lengths < 0))
            raise BadFile(self.where, f"sequence {first + at} has {lengths[at]} tokens; write it again")
        ends = byte + np.cumsum(lengths) * np.dtype(self.dtype).itemsize
        expected = np.concatenate([[byte], ends[:-1]])
        if (pointers != expected).any():
            at = int(np.argmax(pointers != expected))
            raise BadFile(
                self.where,
                f"sequence {first + at} begins at byte {pointers[at]:,}, expected {expected[at]:,}, where the one before it "
                "ends; sequences must follow one another",
            )
        return lengths, int(ends[-1])
