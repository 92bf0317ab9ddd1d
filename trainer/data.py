"""Read rows of a shard folder in training order, and check them. T tokens of a row, K most probable ones of each."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from time import perf_counter

import numpy as np
import pyarrow as pa

from shards.folder import ShardFolder
from shards.schema import has_predecessor, list_lengths, logprobs_column, topk_columns
from shards.topk import SUM_TOLERANCE
from trainer.batch import Row
from trainer.order import WINDOW_BLOCKS, RowOrder

OPEN_FILES = 256
"""Local parts that stay open; each came through its hash when it was opened."""


def unscored_rows(folder: ShardFolder) -> dict[str, set[tuple[str, int]]]:
    """Part and row of all rows that a reference could not score, by the reference's name."""
    names = list(folder.manifest.references)
    found: dict[str, set[tuple[str, int]]] = {name: set() for name in names}
    parts = [plan.name for plan in folder.manifest.parts] if names else []
    with ThreadPoolExecutor(16) as pool:  # a small file each, perhaps in an object store
        for part, record in zip(parts, pool.map(folder.record, parts)):
            for name in names:
                found[name] |= {(part, row) for row in record.quarantined.get(name, [])}
    return found


class RowReader:
    """Rows of a complete shard folder by block and place, where a block is a record batch of a part.

    context: "packed" or "document", which decides what is predicted. reference: name of the reference whose columns
    are read, or None. columns: which of them: "logprobs", "topk_ids", "topk_logprobs". num_embeddings: token ids must
    be below it. left_out: names of references whose unscored rows predict nothing; default: the reference alone. A part is hashed against its commit record before the first of its rows is read. ValueError names the
    row that breaks a promise of the format.
    """

    def __init__(
        self,
        folder: ShardFolder,
        context: str,
        reference: str | None,
        num_embeddings: int,
        columns: tuple[str, ...] = ("logprobs",),
        left_out: tuple[str, ...] | None = None,
    ) -> None:
        folder.require_complete()
        self.left_out = left_out if left_out is not None else () if reference is None else (reference,)
        self._names: dict[str, str] = {}  # of the columns in the folder
        if reference is not None:
            folder.require_scored(reference, context)
            top_ids, top_logprobs = topk_columns(reference)
            known = {"logprobs": logprobs_column(reference), "topk_ids": top_ids, "topk_logprobs": top_logprobs}
            self._names = {column: known[column] for column in columns}
            if "topk_ids" in columns:
                folder.require_top_k(reference)
            # probabilities sum to 1, but for bfloat16 and rounding
            self._most_mass = (1 + SUM_TOLERANCE) * math.exp(folder.require_reference(reference)["logprob_step"] / 2)
        self.folder, self.context, self.reference, self.num_embeddings, self.columns = (
            folder,
            context,
            reference,
            num_embeddings,
            columns,
        )
        manifest = folder.manifest
        blocks = [-(-plan.rows // manifest.rows_per_batch) for plan in manifest.parts]
        self._first_block = np.cumsum([0, *blocks])
        self.block_rows = np.full(self._first_block[-1], manifest.rows_per_batch, dtype=np.int64)
        for plan, last in zip(manifest.parts, self._first_block[1:] - 1):
            self.block_rows[last] = (plan.rows - 1) % manifest.rows_per_batch + 1
        # an embedding may have more rows than the tokenizer has tokens, and the reference's more than the base's
        self.reference_rows = 0
        if reference is not None and "topk_ids" in columns:
            self.reference_rows = folder.require_reference(reference).get("vocab_size", 0)
        self._parts: OrderedDict[int, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._quarantined: dict[int, set[int]] = {}  # rows of a part that were not scored
        self._left_out: dict[int, set[int]] = {}
        self._blocks: OrderedDict[int, list[Row]] = OrderedDict()

    def __reduce__(self) -> tuple:
        # opens its own files
        arguments = (self.folder, self.context, self.reference, self.num_embeddings, self.columns, self.left_out)
        return RowReader, arguments

    def require_top_k_fits(self, blocks: int = 16) -> str | None:
        """ValueError, before the first step, where one of some blocks has a most probable token that the base lacks.

        Blocks all over the folder are read, all of a small one. Returns what to note where none has: it may come yet.
        """
        if self.reference_rows <= self.num_embeddings:
            return None
        step = max(1, len(self.block_rows) // blocks)
        for block in range(0, len(self.block_rows), step):
            self._read_block(block)
        if step == 1:
            return None
        return (
            f"the reference {self.reference!r} has {self.reference_rows} embedding rows, the base {self.num_embeddings}; none of "
            f"the {blocks} blocks of rows that were looked at has a token of its padding among the most probable ones, and a row "
            "that has one would stop the run"
        )

    def rows(self, places: np.ndarray) -> list[Row]:
        """The rows at `places`, [rows, 2] block and row within the block."""
        return [self._block(int(block))[int(row)] for block, row in places]

    def _block(self, block: int) -> list[Row]:
        if block not in self._blocks:
            self._blocks[block] = self._read_block(block)
            if len(self._blocks) > 2 * WINDOW_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _reader(self, part: int) -> pa.ipc.RecordBatchFileReader:
        if part not in self._parts:
            columns = ["input_ids", "doc_lengths", "source", *self._names.values()]
            self._parts[part] = self.folder.open_part(self.folder.manifest.parts[part].name, columns)
            quarantined = self.folder.record(self.folder.manifest.parts[part].name).quarantined
            self._quarantined[part] = set(quarantined.get(self.reference or "", []))
            self._left_out[part] = {row for name in self.left_out for row in quarantined.get(name, [])}
            if len(self._parts) > (2 * WINDOW_BLOCKS if self.folder.store.local is None else OPEN_FILES):
                old, _ = self._parts.popitem(last=False)
                del self._quarantined[old], self._left_out[old]
        self._parts.move_to_end(part)
        return self._parts[part]

    def _read_block(self, block: int) -> list[Row]:
        part = int(np.searchsorted(self._first_block, block, side="right")) - 1
        name, index = self.folder.manifest.parts[part].name, block - int(self._first_block[part])
        batch = self._reader(part).get_batch(index)
        if batch.num_rows != self.block_rows[block]:
            raise ValueError(
                f"{self.folder.store.where(name)}: record batch {index} has {batch.num_rows} rows, "
                f"expected {self.block_rows[block]}; write the folder again"
            )
        first_row = index * self.folder.manifest.rows_per_batch
        lengths = list_lengths(batch.column("input_ids"))
        pieces = list_lengths(batch.column("doc_lengths"))
        ids = batch.column("input_ids").flatten().to_numpy()
        doc_lengths = batch.column("doc_lengths").flatten().to_numpy()
        predicted = has_predecessor(lengths, doc_lengths, self.context)
        source = batch.column("source").to_numpy()
        stored = {column: _flat(batch.column(name)) for column, name in self._names.items()}
        token_ends, piece_ends = np.cumsum(lengths), np.cumsum(pieces)
        rows = []
        for row in range(batch.num_rows):
            tokens = slice(token_ends[row] - lengths[row], token_ends[row])
            # a row that the reference could not score keeps its place in the order, and predicts nothing
            scored = first_row + row not in self._quarantined[part]
            checked = self._check(
                Row(
                    f"{self.folder.store.where(name)} row {first_row + row}",
                    int(source[row]),
                    ids[tokens],
                    doc_lengths[piece_ends[row] - pieces[row] : piece_ends[row]],
                    predicted[tokens] & scored,
                    {column: values[tokens] for column, values in stored.items()},
                )
            )
            rows.append(checked.silent() if first_row + row in self._left_out[part] else checked)
        return rows

    def _check(self, row: Row) -> Row:
        """Only valid numbers train: ids in range, log-probs finite, not positive, null just where nothing precedes."""
        if row.doc_lengths.sum() != len(row.input_ids):
            raise ValueError(
                f"{row.where}: doc_lengths sum to {row.doc_lengths.sum()}, the row has {len(row.input_ids)}"
            )
        if row.input_ids.min() < 0 or row.input_ids.max() >= self.num_embeddings:
            raise ValueError(
                f"{row.where}: token ids from {row.input_ids.min()} to {row.input_ids.max()}, the model has embeddings "
                f"for 0..{self.num_embeddings - 1}; use the model that the corpus was packed for"
            )
        if not row.columns:
            return row
        clean = {}
        for column, values in row.columns.items():  # null arrives as NaN
            present = values[row.predicted]
            fault = None
            if column == "topk_ids":
                if not np.all((present >= 0) & (present < self.num_embeddings)):
                    fault = f"that is not a token of the model (0..{self.num_embeddings - 1})"
                    if present.min() >= 0 and self.reference_rows > self.num_embeddings:
                        raise ValueError(
                            f"{row.where}: {self._names[column]} has token {present.max()}, and the base has "
                            f"{self.num_embeddings} embedding rows, the reference {self.reference!r} {self.reference_rows}: the "
                            "reference holds one of its padding rows probable there; score again with a smaller --top-k, or "
                            f"train a base with at least {present.max() + 1} rows"
                        )
            elif not np.all(np.isfinite(present) & (present <= 0)) or not np.all(np.isnan(values[~row.predicted])):
                fault = "that is missing, not finite or positive"
            elif column == "topk_logprobs" and np.any(np.exp(present).sum(-1) > self._most_mass):
                fault = "too much: the probabilities of a token sum to more than 1"
            if fault:
                raise ValueError(
                    f"{row.where}: {self._names[column]} has a value {fault}; run remit verify, then score the part again"
                )
            shape = (-1, *[1] * (values.ndim - 1))
            clean[column] = np.where(row.predicted.reshape(shape), values, 0).astype(values.dtype)
        return replace(row, columns=clean)


def _flat(column: pa.ListArray) -> np.ndarray:
    """Entries of all lists of a column, one after the other: [T] or [T, K]; a null is NaN (-1 for ids)."""
    flat = column.flatten()
    if not pa.types.is_fixed_size_list(flat.type):
        return flat.to_numpy(zero_copy_only=False)
    k = flat.type.list_size
    values = flat.values.slice(flat.offset * k, len(flat) * k).to_numpy(zero_copy_only=False).reshape(-1, k)
    if flat.null_count:  # what stands in the place of a null is undefined
        missing = np.nan if values.dtype == np.float32 else -1
        values = np.where(flat.is_valid().to_numpy(zero_copy_only=False)[:, None], values, missing)
    return values.astype(np.int32 if pa.types.is_integer(flat.type.value_type) else np.float32, copy=False)


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's rows of a global batch: places rank, rank + world_size, ... of `num_rows`."""

    rows: list[Row]
    num_rows: int
    data_wait_seconds: float

    def micro_batches(self, size: int, world_size: int) -> list[list[Row]]:
        """As many on every rank, because all take part in the exchange of gradients; the last ones may be empty."""
        count = math.ceil(self.num_rows / (world_size * size))
        return [self.rows[index * size : (index + 1) * size] for index in range(count)]


def global_batches(
    reader: RowReader,
    order: RowOrder,
    batch_size: int,
    first_step: int,
    last_step: int,
    last_row: int | None,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[GlobalBatch]:
    """The global batches of steps first_step .. last_step - 1.

    One batch is read ahead in a thread; what fails there is raised here. last_row: position at which the
    data ends (None: it goes on with the next epoch), so that the very last batch may be smaller.
    """

    def load(step: int) -> tuple[list[Row], int]:
        start = step * batch_size
        stop = start + batch_size if last_row is None else min(start + batch_size, last_row)
        return reader.rows(order.rows(start, stop - start)[rank::world_size]), stop - start

    with ThreadPoolExecutor(1, thread_name_prefix="rows") as pool:
        following = pool.submit(load, first_step) if first_step < last_step else None
        for step in range(first_step, last_step):
            assert following is not None
            began = perf_counter()
            rows, num_rows = following.result()
            waited = perf_counter() - began
            following = pool.submit(load, step + 1) if step + 1 < last_step else None
            yield GlobalBatch(rows, num_rows, waited)
