"""How many positions of each tier each row has: built once from the entropy column, then every draw is a look-up.

In: a scored shard folder. Out: OUT/_curriculum/tiers.npy, int64 [tiers, rows + 1], the positions of each tier in the rows
before; and tiers.json beside it with its sha256 and what it was counted for. The corpus is read once, a record batch at a
time; the file is mapped.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from pipelines.rmt.curriculum import Draw, tier_of
from shards.entropy import entropy_columns
from shards.folder import ShardFolder
from shards.manifest import MANIFEST
from shards.part import sha256_file
from shards.rows import Rows
from shards.store import temporary_name

# the underscore: it is written before run.json, and a run that died in between may begin again (require_empty)
FOLDER, COUNTS, RECORD = "_curriculum", "tiers.npy", "tiers.json"


@dataclass(frozen=True)
class Limits:
    """What the reward can be given for. tokens_V: bool, the true tokens that can be answered, None for all; longest_prefix:
    most tokens of a document before a position, None for any number."""

    tokens_V: np.ndarray | None = None
    longest_prefix: int | None = None

    def hold(self, rows: Rows) -> np.ndarray:
        """Where a token of the rows is within the limits, bool [T]."""
        within_T = np.ones(len(rows.ids), dtype=bool) if self.tokens_V is None else self.tokens_V[rows.ids]
        if self.longest_prefix is not None:
            starts_D = np.cumsum(rows.doc_lengths) - rows.doc_lengths
            within_T &= np.arange(len(within_T)) - np.repeat(starts_D, rows.doc_lengths) <= self.longest_prefix
        return within_T

    def entry(self) -> dict[str, Any]:
        """As JSON, for comparison."""
        digest = None if self.tokens_V is None else hashlib.sha256(np.packbits(self.tokens_V).tobytes()).hexdigest()
        return {"tokens": digest, "longest_prefix": self.longest_prefix}


NO_LIMITS = Limits()
NOTHING: Mapping[str, Any] = MappingProxyType({})


def entropy_column(folder: ShardFolder, reference: str) -> str:
    """The column of the reference's entropy; ValueError where it is not stored."""
    columns = list(entropy_columns(reference, folder.require_scored(reference)))
    if not columns:
        raise ValueError(
            f"{folder.path}: has no entropy of the reference {reference!r}, which says how difficult a position is; score it "
            "again with --entropy"
        )
    return columns[0]


def tiers_of_rows(
    rows: Rows, reference: str, thresholds: Sequence[float], others: Sequence[str] = (), limits: Limits = NO_LIMITS
) -> np.ndarray:
    """Tier of each token, int64 [T]; -1 where it cannot be drawn.

    That is where the row was not scored, by the reference or one of the `others`; where training is not to predict the
    token; where a document begins, since what comes before it says nothing about it; and beyond the limits.
    """
    return np.where(may_be_drawn(rows, reference, others) & limits.hold(rows), tiers(rows, reference, thresholds), -1)


def may_be_drawn(rows: Rows, reference: str, others: Sequence[str] = ()) -> np.ndarray:
    """Where a token can be drawn as far as the rows say, bool [T]."""
    may_T = rows.predicted(reference) & rows.trained("document")
    for name in others:
        may_T &= rows.predicted(name)
    return may_T


def tiers(rows: Rows, reference: str, thresholds: Sequence[float]) -> np.ndarray:
    """Tier of the stored entropy of each token, int64 [T]; without a meaning where there is none."""
    return tier_of(np.nan_to_num(rows.values(entropy_column_of(rows, reference))), thresholds)


def entropy_column_of(rows: Rows, reference: str) -> str:
    """The column of the reference's entropy in rows that were read with it."""
    return next(iter(entropy_columns(reference, rows.part.manifest.references[reference])))


class TierIndex:
    """before_TR: int64 [tiers, rows + 1], positions of each tier in the rows before a row. beyond: positions that could be
    drawn but for the limits."""

    def __init__(self, before_TR: np.ndarray, beyond: int = 0) -> None:
        self.before_TR, self.beyond = before_TR, beyond

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
    limits: Limits = NO_LIMITS,
) -> TierIndex:
    """Read the entropies of all rows, in order. progress: told the rows done, once per record batch."""
    counts = np.zeros((len(thresholds) + 1, folder.manifest.rows + 1), dtype=np.int64)
    done = beyond = 0
    columns = [entropy_column(folder, reference), *(f"{name}_logprobs" for name in others)]
    for rows in folder.batches(columns):
        may_T, within_T = may_be_drawn(rows, reference, others), limits.hold(rows)
        row_T = np.repeat(np.arange(done, done + len(rows)), rows.lengths)
        drawn = may_T & within_T
        beyond += int(np.count_nonzero(may_T & ~within_T))
        np.add.at(counts, (tiers(rows, reference, thresholds)[drawn], row_T[drawn] + 1), 1)
        done += len(rows)
        progress(done)
    return TierIndex(np.cumsum(counts, axis=1, out=counts), beyond)


def counted_for(
    folder: ShardFolder,
    reference: str,
    thresholds: Sequence[float],
    others: Sequence[str] = (),
    limits: Limits = NO_LIMITS,
) -> dict[str, Any]:
    """All that an index follows from, as JSON."""
    return {
        "manifest_sha256": hashlib.sha256(folder.store.read(MANIFEST)).hexdigest(),
        "reference": reference,
        "thresholds": [float(value) for value in thresholds],
        "others": list(others),
        "limits": limits.entry(),
    }


def load_or_count(
    out: Path,
    count: Callable[[], TierIndex],
    check_lease: Callable[[], None] = lambda: None,
    wanted: Mapping[str, Any] = NOTHING,
    check: Callable[[TierIndex], None] = lambda index: None,
) -> TierIndex:
    """The index in a run's folder, which is made, by `count`, where it is not there, was damaged, or was counted for
    something else. wanted: what it is to be counted for. check: raises before an index is used or written that will not do."""
    folder = out / FOLDER
    index = _load(folder, wanted)
    if index is not None:
        check(index)
        return index
    made = count()
    check(made)
    check_lease()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    temporary = temporary_name(folder / COUNTS)
    with open(temporary, "wb") as file:
        np.save(file, made.before_TR)
    temporary.rename(folder / COUNTS)
    record = {"sha256": sha256_file(folder / COUNTS), "beyond": made.beyond, "counted_for": dict(wanted)}
    (folder / RECORD).write_text(json.dumps(record) + "\n", encoding="utf-8")
    loaded = _load(folder, wanted)
    if loaded is None:
        raise OSError(
            f"{folder / COUNTS}: could not be read back as it was written; the same command again writes it anew"
        )
    return loaded


def _load(folder: Path, wanted: Mapping[str, Any]) -> TierIndex | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
        if record["counted_for"] != wanted or sha256_file(folder / COUNTS) != record["sha256"]:
            return None
        return TierIndex(np.load(folder / COUNTS, mmap_mode="r", allow_pickle=False), record["beyond"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
