"""The order in which rows train: a function of the seed, the epoch and one integer position alone.

A block is a run of consecutive rows of the corpus that a reader decompresses at once. An epoch visits the
blocks in a random order, `WINDOW_BLOCKS` at a time, with the rows of each such window shuffled. So a reader
holds a window in memory, and yet any position can be computed without walking there.
"""

from functools import lru_cache

import numpy as np

WINDOW_BLOCKS = 16


class RowOrder:
    """Order over blocks of `block_rows` rows each: int64 [blocks], in corpus order."""

    def __init__(self, block_rows: np.ndarray, seed: int) -> None:
        if not len(block_rows) or block_rows.min() < 1:
            raise ValueError("there are no rows to train on, or an empty block among them")
        self.block_rows, self.seed = block_rows.astype(np.int64), seed
        self.num_rows = int(block_rows.sum())
        self._epoch = lru_cache(maxsize=2)(self._make_epoch)
        self._window = lru_cache(maxsize=4)(self._make_window)

    def __reduce__(self) -> tuple:
        return RowOrder, (self.block_rows, self.seed)  # without its caches, for the workers of a DataLoader

    def _make_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Blocks in the order of this epoch, and the position at which each window ends."""
        blocks = np.random.default_rng([self.seed, epoch]).permutation(len(self.block_rows))
        firsts = np.arange(0, len(blocks), WINDOW_BLOCKS)
        return blocks, np.cumsum(np.add.reduceat(self.block_rows[blocks], firsts))

    def _make_window(self, epoch: int, window: int) -> np.ndarray:
        """[rows, 2] block and row within the block, in the order of this window."""
        blocks = self._epoch(epoch)[0][window * WINDOW_BLOCKS : (window + 1) * WINDOW_BLOCKS]
        rows = np.concatenate(
            [np.stack([np.full(n, block), np.arange(n)], axis=1) for block, n in zip(blocks, self.block_rows[blocks])]
        )
        return np.random.default_rng([self.seed, epoch, window]).permutation(rows)

    def rows(self, start: int, count: int) -> np.ndarray:
        """[count, 2] block and row within the block at positions start .. start + count - 1.

        Positions run on over the epochs: position p belongs to epoch p // num_rows.
        """
        found = np.empty((count, 2), dtype=np.int64)
        filled = 0
        while filled < count:
            epoch, position = divmod(start + filled, self.num_rows)
            ends = self._epoch(epoch)[1]
            window = int(np.searchsorted(ends, position, side="right"))
            rows = self._window(epoch, window)
            offset = position - (int(ends[window - 1]) if window else 0)
            taken = rows[offset : offset + count - filled]
            found[filled : filled + len(taken)] = taken
            filled += len(taken)
        return found
