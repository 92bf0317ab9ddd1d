"""Mixtures by position: shares, whole epochs, stages; and who reads which block. The oracles walk through the positions."""

import threading
from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from trainer.batch import Row
from trainer.batches import global_batches
from trainer.exchange import decode_error, encode_error
from trainer.mix import SUPERBLOCK, MixedOrder, Stage, layout, whole_counts
from trainer.packed_rows import pack_rows, unpack_rows
from trainer.windows import OwnRows

NAMES = ["web", "code", "math", "books", "wiki"]
SHARES = [0.50, 0.20, 0.15, 0.10, 0.05]


def order_of(shares: list[float], blocks: list[int], later: tuple = (), seed: int = 3, rows: int = 4) -> MixedOrder:
    names = NAMES[: len(shares)]
    stages = [Stage(start, dict(zip(names, own))) for start, own in ((0, shares), *later)]
    return MixedOrder({name: np.full(n, rows) for name, n in zip(names, blocks)}, stages, seed)


def test_counts_are_whole_and_as_near_as_can_be() -> None:
    counts = whole_counts(SHARES)
    assert counts.sum() == SUPERBLOCK
    assert np.abs(counts - np.array(SHARES) * SUPERBLOCK).max() < 1
    assert whole_counts([1 / 3] * 3).tolist() == [21846, 21845, 21845]


@pytest.mark.parametrize("shares", [SHARES, [0.999, 0.001], [1 / 3] * 3, [0.5, 0.5]])
@pytest.mark.parametrize("batch", [64, 1024])
def test_shares_of_every_step(shares: list[float], batch: int) -> None:
    """To two rows, not only on average; and not in a pattern that gives ranks different sources."""
    order = order_of(shares, [1000] * len(shares))
    source = order.split(12_345 * batch, 300 * batch)[0].reshape(300, batch)
    for number, share in enumerate(shares):
        assert np.abs((source == number).sum(axis=1) - share * batch).max() <= 2 + len(shares) / 2
        for ranks in (2, 3, 8):
            of_ranks = [(source.ravel()[rank::ranks] == number).mean() for rank in range(ranks)]
            assert of_ranks == pytest.approx([share] * ranks, abs=0.03)


@pytest.mark.parametrize("batch", [64, 256, 1024, 4096])
def test_a_mixture_is_spread_better_than_independent_rows(batch: int) -> None:
    order, steps = order_of(SHARES, [20_000, 500, 3000, 100, 50], rows=64), min(800, 1_280_000 // batch)
    source = order.split(0, steps * batch)[0].reshape(steps, batch)
    for number, share in enumerate(SHARES):
        of_step = (source == number).mean(axis=1)
        assert of_step.std() <= 0.5 * np.sqrt(share * (1 - share) / batch)
        assert not of_step.std() or np.corrcoef(of_step[:-1], of_step[1:])[0, 1] < 0.1  # or the same in each step


def test_each_row_of_a_source_once_before_any_comes_twice() -> None:
    """Across superblocks and stages, one of which leaves a source out; any position by itself gives the same row."""
    later = ((70_001, [0.0, 0.75, 0.25]), (150_000, [0.1, 0.2, 0.7]))
    order = order_of([0.6, 0.3, 0.1], [3000, 700, 2500], later, rows=5)
    total = 230_000
    rows = order.rows(0, total)
    ends = np.cumsum([3000, 700, 2500])
    source = np.searchsorted(ends, rows[:, 0], side="right")
    for number, blocks in enumerate((3000, 700, 2500)):
        seen = [tuple(row) for row in rows[source == number].tolist()]
        size = 5 * blocks
        for epoch in range(len(seen) // size):
            assert len({*seen[epoch * size : (epoch + 1) * size]}) == size
        rest = seen[len(seen) // size * size :]
        assert len({*rest}) == len(rest)
        for position in (0, 1, 69_999, 70_001, 149_999, 150_001, total):
            assert order.counts(position)[number] == np.count_nonzero(source[:position] == number)
    assert not np.count_nonzero(source[70_001:150_000] == 0)
    assert np.count_nonzero(source[150_000:] == 2) / 80_000 == pytest.approx(0.7, abs=1e-4)
    for start, count in ((0, 3), (65_530, 20), (69_990, 50), (149_999, 2), (229_999, 1)):
        again = order_of([0.6, 0.3, 0.1], [3000, 700, 2500], later, rows=5)
        assert np.array_equal(again.rows(start, count), rows[start : start + count])


def test_positions_lead_back_to_sources() -> None:
    order = order_of([0.6, 0.0, 0.4], [30, 20, 10], ((1000, [0.0, 0.5, 0.5]), (3000, [0.3, 0.0, 0.7])))
    source, place = order.split(0, 90_000)
    for number in range(3):
        mine = np.flatnonzero(source == number)
        assert np.array_equal(order.positions(number, place[mine]), mine)
    assert order.positions(1, np.array([5000])).tolist() == [-1]  # the last stage leaves it out


def test_the_order_of_the_sources_does_not_matter() -> None:
    names, shares = ["b", "a", "c"], [1 / 3] * 3
    stage = [Stage(0, dict(zip(names, shares)))]
    rows = {name: np.full(40, 3) for name in names}
    order, other = MixedOrder(rows, stage, 1), MixedOrder({name: rows[name] for name in sorted(names)}, stage, 1)
    one, two = order.split(0, 70_000)[0], other.split(0, 70_000)[0]
    assert [names[number] for number in one] == [sorted(names)[number] for number in two]
    assert not np.array_equal(layout(np.array([30, 18]), ["a", "b"], 1), layout(np.array([30, 18]), ["a", "b"], 3))


def row_of(block: int, row: int) -> Row:
    rng = np.random.default_rng([block, row])
    tokens = int(rng.integers(1, 20))
    predicted = rng.random(tokens) < 0.7
    columns = {"logprobs": -rng.random(tokens, np.float32), "topk_ids": rng.integers(0, 9, (tokens, 3), np.int32)}
    ids, lengths = rng.integers(0, 150_000, tokens, np.int32), np.array([tokens], np.int32)
    return Row(f"part-{block} rów {row}", block % 3, ids, lengths, predicted, columns)


def same(one: Row, other: Row) -> bool:
    arrays = [(one.input_ids, other.input_ids), (one.doc_lengths, other.doc_lengths), (one.predicted, other.predicted)]
    arrays += [(one.columns[name], other.columns[name]) for name in one.columns]
    alike = all(a.dtype == b.dtype and np.array_equal(a, b) for a, b in arrays)
    return alike and (one.where, one.source, [*one.columns]) == (other.where, other.source, [*other.columns])


def test_rows_as_bytes_come_back() -> None:
    rows = [row_of(block, 0) for block in range(40)]
    assert all(map(same, rows, unpack_rows(pack_rows(rows))))


class Threads:
    """Ranks that are threads of this process, in place of trainer.exchange.Processes."""

    def __init__(self, size: int) -> None:
        self.barrier, self.board = threading.Barrier(size, timeout=30), {}

    def of(self, rank: int, size: int):  # type: ignore[no-untyped-def]
        outer = self

        class OfRank:
            def __init__(self) -> None:
                self.rank, self.size = rank, size

            def swap(self, parcels: list[bytes], error: Exception | None = None) -> list[bytes]:
                outer.board[rank] = encode_error(error) if error else parcels
                outer.barrier.wait()
                everyones = [outer.board[other] for other in range(size)]
                outer.barrier.wait()
                failed = next((own for own in everyones if isinstance(own, bytes)), None)
                if failed is not None:
                    raise decode_error(failed)
                return [parcels[rank] for parcels in everyones]

        return OfRank()


class Reads:
    """Packed rows of blocks, and how often each was read. bad: one that cannot be."""

    def __init__(self, sizes: np.ndarray, bad: int = -1) -> None:
        self.sizes, self.bad, self.count, self.lock = sizes, bad, Counter[int](), threading.Lock()

    def __call__(self, block: int) -> list[bytes]:
        with self.lock:
            self.count[block] += 1
        if block == self.bad:
            raise ValueError(f"block {block}: sha256 differs")
        return pack_rows(row_of(block, row) for row in range(self.sizes[block]))


def run_ranks(
    order: MixedOrder,
    read: Reads,
    ranks: int,
    batch: int,
    first: int,
    last: int,
    last_row: int | None = None,
    left_out: tuple[tuple[int, int], ...] = (),
):  # type: ignore[no-untyped-def]
    """By rank the rows' names of each step, or the error."""
    threads, found = Threads(ranks), {}

    def work(rank: int) -> None:
        exchange = threads.of(rank, ranks) if ranks > 1 else None
        try:
            batches = global_batches(read, order, batch, first, last, last_row, exchange, left_out)
            found[rank] = [[row.where for row in of.rows] for of in batches]
        except ValueError as error:
            found[rank] = str(error)

    workers = [threading.Thread(target=work, args=(rank,)) for rank in range(ranks)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    return found


def mixture() -> tuple[MixedOrder, np.ndarray]:
    rows = {"web": np.array([6] * 300 + [1]), "code": np.array([4, 3] * 20), "math": np.array([5] * 9)}
    stages = [Stage(0, {"web": 0.7, "code": 0.2, "math": 0.1}), Stage(700, {"web": 0.2, "code": 0.0, "math": 0.8})]
    return MixedOrder(rows, stages, 2), np.concatenate([*rows.values()])


@pytest.mark.parametrize("ranks", [1, 2, 3, 8, 16])
def test_any_number_of_ranks_has_the_same_global_batches(ranks: int) -> None:
    """As looked up one by one; from the beginning, and going on in mid-window."""
    order, sizes = mixture()
    for first in (0, 13):
        found = run_ranks(order, Reads(sizes), ranks, 37, first, 31)
        for step in range(first, 31):
            wanted = [row_of(*place).where for place in order.rows(37 * step, 37).tolist()]
            got = [found[position % ranks][step - first][position // ranks] for position in range(37)]
            assert got == wanted


@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize("left_out", [((3, 3), (5, 20), (31, 31)), ((1, 2), (9, 30)), ((1, 31),)])
def test_steps_that_are_left_out_are_not_read(ranks: int, left_out: tuple[tuple[int, int], ...]) -> None:
    """The other steps keep their rows, over the begin of a stage too, and a block is read once in each pass that needs it."""
    order, sizes = mixture()
    steps = [step for step in range(2, 31) if not any(first <= step + 1 <= last for first, last in left_out)]
    places = [order.rows(37 * step, 37).tolist() for step in steps]
    read = Reads(sizes)
    found = run_ranks(order, read, ranks, 37, 2, 31, left_out=left_out)
    assert [len(found[rank]) for rank in range(ranks)] == [len(steps)] * ranks
    for index, wanted in enumerate(places):
        got = [found[position % ranks][index][position // ranks] for position in range(37)]
        assert got == [row_of(*place).where for place in wanted]
    rows_of = [of.num_rows for of in order.orders]
    needed = {
        (block, place // rows_of[source])
        for step, rows in zip(steps, places)
        for (block, _), source, place in zip(rows, *order.split(37 * step, 37))
    }
    assert read.count == Counter(block for block, _ in needed)


@pytest.mark.parametrize("last", [50, 110])
def test_windows_that_are_left_out_are_passed_over(last: int) -> None:
    """The steps that are left out end in the second of three windows, or in the next epoch; what follows is whole."""
    sizes = np.array([3] * 2500 + [1])
    order, read = MixedOrder.of_one(sizes, 1), Reads(sizes)
    found = run_ranks(order, read, 2, 64, 0, 240, left_out=((4, last),))
    steps = [*range(3), *range(last, 240)]
    for index, step in enumerate(steps):
        wanted = [row_of(*place).where for place in order.rows(64 * step, 64).tolist()]
        assert [found[position % 2][index][position // 2] for position in range(64)] == wanted
    assert max(read.count.values()) <= 3


@pytest.mark.parametrize("ranks", [1, 8])
def test_each_block_is_read_once_an_epoch(ranks: int) -> None:
    sizes = np.array([3] * 2500 + [1])  # three windows
    order, read = MixedOrder.of_one(sizes, 1), Reads(sizes)
    found = run_ranks(order, read, ranks, 64, 0, -(-7501 // 64), 7501)
    rows = [row for of_rank in found.values() for step in of_rank for row in step]
    assert len({*rows}) == len(rows) == 7501
    assert {*read.count.values()} == {1}
    assert len(read.count) == 2501


def test_an_error_of_one_rank_is_raised_in_all() -> None:
    order, sizes = mixture()
    found = run_ranks(order, Reads(sizes, bad=5), 4, 37, 0, 31)
    assert [found[rank] for rank in range(4)] == ["block 5: sha256 differs"] * 4


def test_what_does_not_fit_in_memory_waits_in_a_file() -> None:
    order, sizes = mixture()
    held = [OwnRows(order, Reads(sizes), 20, 900, memory_bytes=size) for size in (2**30, 1000)]
    for start in range(20, 900, 55):
        one, other = (own.take(start, min(55, 900 - start)) for own in held)
        assert one == other
    for own in held:
        own.close()


def test_readers_that_cannot_exchange_hold_their_own_rows() -> None:
    order, sizes = mixture()

    def rows(reader: int, readers: int) -> Iterator[str]:
        own = OwnRows(order, Reads(sizes), reader, 1000, reader=reader, readers=readers)
        yield from (row.where for row in unpack_rows(own.take(reader, 1000 - reader)[1]))
        own.close()

    whole = [*rows(0, 1)]
    assert [[*rows(reader, 3)] for reader in range(3)] == [whole[reader::3] for reader in range(3)]
