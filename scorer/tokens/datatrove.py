"""datatrove's tokenised files: tokens in X.ds, and in X.ds.index where each document ends.

X.ds: uint16 or uint32, little-endian. X.ds.index: one uint64 per document, the token at which it ends. X.ds.metadata, where
there is one: the tokenizer's name and the bytes of a token with | between, then in a line of its own the number of tokens.
X.ds.loss, where there is one: a byte per token, 1 where it is to be predicted.
"""

from collections.abc import Iterator

import numpy as np

from scorer.faults import BadFile
from scorer.tokens.blocks import BLOCK_DOCUMENTS, CUT_OFF, Numbers

SIZES = {2: "uint16", 4: "uint32"}
METADATA_BYTES = 1 << 16


def dtype_of(where: str, metadata: bytes | None, tokens_size: int, last_end: int) -> str:
    """Dtype of the tokens: as the metadata say, else as `last_end` tokens and the size of the file do.

    where: what messages call X.ds. BadFile where neither tells, or they disagree.
    """
    by_index = tokens_size / last_end if last_end else 0
    if metadata is not None:
        lines = metadata.decode("utf-8", "replace").splitlines()
        bytes_of_each = lines[0].rpartition("|")[2].strip() if lines else ""
        if bytes_of_each not in ("2", "4"):
            raise BadFile(f"{where}.metadata", f"begins with {metadata[:40]!r}, expected TOKENIZER|2 or TOKENIZER|4")
        size = int(bytes_of_each)
        if len(lines) > 1 and lines[1].strip().isdigit() and int(lines[1]) * size != tokens_size:
            raise BadFile(
                where,
                f"{tokens_size:,} bytes, its metadata say {int(lines[1]):,} tokens of {size} bytes; {CUT_OFF}",
            )
        return SIZES[size]
    if by_index in SIZES:
        return SIZES[int(by_index)]
    if not tokens_size and not last_end:
        return "uint16"  # of no token
    raise BadFile(
        where,
        f"{tokens_size:,} bytes, its index ends at token {last_end:,}, expected 2 or 4 bytes a token; X.ds and X.ds.index do "
        "not belong together, or one was cut off",
    )


def document_lengths(ends: Numbers, tokens: int) -> Iterator[np.ndarray]:
    """Tokens of each document, int64, a chunk at a time. ends: numbers of X.ds.index; tokens: of X.ds. BadFile where the
    ends do not rise to the number of tokens."""
    last = 0
    for start in range(0, ends.count, BLOCK_DOCUMENTS):
        found = ends.read(start, min(ends.count, start + BLOCK_DOCUMENTS))
        edges = np.concatenate([np.array([last], dtype=np.uint64), found])
        falls = edges[1:] < edges[:-1]
        if falls.any() or int(edges[-1]) > tokens:
            at = int(np.argmax(falls | (edges[1:] > tokens)))
            raise BadFile(
                ends.where,
                f"document {start + at} ends at token {int(found[at]):,}, expected {int(edges[at]):,} to {tokens:,}; the index is "
                "not of this file, not in order, or damaged",
            )
        last = int(edges[-1])
        yield np.diff(edges.astype(np.int64))
    if last != tokens:
        raise BadFile(ends.where, f"ends at token {last:,}, X.ds has {tokens:,}; one of them was cut off")
