"""Read rows of a shard folder in training order, and check them. T tokens of a row, K most probable ones of each."""

import math
from collections import OrderedDict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter

import numpy as np

from shards.contract import check, refuse_tokens
from shards.folder import ShardFolder
from shards.rows import PartRows, Rows
from shards.schema import logprobs_column, topk_columns
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
    are read (ShardFolder.require_scored says whether they can be), or None. columns: which of them: "logprobs",
    "topk_ids", "topk_logprobs". num_embeddings: token ids must be below it. left_out: names of references whose unscored
    rows predict nothing; default: the reference alone. A part is hashed against its commit record before the first of
    its rows is read. ValueError for a row that breaks the contract (shards/contract.py) or does not fit the model.
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
            assert folder.require_reference(reference)["context"] == context, "ask folder.require_scored before"
            top_ids, top_logprobs = topk_columns(reference)
            known = {"logprobs": logprobs_column(reference), "topk_ids": top_ids, "topk_logprobs": top_logprobs}
            self._names = {column: known[column] for column in columns}
            if "topk_ids" in columns:
                folder.require_top_k(reference)
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
        self._parts: OrderedDict[int, PartRows] = OrderedDict()
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

    def _part(self, part: int) -> PartRows:
        if part not in self._parts:
            name = self.folder.manifest.parts[part].name
            self._parts[part] = self.folder.open_rows(name, ["input_ids", *self._names.values()])
            if len(self._parts) > (2 * WINDOW_BLOCKS if self.folder.store.local is None else OPEN_FILES):
                self._parts.popitem(last=False)
        self._parts.move_to_end(part)
        return self._parts[part]

    def _read_block(self, block: int) -> list[Row]:
        part = int(np.searchsorted(self._first_block, block, side="right")) - 1
        rows = check(self._part(part).batch(block - int(self._first_block[part])))
        predicted_T = rows.trained(self.context)
        # a row that a reference could not score keeps its place in the order, and predicts nothing
        scored_R = rows.scored(*self.left_out, *([self.reference] if self.reference else []))
        if not scored_R.all():
            predicted_T &= np.repeat(scored_R, rows.lengths)
        columns = {column: rows.values(name) for column, name in self._names.items()}
        self._require_model_fits(rows, columns.get("topk_ids"))
        for column, values in columns.items():
            columns[column] = values.copy()
            columns[column][~predicted_T] = 0
        source = rows.source.tolist()
        return [
            Row(
                rows.where(row),
                source[row],
                rows.ids[rows.place(row)],
                rows.doc_lengths[rows.piece_place(row)],
                predicted_T[rows.place(row)],
                {name: values[rows.place(row)] for name, values in columns.items()},
            )
            for row in range(len(rows))
        ]

    def _require_model_fits(self, rows: Rows, topk_ids_TK: np.ndarray | None) -> None:
        """ValueError where the model has no embedding for a token of the rows, or for one of the most probable ones."""
        bound = self.num_embeddings
        if rows.ids.max() >= bound:
            refuse_tokens(
                rows, rows.ids >= bound,
                lambda token: f"has token id {rows.ids[token]}, the model has embeddings for 0..{bound - 1}",
                "use the model that the corpus was packed for",
            )  # fmt: skip
        if topk_ids_TK is not None and topk_ids_TK.max() >= bound:
            most_T = topk_ids_TK.max(axis=1)
            refuse_tokens(
                rows, most_T >= bound,
                lambda token: (
                    f"{self._names['topk_ids']} has token {most_T[token]}, and the base has {bound} embedding rows, the "
                    f"reference {self.reference!r} {self.reference_rows or 'more'}: the reference holds one of its padding rows "
                    "probable there"
                ),
                f"score again with a smaller --top-k, or train a base with at least {most_T.max() + 1} rows",
            )  # fmt: skip


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
