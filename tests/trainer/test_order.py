"""The order of rows: every row once per epoch, computed from any position, mixed as well as independent rows."""

import numpy as np
import pytest

from trainer.order import WINDOW_BLOCKS, RowOrder

SHARES = (0.50, 0.20, 0.15, 0.10, 0.05)
UNEQUAL = (0.60, 0.25, 0.01, 0.10, 0.04)


@pytest.mark.parametrize("blocks", [[1], [3, 1], [4] * 40 + [1], list(range(1, 150)), [2] * (3 * WINDOW_BLOCKS + 1)])
def test_every_row_once_per_epoch(blocks: list[int]) -> None:
    order = RowOrder(np.array(blocks), seed=5)
    every = {(block, row) for block, rows in enumerate(blocks) for row in range(rows)}
    for epoch in range(3):
        rows = [tuple(row) for row in order.rows(epoch * order.num_rows, order.num_rows).tolist()]
        assert len(rows) == len(every)
        assert set(rows) == every


@pytest.mark.parametrize("window_blocks", [5, 384])
def test_position_alone_decides(window_blocks: int) -> None:
    blocks = np.array([7] * 50 + [2])
    whole = RowOrder(blocks, 1, "code", window_blocks).rows(0, 1000)
    for start, count in ((0, 1), (350, 10), (351, 300), (999, 1)):
        assert np.array_equal(
            RowOrder(blocks, 1, "code", window_blocks).rows(start, count), whole[start : start + count]
        )


def test_seed_epoch_and_name_change_the_order() -> None:
    blocks = np.array([5] * 30)
    orders = [RowOrder(blocks, *key).rows(0, 300) for key in ((1,), (2,), (1, "code"), (1, "text"))]
    halves = [half for rows in orders for half in (rows[:150], rows[150:])]
    assert len({half.tobytes() for half in halves}) == len(halves)


def test_no_rows_is_an_error() -> None:
    with pytest.raises(ValueError, match="no rows"):
        RowOrder(np.array([], dtype=np.int64), seed=0)


@pytest.mark.parametrize("blocks", [WINDOW_BLOCKS, WINDOW_BLOCKS + 1, 5_003])
def test_a_window_takes_evenly_from_the_whole_corpus(blocks: int) -> None:
    order = RowOrder(np.full(blocks, 3), seed=2)
    windows = [order.blocks(1, window) for window in range(order.num_windows)]
    assert order.num_windows == -(-blocks // WINDOW_BLOCKS)
    assert {len(window) for window in windows} <= {blocks // order.num_windows, -(-blocks // order.num_windows)}
    for window in windows:  # any stretch of the corpus: right to about a block
        ends = np.searchsorted(window, np.linspace(0, blocks, 38))
        assert np.abs(np.diff(ends) - len(window) / 37).max() <= 2


@pytest.mark.parametrize("batch", [64, 256, 1024, 4096])
@pytest.mark.parametrize(("given", "last_rows"), [(SHARES, 64), (UNEQUAL, 48)])
def test_a_step_is_as_mixed_as_independent_rows(batch: int, given: tuple[float, ...], last_rows: int) -> None:
    """20,000 blocks of five sources, one after the other; every sixteenth block, the last of a part, may be shorter."""
    rows = np.where(np.arange(20_000) % 16 == 15, last_rows, 64)
    source = np.searchsorted(np.cumsum(given)[:-1], (np.arange(20_000) + 0.5) / 20_000)
    shares = np.bincount(source, rows) / rows.sum()
    order, steps = RowOrder(rows, seed=3), min(2500, int(rows.sum()) // batch)
    sources = source[order.rows(0, steps * batch)[:, 0]].reshape(steps, batch)
    for number, share in enumerate(shares):
        of_step = (sources == number).mean(axis=1)
        assert of_step.mean() == pytest.approx(share, abs=0.003)
        assert of_step.std() <= 1.25 * np.sqrt(share * (1 - share) / batch)
        assert np.corrcoef(of_step[:-1], of_step[1:])[0, 1] < 0.1
