"""How many positions of each tier each row has: built once from the entropy column, then every draw is a look-up.

In: a scored shard folder. Out: OUT/curriculum/tiers.npy, int64 [tiers, rows + 1], the positions of each tier in the rows
before; and tiers.json beside it with its sha256. The corpus is read once, a record batch at a time; the file is mapped.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pipelines.rmt.curriculum import Draw, tier_of
from shards.entropy import entropy_columns
from shards.folder import ShardFolder
from shards.part import sha256_file
from shards.rows import Rows
from shards.store import temporary_name

FOLDER, COUNTS, RECORD = "curriculum", "tiers.npy", "tiers.json"


def entropy_column(folder: ShardFolder, reference: str) -> str:
    """The column of the reference's entropy; ValueError where it is not stored."""
    columns = list(entropy_columns(reference, folder.require_scored(reference)))
    if not columns:
        raise ValueError(
            f"{folder.path}: has no entropy of the reference {reference!r}, which says how difficult a position is; score it "
            "again with --entropy"
        )
    return columns[0]


def tiers_of_rows(rows: Rows, reference: str, thresholds: Sequence[float], others: Sequence[str] = ()) -> np.ndarray:
    """Tier of each token, int64 [T]; -1 where it cannot be drawn.

    That is where the row was not scored, by the reference or one of the `others`, and where a document begins: what
    comes before it says nothing about it.
    """
    column = entropy_column_of(rows, reference)
    can_be_drawn = rows.predicted(reference) & rows.has_predecessor("document")
    for name in others:
        can_be_drawn &= rows.predicted(name)
    tiers = tier_of(np.nan_to_num(rows.values(column)), thresholds)
    return np.where(can_be_drawn, tiers, -1)


def entropy_column_of(rows: Rows, reference: str) -> str:
    """The column of the reference's entropy in rows that were read with it."""
    return next(iter(entropy_columns(reference, rows.part.manifest.references[reference])))


class TierIndex:
    """before_TR: int64 [tiers, rows + 1], positions of each tier in the rows before a row."""

    def __init__(self, before_TR: np.ndarray) -> None:
        self.before_TR = before_TR

    @property
    def counts(self) -> list[int]:
        """Positions of each tier."""
        counts: list[int] = self.before_TR[:, -1].tolist()
        return counts

    def locate(self, draw: Draw) -> tuple[int, int]:
        """The row of a draw, and which one of its tier's positions in that row it is."""
        before_R = self.before_TR[draw.tier]
        row = int(np.searchsorted(before_R, draw.ordinal, side="right")) - 1
        return row, draw.ordinal - int(before_R[row])


def count_tiers(
    folder: ShardFolder,
    reference: str,
    thresholds: Sequence[float],
    others: Sequence[str] = (),
    progress: Callable[[int], None] = lambda rows: None,
) -> TierIndex:
    """Read the entropies of all rows, in order. progress: told the rows done, once per record batch."""
    counts = np.zeros((len(thresholds) + 1, folder.manifest.rows + 1), dtype=np.int64)
    done = 0
    columns = [entropy_column(folder, reference), *(f"{name}_logprobs" for name in others)]
    for rows in folder.batches(columns):
        tiers = tiers_of_rows(rows, reference, thresholds, others)
        row_T = np.repeat(np.arange(done, done + len(rows)), rows.lengths)
        drawn = tiers >= 0
        np.add.at(counts, (tiers[drawn], row_T[drawn] + 1), 1)
        done += len(rows)
        progress(done)
    return TierIndex(np.cumsum(counts, axis=1, out=counts))


def load_or_count(
    out: Path, count: Callable[[], TierIndex], check_lease: Callable[[], None] = lambda: None
) -> TierIndex:
    """The index in a run's folder, which is made, by `count`, where it is not there or was damaged."""
    folder = out / FOLDER
    index = _load(folder)
    if index is not None:
        return index
    made = count()
    check_lease()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    temporary = temporary_name(folder / COUNTS)
    with open(temporary, "wb") as file:
        np.save(file, made.before_TR)
    temporary.rename(folder / COUNTS)
    (folder / RECORD).write_text(json.dumps({"sha256": sha256_file(folder / COUNTS)}) + "\n", encoding="utf-8")
    loaded = _load(folder)
    if loaded is None:
        raise OSError(
            f"{folder / COUNTS}: could not be read back as it was written; the same command again writes it anew"
        )
    return loaded


def _load(folder: Path) -> TierIndex | None:
    try:
        expected = json.loads((folder / RECORD).read_text(encoding="utf-8"))["sha256"]
        if sha256_file(folder / COUNTS) != expected:
            return None
        return TierIndex(np.load(folder / COUNTS, mmap_mode="r", allow_pickle=False))
    except (OSError, ValueError, KeyError, TypeError):
        return None
