"""Columns of a part, and which tokens of a row have something before them.

T = tokens of a row, D = document pieces of a row.
"""

import re
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

CONTEXTS = ("packed", "document")
LOGPROBS_SUFFIX = "_logprobs"
PREDICT = "predict"
"""Column of what training is to predict; a folder in which everything is has none."""
_REFERENCE_NAME = re.compile(r"[a-z][a-z0-9_]{0,63}")


def logprobs_column(name: str) -> str:
    """Column that holds the log-probs of the reference called `name`.

    Raises ValueError where the name would not be a plain identifier in SQL, Python and JSON.
    """
    if not _REFERENCE_NAME.fullmatch(name):
        raise ValueError(
            f"reference name {name!r} is not usable as a column name: "
            "use lower-case letters, digits and _, starting with a letter, for instance rl"
        )
    return name + LOGPROBS_SUFFIX


def topk_columns(name: str) -> tuple[str, str]:
    """Columns that hold the most probable tokens of the reference called `name`: their ids and their log-probs."""
    stem = logprobs_column(name).removesuffix(LOGPROBS_SUFFIX)
    return f"{stem}_topk_ids", f"{stem}_topk_logprobs"


def sample_column(name: str) -> str:
    """Column that holds the tokens drawn from the distributions of the reference called `name`."""
    return f"{logprobs_column(name).removesuffix(LOGPROBS_SUFFIX)}_sample_ids"


def row_schema(
    references: Iterable[str] = (),
    top_k: Mapping[str, int] | None = None,
    entropy: Mapping[str, Iterable[str]] | None = None,
    predict: bool = False,
    sample_k: Mapping[str, int] | None = None,
) -> pa.Schema:
    """Arrow schema of a part with one log-prob column per reference.

    All list columns have one entry per token, except doc_lengths and doc_ids: one per document piece. top_k: per
    reference the number of most probable tokens that are stored for each token, 0 or absent for none; an entry is
    then a list of that fixed size. entropy: per reference the columns of its entropy (shards/entropy.py), absent for none.
    predict: with the column of what is to be predicted. sample_k: per reference the number of tokens that are drawn for each
    token, 0 or absent for none.
    """
    fields = [
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("doc_lengths", pa.list_(pa.int32()), nullable=False),
        pa.field("doc_ids", pa.list_(pa.int64()), nullable=False),
        pa.field("source", pa.int32(), nullable=False),
    ]
    if predict:
        fields.append(pa.field(PREDICT, pa.list_(pa.bool_()), nullable=False))
    for name in references:
        fields.append(pa.field(logprobs_column(name), pa.list_(pa.float32()), nullable=False))
        k = (top_k or {}).get(name, 0)
        if k:
            ids, logprobs = topk_columns(name)
            fields.append(pa.field(ids, pa.list_(pa.list_(pa.int32(), k)), nullable=False))
            fields.append(pa.field(logprobs, pa.list_(pa.list_(pa.float32(), k)), nullable=False))
        if draws := (sample_k or {}).get(name, 0):
            fields.append(pa.field(sample_column(name), pa.list_(pa.list_(pa.int32(), draws)), nullable=False))
        for column in (entropy or {}).get(name, ()):
            fields.append(pa.field(column, pa.list_(pa.float32()), nullable=False))
    return pa.schema(fields)


def has_predecessor(row_lengths: np.ndarray, piece_lengths: np.ndarray, context: str) -> np.ndarray:
    """True where a token has a predecessor in its context, so that a log-prob exists for it.

    row_lengths: [rows] tokens per row; piece_lengths: [pieces] lengths of the document pieces of those
    rows, one after the other. Returns bool [sum(row_lengths)]. In packed context only the first token
    of a row lacks a predecessor, in document context the first token of every piece.
    """
    starts = row_lengths if context == "packed" else piece_lengths
    mask = np.ones(int(row_lengths.sum()), dtype=bool)
    first = np.cumsum(starts) - starts
    mask[first[starts > 0]] = False
    return mask


def list_array(values: pa.Array | np.ndarray, lengths: np.ndarray) -> pa.ListArray:
    """Arrow list array whose lists have the given lengths over one flat array of values."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=offsets[1:])
    return pa.ListArray.from_arrays(pa.array(offsets), values)


def list_lengths(array: pa.ListArray) -> np.ndarray:
    """Length of each list, int64 [rows], also for a sliced array."""
    return np.diff(array.offsets.to_numpy()).astype(np.int64)
