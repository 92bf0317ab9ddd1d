"""The rows of a part: token ids, documents, contexts, log-probs and most probable tokens, as numpy arrays.

In: record batches of a part whose bytes were verified. What rows must be is in shards/contract.py.
R = rows, T = tokens of all of them, D = document pieces of all of them, K = most probable tokens of a place.
"""

from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Protocol

import numpy as np
import pyarrow as pa

from shards.entropy import entropy_columns, topk_limit
from shards.manifest import Manifest
from shards.part import REMEDY
from shards.schema import PREDICT, has_predecessor, list_lengths, logprobs_column, sample_column, topk_columns


class Batches(Protocol):
    """Where the record batches of a part come from: pyarrow's reader of a file, or shards/batch_reader.py."""

    @property
    def num_record_batches(self) -> int: ...

    def get_batch(self, number: int, /) -> pa.RecordBatch: ...


class PartRows:
    """A part whose bytes were verified, one record batch at a time.

    reader: with some or all columns; index: of the part; file: for messages; quarantined: per reference the rows of the
    part that it did not score. ValueError where the part has not the record batches that the manifest plans.
    """

    def __init__(
        self,
        reader: Batches,
        manifest: Manifest,
        index: int,
        file: str,
        quarantined: Mapping[str, list[int]],
    ) -> None:
        self.reader, self.manifest, self.file, self.quarantined = reader, manifest, file, quarantined
        self.first_number, self.num_rows = index * manifest.rows_per_part, manifest.parts[index].rows
        if reader.num_record_batches != len(self):
            raise ValueError(f"{file}: has {reader.num_record_batches} record batches, expected {len(self)}; {REMEDY}")

    def __len__(self) -> int:
        """Record batches of the part."""
        return -(-self.num_rows // self.manifest.rows_per_batch)

    def batch(self, number: int) -> "Rows":
        """The rows of record batch `number`, not checked yet; ValueError where there are more or fewer than planned."""
        first_row = number * self.manifest.rows_per_batch
        batch, expected = self.reader.get_batch(number), min(self.manifest.rows_per_batch, self.num_rows - first_row)
        if batch.num_rows != expected:
            raise ValueError(
                f"{self.file}: record batch {number} has {batch.num_rows} rows, expected {expected}; {REMEDY}"
            )
        return Rows(batch, self, first_row)


class Rows:
    """The rows of a record batch, or one of them. What comes from a column is there if the column was read.

    first_row: of these rows, counted in the part.
    """

    def __init__(self, batch: pa.RecordBatch, part: PartRows, first_row: int) -> None:
        self.batch, self.part, self.first_row = batch, part, first_row
        self._flat: dict[str, np.ndarray] = {}

    def __len__(self) -> int:
        return self.batch.num_rows

    def row(self, index: int) -> "Rows":
        """One of these rows, counted from 0."""
        return Rows(self.batch.slice(index, 1), self.part, self.first_row + index)

    def where(self, index: int = 0) -> str:
        """File and row, for messages; index: of one of these rows, counted from 0."""
        return f"{self.part.file} row {self.first_row + index}"

    @property
    def numbers(self) -> np.ndarray:
        """Row numbers, counted over all parts of the folder, int64 [R]."""
        return self.part.first_number + self.first_row + np.arange(len(self))

    @property
    def ids(self) -> np.ndarray:
        """Token ids, int32 [T]."""
        return self.values("input_ids")

    @property
    def doc_lengths(self) -> np.ndarray:
        """Tokens of each document piece, int32 [D]."""
        return self.values("doc_lengths")

    @property
    def doc_ids(self) -> np.ndarray:
        """Document of each piece, counted in its corpus file, int64 [D]."""
        return self.values("doc_ids")

    @property
    def source(self) -> np.ndarray:
        """Corpus file of each row, as its place in the manifest, int32 [R]."""
        return self.batch.column("source").to_numpy()

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each row, int64 [R]."""
        return list_lengths(self.batch.column("input_ids"))

    @cached_property
    def ends(self) -> np.ndarray:
        """One past the last token of each row, int64 [R]."""
        return np.cumsum(self.lengths)

    @cached_property
    def pieces(self) -> np.ndarray:
        """Document pieces of each row, int64 [R]."""
        return list_lengths(self.batch.column("doc_lengths"))

    @cached_property
    def piece_ends(self) -> np.ndarray:
        """One past the last document piece of each row, int64 [R]."""
        return np.cumsum(self.pieces)

    def place(self, index: int) -> slice:
        """Where the tokens of a row are in arrays of T."""
        return slice(int(self.ends[index] - self.lengths[index]), int(self.ends[index]))

    def piece_place(self, index: int) -> slice:
        """Where the document pieces of a row are in arrays of D."""
        return slice(int(self.piece_ends[index] - self.pieces[index]), int(self.piece_ends[index]))

    def spans(self, context: str) -> list[tuple[int, int, int]]:
        """What is conditioned on together and has two tokens at least, as (first token, one past the last, row).

        context: "packed", where a row is conditioned on together, or "document", where a document piece is.
        """
        lengths = self.lengths if context == "packed" else self.doc_lengths.astype(np.int64)
        ends = np.cumsum(lengths)
        first, last = (ends - lengths)[lengths > 1], ends[lengths > 1]
        return list(zip(first.tolist(), last.tolist(), np.searchsorted(self.ends, last).tolist()))

    def has_predecessor(self, context: str) -> np.ndarray:
        """True where something precedes a token in its context, bool [T]."""
        return has_predecessor(self.lengths, self.doc_lengths, context)

    def scored(self, *names: str) -> np.ndarray:
        """True where a row has log-probs of each of these references, False where one quarantined it, bool [R]."""
        scored = np.ones(len(self), dtype=bool)
        for name in names:
            rows = np.array(self.part.quarantined.get(name, []), dtype=np.int64) - self.first_row
            scored[rows[(rows >= 0) & (rows < len(self))]] = False
        return scored

    @property
    def predict(self) -> np.ndarray:
        """True where a token is to be predicted if something precedes it, bool [T]."""
        return self.values(PREDICT) if self.part.manifest.predict else np.ones(int(self.lengths.sum()), dtype=bool)

    def trained(self, context: str) -> np.ndarray:
        """True where training predicts a token: something precedes it in its context, and it is to be predicted. bool [T]."""
        present = self.has_predecessor(context)
        return present & self.predict if self.part.manifest.predict else present

    def predicted(self, name: str) -> np.ndarray:
        """True where the contract demands a log-prob of the reference `name`, bool [T]."""
        predicted, scored = self.has_predecessor(self.part.manifest.references[name]["context"]), self.scored(name)
        return predicted if scored.all() else predicted & np.repeat(scored, self.lengths)

    def logprobs(self, name: str) -> np.ndarray:
        """Log-probs of the reference `name` in nats, float32 [T], NaN where there is none."""
        return self.values(logprobs_column(name))

    def topk(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Ids, int32 [T, K], and log-probs, float32 [T, K], of the most probable tokens; -1 and NaN where there are none."""
        ids, logprobs = topk_columns(name)
        return self.values(ids), self.values(logprobs)

    def values(self, column: str) -> np.ndarray:
        """Entries of the lists of a column, one after the other: [T], [D] or [T, K]; NaN (-1 of ids) where one is null.

        Of the column `predict` bool [T].
        """
        if column not in self._flat:
            self._flat[column] = flat_values(self.batch.column(column))
        return self._flat[column]


def flat_values(column: pa.ListArray) -> np.ndarray:
    """Entries of all lists of a column, one after the other: [T] or [T, K]; a null is NaN (-1 in an entry of ids)."""
    entries = column.flatten()
    if not pa.types.is_fixed_size_list(entries.type):
        return entries.to_numpy(zero_copy_only=False)
    k = entries.type.list_size
    flat = entries.values.slice(entries.offset * k, len(entries) * k)
    missing = float("nan") if pa.types.is_floating(flat.type) else -1
    values = (flat.fill_null(missing) if flat.null_count else flat).to_numpy().reshape(-1, k)
    if entries.null_count:  # what stands in the place of a null is undefined
        values = values.copy()
        values[~entries.is_valid().to_numpy(zero_copy_only=False)] = missing
    return values


def columns_to_read(columns: Iterable[str], manifest: Manifest) -> list[str]:
    """`columns`, and those without which they cannot be checked; documents, and what is to be predicted, are small and
    always among them."""
    wanted = {*columns, "doc_lengths", "doc_ids", "source", PREDICT}
    for name, reference in manifest.references.items():
        if reference.get("top_k") and wanted & {*topk_columns(name)}:
            limit = topk_limit(name, reference)
            wanted |= {*topk_columns(name), logprobs_column(name), *([limit[0]] if limit else [])}
        wanted |= {"input_ids"} if reference.get("sample_k") and sample_column(name) in wanted else set()
        wanted |= {"input_ids"} if wanted & {logprobs_column(name), *entropy_columns(name, reference)} else set()
    return [field.name for field in manifest.schema if field.name in wanted]
