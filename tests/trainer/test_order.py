"""The order of rows: every row once per epoch, computed from any position, different with seed and epoch."""

import numpy as np
import pytest

from trainer.order import WINDOW_BLOCKS, RowOrder


@pytest.mark.parametrize("blocks", [[1], [3, 1], [4] * 40 + [1], list(range(1, 3 * WINDOW_BLOCKS))])
def test_every_row_once_per_epoch(blocks: list[int]) -> None:
    order = RowOrder(np.array(blocks), seed=5)
    every = {(block, row) for block, rows in enumerate(blocks) for row in range(rows)}
    for epoch in range(3):
        rows = [tuple(row) for row in order.rows(epoch * order.num_rows, order.num_rows).tolist()]
        assert len(rows) == len(every)
        assert set(rows) == every


def test_position_alone_decides() -> None:
    blocks = np.array([7] * 50 + [2])
    whole = RowOrder(blocks, seed=1).rows(0, 1000)
    for start, count in ((0, 1), (350, 10), (351, 300), (999, 1)):
        assert np.array_equal(RowOrder(blocks, seed=1).rows(start, count), whole[start : start + count])


def test_seed_and_epoch_change_the_order() -> None:
    blocks = np.array([5] * 30)
    first = RowOrder(blocks, seed=1).rows(0, 150)
    assert not np.array_equal(first, RowOrder(blocks, seed=2).rows(0, 150))
    assert not np.array_equal(first, RowOrder(blocks, seed=1).rows(150, 150))


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        RowOrder(np.array([], dtype=np.int64), seed=0)
