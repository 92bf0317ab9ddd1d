"""Read rows of a shard folder in training order, check them, and pad them to micro-batches.

B rows of at most T tokens.
"""

import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from shards.folder import ShardFolder
from shards.schema import has_predecessor, list_lengths, logprobs_column
from trainer.order import WINDOW_BLOCKS, RowOrder

OPEN_FILES = 256
"""Local parts that stay open; each came through its hash when it was opened."""


@dataclass(frozen=True)
class Row:
    """One row. where: part and row for messages; input_ids: int32 [T]; doc_lengths: int32 [pieces];
    predicted: bool [T]; reference_logprobs: float32 [T], 0 where not predicted, or None."""

    where: str
    input_ids: np.ndarray
    doc_lengths: np.ndarray
    predicted: np.ndarray
    reference_logprobs: np.ndarray | None


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded on the right. position_ids_BT is None in packed context, else restarts with each document."""

    input_ids_BT: Tensor
    predicted_BT: Tensor
    position_ids_BT: Tensor | None
    reference_BT: Tensor | None


class RowReader:
    """Rows of a complete shard folder by block and place, where a block is a record batch of a part.

    context: "packed" or "document", which decides what is predicted. reference: name of the log-prob column
    to read, or None. num_embeddings: token ids must be below it. A part is hashed against its commit record
    before the first of its rows is read. ValueError names the row that breaks a promise of the format.
    """

    def __init__(self, folder: ShardFolder, context: str, reference: str | None, num_embeddings: int) -> None:
        folder.require_complete()
        if reference is not None:
            folder.require_logprobs_of(reference, context)
        self.folder, self.context, self.reference, self.num_embeddings = (
            folder,
            context,
            reference,
            num_embeddings,
        )
        manifest = folder.manifest
        blocks = [-(-plan.rows // manifest.rows_per_batch) for plan in manifest.parts]
        self._first_block = np.cumsum([0, *blocks])
        self.block_rows = np.full(self._first_block[-1], manifest.rows_per_batch, dtype=np.int64)
        for plan, last in zip(manifest.parts, self._first_block[1:] - 1):
            self.block_rows[last] = (plan.rows - 1) % manifest.rows_per_batch + 1
        self._parts: OrderedDict[int, pa.ipc.RecordBatchFileReader] = OrderedDict()
        self._quarantined: dict[int, set[int]] = {}  # rows of a part that were not scored
        self._blocks: OrderedDict[int, list[Row]] = OrderedDict()

    def __reduce__(self) -> tuple:
        return RowReader, (self.folder, self.context, self.reference, self.num_embeddings)  # opens its own files

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
            columns = ["input_ids", "doc_lengths"]
            if self.reference is not None:
                columns.append(logprobs_column(self.reference))
            self._parts[part] = self.folder.open_part(self.folder.manifest.parts[part].name, columns)
            quarantined = self.folder.record(self.folder.manifest.parts[part].name).quarantined
            self._quarantined[part] = set(quarantined.get(self.reference or "", []))
            if len(self._parts) > (2 * WINDOW_BLOCKS if self.folder.store.local is None else OPEN_FILES):
                old, _ = self._parts.popitem(last=False)
                del self._quarantined[old]
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
        logprobs = None
        if self.reference is not None:
            logprobs = batch.column(logprobs_column(self.reference)).flatten().to_numpy(zero_copy_only=False)
        token_ends, piece_ends = np.cumsum(lengths), np.cumsum(pieces)
        rows = []
        for row in range(batch.num_rows):
            tokens = slice(token_ends[row] - lengths[row], token_ends[row])
            # a row that the reference could not score keeps its place in the order, and predicts nothing
            scored = first_row + row not in self._quarantined[part]
            rows.append(
                self._check(
                    Row(
                        f"{self.folder.store.where(name)} row {first_row + row}",
                        ids[tokens],
                        doc_lengths[piece_ends[row] - pieces[row] : piece_ends[row]],
                        predicted[tokens] & scored,
                        None if logprobs is None else logprobs[tokens],
                    )
                )
            )
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
        if row.reference_logprobs is None:
            return row
        logprobs = row.reference_logprobs  # null arrives as NaN
        values = logprobs[row.predicted]
        if not np.all(np.isfinite(values) & (values <= 0)) or not np.all(np.isnan(logprobs[~row.predicted])):
            raise ValueError(
                f"{row.where}: a log-prob of {self.reference} is missing, not finite or positive; "
                "run remit verify, then score the part again"
            )
        clean = np.where(row.predicted, logprobs, 0).astype(np.float32)
        return Row(row.where, row.input_ids, row.doc_lengths, row.predicted, clean)


def collate(rows: list[Row], context: str, device: torch.device | str, has_reference: bool) -> MicroBatch:
    """Pad rows on the right to the longest one and move them to `device`; no rows: one that predicts nothing."""
    length = max((len(row.input_ids) for row in rows), default=2)
    shape = (max(1, len(rows)), length)
    input_ids = np.zeros(shape, dtype=np.int64)
    predicted = np.zeros(shape, dtype=bool)
    positions = np.tile(np.arange(length), (shape[0], 1))
    reference = np.zeros(shape, dtype=np.float32) if has_reference else None
    for index, row in enumerate(rows):
        tokens = len(row.input_ids)
        input_ids[index, :tokens] = row.input_ids
        predicted[index, :tokens] = row.predicted
        if reference is not None:
            reference[index, :tokens] = row.reference_logprobs
        starts = np.cumsum(row.doc_lengths) - row.doc_lengths
        positions[index, :tokens] -= np.repeat(starts, row.doc_lengths)
        positions[index, tokens:] -= tokens  # the padding is a document of its own

    def move(values: np.ndarray | None) -> Any:
        if values is None:
            return None
        tensor = torch.from_numpy(values)
        # pinned memory lets the copy run beside the computation
        return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor

    return MicroBatch(
        move(input_ids),
        torch.from_numpy(predicted),
        move(positions if context == "document" else None),
        move(reference),
    )


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
