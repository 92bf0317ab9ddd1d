"""Read what a step needs of its positions: the document before each, the true text, and the rows without them.

In: draws of the curriculum. Out: Positions, and trainer rows in which no position of the step is predicted.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipelines.rmt.curriculum import Draw
from pipelines.rmt.tier_index import NO_LIMITS, Limits, TierIndex, entropy_column, tiers_of_rows
from shards.contract import check
from shards.folder import ShardFolder
from shards.rows import PartRows, Rows
from shards.schema import logprobs_column
from trainer.batch import Row

OPEN_PARTS = 64
CONTINUATION = 64
"""Tokens of the true text that a boxed answer is compared with."""


@dataclass(frozen=True)
class Position:
    """One place of the corpus. row: counted over all parts; place: in the row; prefix_ids: of its document in this row,
    before it; continuation_ids: from it on, the true token first; baseline: stored log-prob of the frozen base, or NaN."""

    row: int
    place: int
    tier: int
    entropy: float
    prefix_ids: tuple[int, ...]
    continuation_ids: tuple[int, ...]
    baseline: float

    @property
    def target(self) -> int:
        """The true token."""
        return self.continuation_ids[0]


class PositionReader:
    """Rows of a complete, scored shard folder by number. A part is hashed when it is opened.

    context: in which a row is predicted; baseline: name of the frozen base's log-probs, or None; num_embeddings: token ids
    must be below it; limits: those that the index was counted with.
    """

    def __init__(
        self,
        folder: ShardFolder,
        index: TierIndex,
        reference: str,
        thresholds: Sequence[float],
        context: str,
        num_embeddings: int,
        baseline: str | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self._folder, self._index, self._reference, self._thresholds = folder, index, reference, thresholds
        self._context, self._baseline, self._num_embeddings = context, baseline, num_embeddings
        self._limits = limits
        self._entropy = entropy_column(folder, reference)
        self._columns = ["input_ids", self._entropy, *([logprobs_column(baseline)] if baseline else [])]
        self._left_out = tuple(folder.manifest.references)
        self._parts: OrderedDict[int, PartRows] = OrderedDict()
        self._batches: OrderedDict[tuple[int, int], Rows] = OrderedDict()

    def row(self, number: int) -> Rows:
        """Row `number`, counted over all parts."""
        manifest = self._folder.manifest
        part, of_part = divmod(number, manifest.rows_per_part)
        batch, of_batch = divmod(of_part, manifest.rows_per_batch)
        if part not in self._parts:
            self._parts[part] = self._folder.open_rows(manifest.parts[part].name, self._columns)
            if len(self._parts) > OPEN_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(part)
        if (part, batch) not in self._batches:
            rows = check(self._parts[part].batch(batch))
            if rows.ids.max() >= self._num_embeddings:
                raise ValueError(
                    f"{rows.where(0)} and the rows after it: have token id {rows.ids.max()}, the model has embeddings for "
                    f"0..{self._num_embeddings - 1}; use the model that the corpus was packed for"
                )
            self._batches[part, batch] = rows
            if len(self._batches) > OPEN_PARTS:
                self._batches.popitem(last=False)
        self._batches.move_to_end((part, batch))
        return self._batches[part, batch].row(of_batch)

    def position(self, draw: Draw) -> Position:
        """What stands at the place of a draw."""
        number, ordinal = self._index.locate(draw)
        rows = self.row(number)
        others = [self._baseline] if self._baseline else []
        tiers_T = tiers_of_rows(rows, self._reference, self._thresholds, others, self._limits)
        place = int(np.flatnonzero(tiers_T == draw.tier)[ordinal])
        ends = np.cumsum(rows.doc_lengths)
        piece = int(np.searchsorted(ends, place, side="right"))
        start, end = int(ends[piece] - rows.doc_lengths[piece]), int(ends[piece])
        ids = rows.ids
        baseline = float(rows.logprobs(self._baseline)[place]) if self._baseline else float("nan")
        return Position(
            number,
            place,
            draw.tier,
            float(rows.values(self._entropy)[place]),
            tuple(ids[start:place].tolist()),
            tuple(ids[place : min(end, place + CONTINUATION)].tolist()),
            baseline,
        )

    def training_row(self, number: int) -> Row:
        """The row as the trainer has it: all that is to be predicted and has a predecessor in the context."""
        rows = self.row(number)
        predicted_T = rows.trained(self._context)
        if not rows.scored(*self._left_out)[0]:
            predicted_T &= False
        return Row(rows.where(0), int(rows.source[0]), rows.ids, rows.doc_lengths, predicted_T, {})


def rows_without(positions: Sequence[Position], reader: PositionReader) -> list[Row]:
    """The rows of the positions, each once and in ascending order, with none of the positions predicted."""
    places: dict[int, list[int]] = {}
    for position in positions:
        places.setdefault(position.row, []).append(position.place)
    return [without(reader.training_row(number), places[number]) for number in sorted(places)]


def without(row: Row, places: Sequence[int]) -> Row:
    """The row with these places not predicted: what is reasoned about is not also learned by next-token prediction."""
    predicted = row.predicted.copy()
    predicted[list(places)] = False
    return replace(row, predicted=predicted)
