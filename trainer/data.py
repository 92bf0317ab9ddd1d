"""Read rows of shard folders by block, and check them. T tokens of a row, K most probable ones of each."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from shards.contract import check, refuse_tokens
from shards.folder import ShardFolder
from shards.quarantine import QUARANTINE, require_listed_rows, rows_name
from shards.rows import PartRows, Rows
from trainer.batch import Row
from trainer.mixed_shards import block_rows
from trainer.packed_rows import pack_rows

OPEN_FILES = 256
"""Local parts whose commit records are kept, and of those without sums that the whole part came through its hash."""
OPEN_REMOTE = 8  # these may be in memory
KEPT_BLOCKS = 32  # of RowReader.rows


def unscored_rows(folder: ShardFolder) -> dict[str, set[tuple[str, int]]]:
    """Part and row of all rows that a reference could not score, by the reference's name.

    Only the records of parts are opened that have rows set aside (_quarantine/rows): few, where a folder has 100,000. A part
    whose record lists such rows without that file stops its reader, at its first block.
    """
    names = list(folder.manifest.references)
    found: dict[str, set[tuple[str, int]]] = {name: set() for name in names}
    aside = set(folder.store.names(f"{QUARANTINE}/rows")) if names else set()
    parts = [plan.name for plan in folder.manifest.parts if rows_name(plan.name).rsplit("/", 1)[1] in aside]
    with ThreadPoolExecutor(16) as pool:  # a small file each, perhaps in an object store
        for part, record in zip(parts, pool.map(folder.record, parts)):
            for name in names:
                found[name] |= {(part, row) for row in record.quarantined.get(name, [])}
    return found


CONTEXTS = ("auto", "packed", "document")


class RowReader:
    """Rows of a complete shard folder by block and place, where a block is a record batch of a part.

    context: "packed" or "document", which decides what is predicted. reference: name of the reference whose columns
    are read (ShardFolder.require_scored says whether they can be), or None. columns: which of them, without its name:
    "logprobs", "topk_ids", "topk_logprobs", "entropy_t2" and so on. num_embeddings: token ids must be below it. left_out:
    names of references whose unscored rows predict nothing; default: the reference alone. first_source: what is added to the
    corpus file of a row. What is read is hashed against its commit record first. Used by several threads. ValueError for a
    row that breaks the contract (shards/contract.py) or does not fit the model.
    """

    def __init__(
        self,
        folder: ShardFolder,
        context: str,
        reference: str | None,
        num_embeddings: int,
        columns: tuple[str, ...] = ("logprobs",),
        left_out: tuple[str, ...] | None = None,
        first_source: int = 0,
    ) -> None:
        folder.require_complete()
        self.first_source = first_source
        self.left_out = left_out if left_out is not None else () if reference is None else (reference,)
        self._names: dict[str, str] = {}  # of the columns in the folder
        if reference is not None:
            assert folder.require_reference(reference)["context"] == context, "ask folder.require_scored before"
            folder.require_columns(reference, columns)
            self._names = {column: f"{reference}_{column}" for column in columns}
        self.folder, self.context, self.reference, self.num_embeddings, self.columns = (
            folder,
            context,
            reference,
            num_embeddings,
            columns,
        )
        size = folder.manifest.rows_per_batch
        self._first_block = np.cumsum([0, *(-(-plan.rows // size) for plan in folder.manifest.parts)])
        self.block_rows = block_rows(folder.manifest)
        # an embedding may have more rows than the tokenizer has tokens, and the reference's more than the base's
        self.reference_rows = 0
        if reference is not None and {"topk_ids", "sample_ids"} & {*columns}:
            self.reference_rows = folder.require_reference(reference).get("vocab_size", 0)
        self._parts: OrderedDict[int, tuple[threading.Lock, list[PartRows]]] = OrderedDict()
        self._blocks: OrderedDict[int, list[Row]] = OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self) -> tuple:
        # opens its own files
        known = (self.folder, self.context, self.reference, self.num_embeddings, self.columns, self.left_out)
        return RowReader, (*known, self.first_source)

    def require_top_k_fits(self, blocks: int = 16) -> str | None:
        """ValueError, before the first step, where one of some blocks has a most probable token that the base lacks.

        Blocks all over the folder are read, all of a small one. Returns what to note where none has: it may come yet.
        """
        if self.reference_rows <= self.num_embeddings:
            return None
        step = max(1, len(self.block_rows) // blocks)
        for block in range(0, len(self.block_rows), step):
            self.read_block(block)
        if step == 1:
            return None
        return (
            f"the reference {self.reference!r} has {self.reference_rows} embedding rows, the base {self.num_embeddings}; none of "
            f"the {blocks} blocks of rows that were looked at has a token of its padding among the most probable ones, and a row "
            "that has one would stop the run"
        )

    def rows(self, places: np.ndarray) -> list[Row]:
        """The rows at `places`, [rows, 2] block and row within the block; not in several threads."""
        return [self._block(int(block))[int(row)] for block, row in places]

    def _block(self, block: int) -> list[Row]:
        if block not in self._blocks:
            self._blocks[block] = self.read_block(block)
            if len(self._blocks) > KEPT_BLOCKS:
                self._blocks.popitem(last=False)
        self._blocks.move_to_end(block)
        return self._blocks[block]

    def _batch(self, part: int, number: int) -> Rows:
        """A record batch of a part, which is opened unless it is open; a file is read by one thread at a time."""
        with self._lock:
            lock, opened = self._parts.setdefault(part, (threading.Lock(), []))
            self._parts.move_to_end(part)
            if len(self._parts) > (OPEN_REMOTE if self.folder.store.local is None else OPEN_FILES):
                self._parts.popitem(last=False)
        with lock:
            if not opened:
                name = self.folder.manifest.parts[part].name
                record = self.folder.record(name)
                # unscored_rows has counted by the side files which rows are left out
                require_listed_rows(self.folder.store, record)
                opened.append(self.folder.open_rows(name, ["input_ids", *self._names.values()], record))
            return opened[0].batch(number)

    def read_block(self, block: int) -> list[Row]:
        """The rows of a block, each checked."""
        part = int(np.searchsorted(self._first_block, block, side="right")) - 1
        rows = check(self._batch(part, block - int(self._first_block[part])))
        predicted_T = rows.trained(self.context)
        # a row that a reference could not score keeps its place in the order, and predicts nothing
        scored_R = rows.scored(*self.left_out, *([self.reference] if self.reference else []))
        if not scored_R.all():
            predicted_T &= np.repeat(scored_R, rows.lengths)
        columns = {column: rows.values(name) for column, name in self._names.items()}
        for column in ("topk_ids", "sample_ids"):
            self._require_model_fits(rows, column, columns.get(column))
        for column, values in columns.items():
            columns[column] = values.copy()
            columns[column][~predicted_T] = 0
        source = rows.source.tolist()
        return [
            Row(
                rows.where(row),
                self.first_source + source[row],
                rows.ids[rows.place(row)],
                rows.doc_lengths[rows.piece_place(row)],
                predicted_T[rows.place(row)],
                {name: values[rows.place(row)] for name, values in columns.items()},
            )
            for row in range(len(rows))
        ]

    def _require_model_fits(self, rows: Rows, column: str, topk_ids_TK: np.ndarray | None) -> None:
        """ValueError where the model has no embedding for a token of the rows, or for one of the most probable or drawn ones."""
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
                    f"{self._names[column]} has token {most_T[token]}, and the base has {bound} embedding rows, the "
                    f"reference {self.reference!r} {self.reference_rows or 'more'}: the reference holds one of its padding rows "
                    "probable there"
                ),
                f"score again with a smaller --top-k, or train a base with at least {most_T.max() + 1} rows",
            )  # fmt: skip


class RowReaders:
    """Blocks of several readers, numbered on through all of them as those of a MixedOrder are."""

    def __init__(self, readers: Sequence[RowReader]) -> None:
        self.readers = readers
        self._first_blocks = np.cumsum([0, *(len(reader.block_rows) for reader in readers)])

    def read_packed(self, block: int) -> list[bytes]:
        """The rows of a block, each checked, as trainer.packed_rows has them. May be called in several threads."""
        number = int(np.searchsorted(self._first_blocks, block, side="right")) - 1
        return pack_rows(self.readers[number].read_block(block - int(self._first_blocks[number])))


def context_of_rows(folders: Sequence[ShardFolder], reference: str | None, asked: str = "auto") -> str:
    """The context to read rows in, "packed" or "document".

    auto: as the reference was scored; without one as all references of the folders were, so that NTP and ReMiT
    runs from the same shards compare like with like, and packed where they differ or there are none. ValueError where
    the reference is missing or was scored in another one.
    """
    if asked not in CONTEXTS:
        raise ValueError(f"context is {asked!r}, expected {', '.join(CONTEXTS[:-1])} or {CONTEXTS[-1]}")
    context = asked
    if asked == "auto" and reference is not None:
        context = folders[0].require_reference(reference)["context"]
    elif asked == "auto":
        contexts = {entry["context"] for folder in folders for entry in folder.manifest.references.values()}
        context = contexts.pop() if len(contexts) == 1 else "packed"
    if reference is not None:
        for folder in folders:
            folder.require_scored(reference, context)
    return context


def top_k_problem(readers: list[RowReader]) -> tuple[str, list[str]]:
    """Why one of the readers has most probable tokens that do not fit the base, "" for none; and what to note."""
    lines = []
    for reader in readers:
        try:
            lines.append(reader.require_top_k_fits())
        except ValueError as error:
            return str(error), []
    return "", [line for line in lines if line]
