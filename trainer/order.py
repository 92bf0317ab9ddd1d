"""The order in which the rows of a folder train: a function of the seed, the epoch and one integer position alone.

A block is a run of consecutive rows of the corpus, which a reader decompresses at once. An epoch is cut into K windows of
about `WINDOW_BLOCKS` blocks, and the rows of a window are in random order. Each window is a sample of the whole corpus: of
every K consecutive blocks each window gets one, so the share of any stretch of the corpus in a window is right to about a
block. A step draws its rows from a window without replacement; hence the share of a source in a step varies no more than that
of rows drawn independently. Any position is computed without walking there.
"""

import hashlib
from functools import lru_cache

import numpy as np

WINDOW_BLOCKS = 1024
"""Most blocks of a window. With the defaults of pack (64 rows of 4,096 tokens) that is 268M tokens, which the processes of a
run hold between them, compressed (trainer/windows.py). A source of 1 % has ten blocks in it, one more or less."""


def generator(*key: int | str) -> np.random.Generator:
    """Random numbers that depend on all of `key`: numpy's own seeds [1, 2] and [1, 2, 0] give the same ones."""
    return np.random.default_rng(int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:16], "little"))


class RowOrder:
    """Order over blocks of `block_rows` rows each: int64 [blocks], in corpus order.

    name: of the source, so that two sources of a mixture do not shuffle alike. window_blocks: most blocks of a window.
    """

    def __init__(self, block_rows: np.ndarray, seed: int, name: str = "", window_blocks: int = WINDOW_BLOCKS) -> None:
        if not len(block_rows) or block_rows.min() < 1:
            raise ValueError("there are no rows to train on, or an empty block among them")
        self.block_rows, self.seed, self.name, self.window_blocks = (
            block_rows.astype(np.int64),
            seed,
            name,
            window_blocks,
        )
        self.num_rows = int(block_rows.sum())
        self.num_windows = -(-len(block_rows) // window_blocks)
        """Of an epoch."""
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def __reduce__(self) -> tuple:
        # without its caches, for the workers of a DataLoader
        return RowOrder, (self.block_rows, self.seed, self.name, self.window_blocks)

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks of each window in corpus order, -1 for none: int64 [windows, runs]; the position at which each ends.

        Each run of blocks is dealt one to a window. Where the blocks do not come out even, some windows go without one,
        once: these gaps are spread over the runs, or the end of the corpus would be unevenly in the windows.
        """
        windows = self.num_windows
        random, runs = generator(self.seed, self.name, epoch), -(-len(self.block_rows) // windows)
        gaps = runs * windows - len(self.block_rows)
        run_of_gap = ((np.arange(gaps) + 0.5) * runs / max(1, gaps)).astype(np.int64)
        lengths = windows - np.bincount(run_of_gap, minlength=runs)
        dealt = random.permuted(
            np.tile(np.arange(windows), (runs, 1)), axis=1
        )  # the place in its run of a window's block
        last = np.full(runs, windows)
        for run, window in zip(run_of_gap, random.permutation(windows)):
            last[run] -= 1  # a place beyond the run's end
            dealt[run, np.flatnonzero(dealt[run] == last[run])[0]] = dealt[run, window]
            dealt[run, window] = last[run]
        firsts = np.cumsum(lengths) - lengths
        blocks = np.where(dealt < lengths[:, None], firsts[:, None] + dealt, -1).T
        return blocks, np.cumsum(np.where(blocks < 0, 0, self.block_rows[blocks]).sum(axis=1))

    def blocks(self, epoch: int, window: int) -> np.ndarray:
        """The blocks of a window in corpus order, int64."""
        blocks = self._epoch(epoch)[0][window]
        return blocks[blocks >= 0]

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        blocks = self.blocks(epoch, window)
        counts = self.block_rows[blocks]
        row = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        rows = np.stack([np.repeat(blocks, counts), row], axis=1)
        return rows[generator(self.seed, self.name, epoch, window).permutation(len(rows))]

    def window(self, epoch: int, window: int) -> tuple[int, np.ndarray]:
        """The position of a window's first row, counted over all epochs, and its rows as `rows` gives them."""
        rows, end = self._window(epoch, window), int(self._epoch(epoch)[1][window])
        return epoch * self.num_rows + end - len(rows), rows

    def window_of(self, position: int) -> tuple[int, int]:
        """Epoch and window of a position, which is counted over all epochs: p belongs to epoch p // num_rows."""
        epoch, place = divmod(position, self.num_rows)
        return epoch, int(np.searchsorted(self._epoch(epoch)[1], place, side="right"))

    def rows(self, start: int, count: int) -> np.ndarray:
        """[count, 2] block and row within the block at positions start .. start + count - 1, int64."""
        found = np.empty((count, 2), dtype=np.int64)
        filled = 0
        while filled < count:
            first, rows = self.window(*self.window_of(start + filled))
            offset = start + filled - first
            taken = rows[offset : offset + count - filled]
            found[filled : filled + len(taken)] = taken
            filled += len(taken)
        return found
