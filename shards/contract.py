"""What the rows of a shard folder must be, whoever reads them: the contract of the format, in one place.

In: the rows of a record batch, with some or all columns (their documents always). Out: the rows, or a ValueError that
names the row, the value and what was expected. How rows follow one another, which only a reader of the whole corpus sees, is in shards/verify.py.
R = rows, T = tokens, D = document pieces, all of the record batch; N = tokens that must have a log-prob; K = most probable
tokens that are stored for each.
"""

from collections.abc import Callable
from typing import NoReturn

import numpy as np

from shards.entropy import entropy_columns, outside, topk_limit
from shards.part import REMEDY
from shards.rows import Rows
from shards.samples import fault_of_samples
from shards.schema import PREDICT, list_lengths, logprobs_column, sample_column, topk_columns
from shards.topk import fault_of_topk

LARGEST = np.finfo(np.float32).max


def check(rows: Rows) -> Rows:
    """These rows; ValueError unless each column that was read keeps the contract."""
    check_documents(rows)
    names, manifest = set(rows.batch.schema.names), rows.part.manifest
    vocab_size = manifest.tokenizer["vocab_size"]
    if "input_ids" in names and (rows.ids.min(initial=0) < 0 or rows.ids.max(initial=0) >= vocab_size):
        bad_T = (rows.ids < 0) | (rows.ids >= vocab_size)
        refuse_tokens(rows, bad_T, lambda token: f"token id {rows.ids[token]} is not in 0..{vocab_size - 1}")
    for name, reference in manifest.references.items():
        if logprobs_column(name) in names:
            _check_logprobs(rows, name)
        if reference.get("top_k") and names & {*topk_columns(name)}:  # a reference may be called rl_topk
            _check_topk(rows, name)
        if reference.get("sample_k") and sample_column(name) in names:
            _check_samples(rows, name)
        for column, bounds in entropy_columns(name, reference).items():
            if column in names:
                _check_entropy(rows, name, column, bounds)
    return rows


def check_documents(rows: Rows) -> None:
    """ValueError unless lists are whole and document pieces fill their rows, so that contexts can be taken from them."""
    rows.batch.validate(full=True)
    manifest, names = rows.part.manifest, set(rows.batch.schema.names)
    for name, column in zip(rows.batch.schema.names, rows.batch.columns):
        if column.null_count:
            fail(rows, int(np.argmax(column.is_null().to_numpy(zero_copy_only=False))), f"{name} is null")
        if name in ("input_ids", "doc_lengths", "doc_ids", PREDICT) and column.flatten().null_count:
            row = next(row for row in range(len(rows)) if column[row].values.null_count)
            fail(rows, row, f"{name} has a null in its list")
    files = len(manifest.corpus)
    bad_R = (rows.source < 0) | (rows.source >= files)
    refuse_rows(rows, bad_R, lambda row: f"source {rows.source[row]} is not the index of a corpus file, 0..{files - 1}")
    ids_R = list_lengths(rows.batch.column("doc_ids"))
    refuse_rows(
        rows, ids_R != rows.pieces,
        lambda row: f"doc_ids and doc_lengths differ: {ids_R[row]} documents, {rows.pieces[row]} pieces",
    )  # fmt: skip
    refuse_rows(rows, rows.pieces < 1, lambda row: "has no document piece")
    refuse_pieces(rows, rows.doc_lengths < 1, "a document piece is empty")
    if "input_ids" in names:
        bad_R = (rows.lengths < 1) | (rows.lengths > manifest.seq_len)
        refuse_rows(rows, bad_R, lambda row: f"has {rows.lengths[row]} tokens, expected 1..{manifest.seq_len}")
        sums_R = np.diff(np.cumsum(rows.doc_lengths, dtype=np.int64)[rows.piece_ends - 1], prepend=0)
        refuse_rows(
            rows, sums_R != rows.lengths,
            lambda row: f"doc_lengths do not sum to the row's length: {sums_R[row]}, expected {rows.lengths[row]}",
        )  # fmt: skip
        if PREDICT in names:
            _check_length(rows, PREDICT)


def _check_logprobs(rows: Rows, name: str) -> None:
    values_T = rows.logprobs(name)
    valid_T = (values_T <= 0) & (values_T >= -LARGEST)  # False for NaN, which stands for null here
    _check_values(rows, name, logprobs_column(name), valid_T, "not finite and <= 0")


def _check_entropy(rows: Rows, name: str, column: str, bounds: tuple[float, float]) -> None:
    valid_T = ~outside(rows.values(column), bounds, rows.part.manifest.references[name]["logprob_step"])
    _check_values(rows, name, column, valid_T, f"not in {bounds[0]:.4g}..{bounds[1]:.4g}")


def _check_values(rows: Rows, name: str, column: str, valid_T: np.ndarray, reason: str) -> None:
    """ValueError unless a column of the reference `name` has values where it must, each valid and a multiple of the step.

    reason: what a value is that is not valid, for the message.
    """
    step = rows.part.manifest.references[name]["logprob_step"]
    _check_length(rows, column)
    values_T, predicted_T = rows.values(column), rows.predicted(name)
    nulls = rows.batch.column(column).flatten().null_count
    if nulls != np.count_nonzero(~predicted_T) or not np.array_equal(valid_T, predicted_T):
        _check_null(rows, column, predicted_T)
        refuse_tokens(rows, predicted_T & ~valid_T, lambda token: f"{column} is {values_T[token]:g}, which is {reason}")
    if step:
        refuse_tokens(
            rows, predicted_T & ~_are_multiples(values_T, step),
            lambda token: f"{column} is {values_T[token]:g}, which is not a multiple of {step:g}",
        )  # fmt: skip


def _check_topk(rows: Rows, name: str) -> None:
    reference, predicted_T, columns = rows.part.manifest.references[name], rows.predicted(name), topk_columns(name)
    limit = topk_limit(name, reference)
    if limit is not None:
        predicted_T = predicted_T & (rows.values(limit[0]).astype(np.float64) <= limit[1])
    for column in columns:
        _check_entries(rows, column, predicted_T, "" if limit is None else f", above an entropy of {limit[1]:g}")
    step, vocab_size = reference["logprob_step"], reference.get("vocab_size")
    ids_TK, logprobs_TK = rows.topk(name)
    for row in range(len(rows)):  # a row fits the processor's cache, a record batch does not
        here = rows.place(row)
        places_N = here.start + np.flatnonzero(predicted_T[here])
        own_N, entries_NK = rows.logprobs(name)[places_N], logprobs_TK[places_N]
        fault = fault_of_topk(rows.ids[places_N], own_N, ids_TK[places_N], entries_NK, vocab_size, step)
        if not fault and step and not _are_multiples(entries_NK, step).all():
            fault = f"a log-prob is not a multiple of {step:g}"
        if fault:
            fail(rows, row, f"{', '.join(columns)}: {fault}")


def _check_entries(rows: Rows, column: str, predicted_T: np.ndarray, also: str = "") -> None:
    """ValueError unless a column has an entry without nulls exactly where it must. also: see `_check_null`."""
    _check_length(rows, column)
    _check_null(rows, column, predicted_T, also)
    entries = rows.batch.column(column).flatten()
    if entries.values.null_count and entries.flatten().null_count:  # flatten leaves out null entries
        row = next(row for row in range(len(rows)) if rows.batch.column(column)[row].values.flatten().null_count)
        fail(rows, row, f"{column} has a null in an entry")


def _check_samples(rows: Rows, name: str) -> None:
    column, predicted_T = sample_column(name), rows.predicted(name)
    _check_entries(rows, column, predicted_T)
    vocab_size, ids_TS = rows.part.manifest.references[name]["vocab_size"], rows.values(column)
    for row in range(len(rows)):
        here = rows.place(row)
        if fault := fault_of_samples(ids_TS[here][predicted_T[here]], vocab_size):
            fail(rows, row, f"{column}: {fault}")


def _are_multiples(values: np.ndarray, step: float) -> np.ndarray:
    multiples = values / np.float32(step)  # exact, because a step is a power of two
    return np.rint(multiples) == multiples


def _check_length(rows: Rows, column: str) -> None:
    lengths_R = list_lengths(rows.batch.column(column))
    refuse_rows(
        rows, lengths_R != rows.lengths,
        lambda row: f"{column} and input_ids differ in length: {lengths_R[row]} and {rows.lengths[row]}",
    )  # fmt: skip


def _check_null(rows: Rows, column: str, predicted_T: np.ndarray, also: str = "") -> None:
    present_T = rows.batch.column(column).flatten().is_valid().to_numpy(zero_copy_only=False)
    refuse_tokens(
        rows, present_T != predicted_T,
        lambda token: f"{column} is {'null' if predicted_T[token] else 'not null'}, expected null exactly where nothing "
        f"precedes{also}, and in quarantined rows",
    )  # fmt: skip


def refuse_rows(rows: Rows, bad_R: np.ndarray, what: Callable[[int], str]) -> None:
    """ValueError for the first row where `bad_R` is True; what: of that row."""
    if bad_R.any():
        row = int(np.argmax(bad_R))
        fail(rows, row, what(row))


def refuse_pieces(rows: Rows, bad_D: np.ndarray, what: str) -> None:
    """ValueError for the row of the first document piece where `bad_D` is True."""
    if bad_D.any():
        fail(rows, int(np.searchsorted(rows.piece_ends, np.argmax(bad_D), side="right")), what)


def refuse_tokens(rows: Rows, bad_T: np.ndarray, what: Callable[[int], str], remedy: str = REMEDY) -> None:
    """ValueError for the first token where `bad_T` is True; what: of that token, a place in arrays of T."""
    if bad_T.any():
        token = int(np.argmax(bad_T))
        row = int(np.searchsorted(rows.ends, token, side="right"))
        fail(rows, row, f"{what(token)} (token {token - rows.place(row).start})", remedy)


def fail(rows: Rows, row: int, what: str, remedy: str = REMEDY) -> NoReturn:
    """ValueError that names a row, counted from 0 in these."""
    raise ValueError(f"{rows.where(row)}: {what}; {remedy}")
