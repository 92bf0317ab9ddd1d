"""Global batches in training order, read ahead in a thread: each process reads its own blocks and gets the rows it trains."""

import math
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from time import perf_counter

from trainer.batch import Row
from trainer.exchange import Alone, Exchange, make_parcels, open_parcels
from trainer.mix import MixedOrder
from trainer.option_text import Ranges, contains
from trainer.packed_rows import unpack_rows
from trainer.windows import OwnRows

READ_AHEAD_STEPS = 4
READ_AHEAD_ROWS = 1024
"""Of one process: steps of more rows are read ahead one at a time."""


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's rows of a global batch: places rank, rank + world_size, ... of `num_rows`."""

    rows: list[Row]
    num_rows: int
    data_wait_seconds: float

    def micro_batches(self, size: int, world_size: int) -> list[list[Row]]:
        """As many on every rank, because all take part in the exchange of gradients; the last ones may be empty."""
        count = math.ceil(self.num_rows / (world_size * size))
        return [self.rows[index * size : (index + 1) * size] for index in range(count)]


def global_batches(
    read: Callable[[int], list[bytes]],
    order: MixedOrder,
    batch_size: int,
    first_step: int,
    last_step: int,
    last_row: int | None = None,
    exchange: Exchange | None = None,
    left_out: Ranges = (),
) -> Generator[GlobalBatch]:
    """The global batches of steps first_step .. last_step - 1, for this process of those that `exchange` connects.

    read: the packed rows of a block (RowReaders.read_packed); called in threads, for the blocks of this process. A few batches
    are read ahead; what fails there, in any process, is raised here. last_row: position at which the data ends (None: it goes on with the
    next epoch), so that the very last batch may be smaller. left_out: steps, counted from 1, that have no batch, the same in all
    processes; their rows keep their positions.
    """
    exchange = exchange or Alone()
    stop = last_step * batch_size if last_row is None else min(last_step * batch_size, last_row)
    steps = [step for step in range(first_step, last_step) if not contains(left_out, step + 1)]
    if not steps:
        return
    own = OwnRows(
        order, read, first_step * batch_size, stop, exchange.rank, exchange.size,
        left_out=[((first - 1) * batch_size, last * batch_size) for first, last in left_out],
    )  # fmt: skip

    def load(step: int) -> tuple[list[Row], int]:
        start = step * batch_size
        count = min(start + batch_size, stop) - start
        error: Exception | None = None
        parcels = [b""] * exchange.size
        try:
            parcels = make_parcels(*own.take(start, count), exchange.size)
        except Exception as raised:
            error = raised
        mine = open_parcels(exchange.swap(parcels, error))
        places = range(exchange.rank, count, exchange.size)
        assert [*places] == sorted(mine), f"step {step}: rows {sorted(mine)} came, expected {places}"
        return unpack_rows(mine[place] for place in places), count

    ahead = max(1, min(READ_AHEAD_STEPS, READ_AHEAD_ROWS // math.ceil(batch_size / exchange.size)))
    with closing(own), closing(ReadAhead(load, steps, ahead, exchange.size > 1)) as loaded:
        for _ in steps:
            began = perf_counter()
            rows, num_rows = loaded.next()
            yield GlobalBatch(rows, num_rows, perf_counter() - began)


END_SECONDS = 60.0
"""A process that fails alone waits so long for the others, which go on with the same exchange or have ended."""


class ReadAhead:
    """load(step) for each step in turn, in a thread, at most `ahead` of them before they are asked for.

    together: whether load waits for other processes. What has been begun depends on the number of steps that were taken alone:
    where all processes stop after the same step, all their exchanges come to an end.
    """

    def __init__(self, load: Callable, steps: Sequence[int], ahead: int, together: bool) -> None:
        self._load, self._steps, self._together = load, steps, together
        self._loaded: deque = deque()
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._allowed, self._closed = ahead, False
        # does not keep a process from ending where it waits for one that is gone
        self._thread = threading.Thread(target=self._run, name="rows", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for step in self._steps:
                with self._changed:
                    self._changed.wait_for(lambda: self._allowed > 0 or self._closed)
                    if self._allowed <= 0:
                        return
                    self._allowed -= 1
                loaded = self._load(step)
                with self._changed:
                    self._loaded.append(loaded)
                    self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def next(self) -> tuple:
        """What load gave for the next step; raises what it raised."""
        with self._changed:
            self._changed.wait_for(lambda: self._loaded or self._error)
            if not self._loaded:
                assert self._error is not None
                raise self._error
            self._allowed += 1
            self._changed.notify_all()
            return self._loaded.popleft()

    def close(self) -> None:
        """Begin no other step; those that were allowed are brought to an end where other processes may wait for them."""
        with self._changed:
            self._closed = True
            if not self._together:
                self._allowed = 0
            self._changed.notify_all()
        if self._together:
            self._thread.join(END_SECONDS)
