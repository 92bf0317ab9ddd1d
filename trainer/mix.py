"""A mixture of sources as a function of one integer position: which source a position belongs to, and which of its rows.

Shares are kept by a table and not by chance: a superblock of `SUPERBLOCK` positions holds a whole number of each source, spread
evenly, so the rows of a source among the first p positions are known in closed form, and a step is right to a row or two. Each
source has its own order (trainer/order.py) and goes through all of its rows before any of them comes twice.
S = sources of the mixture.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from trainer.order import WINDOW_BLOCKS, RowOrder, generator

SUPERBLOCK = 65_536
SHUFFLED = 16
"""Positions that keep their shares as a whole: a step of a multiple of so many rows is as even as can be."""
FEWEST_BLOCKS = 16
"""In a window of a source, however small its share."""


def whole_counts(shares: Sequence[float]) -> np.ndarray:
    """Rows of each source in a superblock, int64 [S]: `shares`, which sum to 1, by largest remainder."""
    exact = np.asarray(shares, dtype=np.float64) * SUPERBLOCK
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: SUPERBLOCK - counts.sum()]] += 1
    return counts


def layout(counts: np.ndarray, names: Sequence[str], seed: int) -> np.ndarray:
    """The source of each position of a superblock, int16 [SUPERBLOCK].

    The j-th row of a source with n rows stands at (j + 1/2) / n of the superblock; then every `SHUFFLED` in a row are in random
    order. Evenly, but not in a pattern: with one, rank r of three processes might get all rows of one source. Does not depend
    on the order of the sources.
    """
    keys = np.concatenate([(np.arange(n) + 0.5) / max(n, 1) for n in counts])
    source = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    name_order = np.argsort(np.argsort(names))
    evenly = source[np.lexsort([name_order[source], keys])]
    return generator(seed, "layout").permuted(evenly.reshape(-1, SHUFFLED), axis=1).ravel()


@dataclass(frozen=True)
class Stage:
    """Shares from a position on. shares: of the rows, by source name, 0 for none; they sum to 1."""

    start: int
    shares: Mapping[str, float]


class _Table:
    """Stage as a table. before: rows of each source at earlier positions, int64 [S]."""

    def __init__(self, start: int, counts: np.ndarray, names: Sequence[str], seed: int, before: np.ndarray) -> None:
        self.start, self.counts, self.before = start, counts, before
        if len(names) == 1:
            self.source = np.zeros(SUPERBLOCK, dtype=np.int16)
        else:
            self.source = layout(counts, names, seed)
        self.ordinal = np.empty(SUPERBLOCK, dtype=np.int64)  # rows of the same source before, in this superblock
        self.places = [np.flatnonzero(self.source == source) for source in range(len(counts))]
        for places in self.places:
            self.ordinal[places] = np.arange(len(places))

    def split(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        whole, place = np.divmod(positions - self.start, SUPERBLOCK)
        source = self.source[place].astype(np.int64)
        return source, self.before[source] + whole * self.counts[source] + self.ordinal[place]

    def positions(self, source: int, places: np.ndarray) -> np.ndarray:
        """Where the rows at these places of a source stand, -1 for never; the other way round from split."""
        if not self.counts[source]:
            return np.full(len(places), -1)
        whole, ordinal = np.divmod(places - self.before[source], self.counts[source])
        return self.start + whole * SUPERBLOCK + self.places[source][ordinal]

    def counts_at(self, position: int) -> np.ndarray:
        whole, place = divmod(position - self.start, SUPERBLOCK)
        return self.before + whole * self.counts + np.bincount(self.source[:place], minlength=len(self.counts))


class MixedOrder:
    """Order over the rows of several sources, whose blocks are numbered on through all of them.

    block_rows: by source, rows of each of its blocks, int64. stages: ascending, the first from position 0.
    """

    def __init__(self, block_rows: Mapping[str, np.ndarray], stages: Sequence[Stage], seed: int) -> None:
        self.names, self.stages, self.seed = list(block_rows), tuple(stages), seed
        self._block_rows = block_rows
        assert self.stages[0].start == 0
        largest = {name: max(stage.shares[name] for stage in stages) for name in self.names}
        # what a source is among the blocks of the mixture's windows is its share of the rows
        blocks = {name: max(FEWEST_BLOCKS, int(np.ceil(WINDOW_BLOCKS * share))) for name, share in largest.items()}
        self.orders = [
            RowOrder(rows, seed, name if len(self.names) > 1 else "", min(WINDOW_BLOCKS, blocks[name]))
            for name, rows in block_rows.items()
        ]
        self.first_blocks = np.cumsum([0, *(len(rows) for rows in block_rows.values())])

    def __reduce__(self) -> tuple:
        return MixedOrder, (self._block_rows, self.stages, self.seed)

    @classmethod
    def of_one(cls, block_rows: np.ndarray, seed: int) -> "MixedOrder":
        """The order of a single folder."""
        return cls({"": block_rows}, [Stage(0, {"": 1.0})], seed)

    @cached_property
    def _tables(self) -> list[_Table]:
        tables: list[_Table] = []
        before = np.zeros(len(self.names), dtype=np.int64)
        for stage in self.stages:
            if tables:
                before = tables[-1].counts_at(stage.start)
            by_name = np.argsort(self.names)  # which of equal shares gets one row more must not depend on their order
            counts = np.zeros(len(self.names), dtype=np.int64)
            counts[by_name] = whole_counts([stage.shares[self.names[number]] for number in by_name])
            tables.append(_Table(stage.start, counts, self.names, self.seed, before))
        return tables

    @property
    def num_rows(self) -> int:
        """Of all sources together."""
        return sum(order.num_rows for order in self.orders)

    def _table_of(self, position: int) -> int:
        return int(np.searchsorted([table.start for table in self._tables], position, side="right")) - 1

    def counts(self, position: int) -> np.ndarray:
        """Rows of each source at positions 0 .. position - 1, int64 [S]."""
        return self._tables[self._table_of(position)].counts_at(position)

    def split(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Of positions start .. start + count - 1 the source and the position in it, both int64 [count]."""
        positions = np.arange(start, start + count)
        first, last = self._table_of(start), self._table_of(start + max(0, count - 1))
        pieces = []
        for number in range(first, last + 1):
            end = self._tables[number + 1].start if number < last else start + count
            here = positions[(positions >= self._tables[number].start) & (positions < end)]
            pieces.append(self._tables[number].split(here))
        sources, places = zip(*pieces)
        return np.concatenate(sources), np.concatenate(places)

    def positions(self, source: int, places: np.ndarray) -> np.ndarray:
        """The positions at which the rows at these places, ascending, of a source train, -1 for never: int64."""
        befores = [int(table.before[source]) for table in self._tables]
        found = np.empty(len(places), dtype=np.int64)
        table_of = np.searchsorted(befores, places, side="right") - 1  # of stages without the source none is taken
        for number in np.unique(table_of).tolist():
            here = table_of == number
            found[here] = self._tables[number].positions(source, places[here])
        return found

    def rows(self, start: int, count: int) -> np.ndarray:
        """[count, 2] block and row within the block at positions start .. start + count - 1, int64."""
        source, place = self.split(start, count)
        found = np.empty((count, 2), dtype=np.int64)
        for number, order in enumerate(self.orders):
            mine = source == number
            if mine.any():  # their positions in the source are consecutive
                found[mine] = order.rows(int(place[mine][0]), int(mine.sum()))
                found[mine, 0] += self.first_blocks[number]
        return found
