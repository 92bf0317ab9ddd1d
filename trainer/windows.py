"""The rows of the blocks that belong to this process, from when their block is read until they are taken.

The blocks of each window of the order (trainer/order.py) are dealt to the processes, whoever trains their rows, so that all
together read each block once an epoch. The next window is read at the pace at which this one is used up: memory stays that of
one window, and nobody waits where one ends. What exceeds the memory allowed waits in a temporary file.
"""

import math
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import IO

import numpy as np

from trainer.mix import MixedOrder
from trainer.order import RowOrder

MEMORY_BYTES = 128 * 2**20
"""Of packed rows that wait; of a window of 268M tokens a process alone spills six sevenths, eight spill nothing."""
THREADS = 4
EARLY = 1.1  # the next window is read this much faster than the present one is used up

Held = bytes | tuple[int, int]
"""A packed row, or its place and length in the temporary file of its window."""


class Shelf:
    """Memory for packed rows that all windows share. Used by several threads."""

    def __init__(self, memory_bytes: int = MEMORY_BYTES) -> None:
        self._free, self._lock = memory_bytes, threading.Lock()

    def reserve(self, size: int) -> bool:
        """Whether so many bytes may be held in memory; counts them."""
        with self._lock:
            fits = size <= self._free
            self._free -= size if fits else 0
        return fits

    def release(self, size: int) -> None:
        with self._lock:
            self._free += size


class Window:
    """This process's rows of one window of a source.

    first: the position of its first row in the source. needed: of its rows, bool [W]. read: reads and packs a block, and takes
    its rows that are needed.
    """

    def __init__(
        self, first: int, rows: np.ndarray, needed: np.ndarray, read: Callable[[int], list[bytes]], shelf: Shelf
    ) -> None:
        self.first, self.length = first, len(rows)
        self._rows, self._needed, self._read, self._shelf = rows, needed, read, shelf
        places = np.flatnonzero(needed)
        by_block: dict[int, list[int]] = {}
        for block, place in zip(rows[places, 0].tolist(), places.tolist()):
            by_block.setdefault(block, []).append(place)
        self._places = by_block  # in the order in which blocks are needed first
        self._waiting = list(by_block)
        self._futures: dict[int, Future[None]] = {}
        self._held: dict[int, Held] = {}
        self._file: IO[bytes] | None = None
        self._lock = threading.Lock()
        self.num_blocks = len(by_block)

    def read_ahead(self, count: int, pool: ThreadPoolExecutor, in_corpus_order: bool) -> None:
        """See to it that `count` of the blocks are read or about to be."""
        if in_corpus_order and len(self._waiting) == self.num_blocks:
            self._waiting.sort()  # a part that has several of them is opened once
        while self.num_blocks - len(self._waiting) < count and self._waiting:
            block = self._waiting.pop(0)
            self._futures[block] = pool.submit(self._load, block)

    def _load(self, block: int) -> None:
        packed = self._read(block)
        for place in self._places[block]:
            data = packed[int(self._rows[place, 1])]
            held: Held = data
            if not self._shelf.reserve(len(data)):
                with self._lock:
                    self._file = self._file or tempfile.TemporaryFile(prefix="remit-rows-")  # noqa: SIM115  # see close
                    held = (self._file.seek(0, 2), len(data))
                    self._file.write(data)
            self._held[place] = held

    def has(self, place: int) -> bool:
        return bool(self._needed[place])

    def take(self, place: int) -> bytes:
        """The row at a place of the window, once; raises what reading its block raised."""
        self._futures[int(self._rows[place, 0])].result()
        held = self._held.pop(place)
        if isinstance(held, bytes):
            self._shelf.release(len(held))
            return held
        assert self._file is not None
        with self._lock:
            self._file.seek(held[0])
            return self._file.read(held[1])

    def close(self) -> None:
        """Let go of what was not taken."""
        for future in self._futures.values():
            future.cancel()
        if self._file:
            self._file.close()


class OwnRows:
    """The rows at positions first .. last - 1 of an order that come from blocks of this process, to be taken in order.

    read: the packed rows of a block, by its number; called in threads. last: None for no end. owner, owners: of the blocks
    that one of so many processes owns. reader, readers: only rows at positions reader, reader + readers, ... are held. left_out:
    first and last + 1 of positions that are never taken, whose rows are not read.
    """

    def __init__(
        self,
        order: MixedOrder,
        read: Callable[[int], list[bytes]],
        first: int,
        last: int | None,
        owner: int = 0,
        owners: int = 1,
        reader: int = 0,
        readers: int = 1,
        memory_bytes: int = MEMORY_BYTES,
        left_out: Sequence[tuple[int, int]] = (),
    ) -> None:
        self._order, self._read, self._owner, self._owners = order, read, owner, owners
        self._reader, self._readers, self._shelf = reader, readers, Shelf(memory_bytes)
        self._first = order.counts(first)  # of each source, what trained before
        self._last = None if last is None else order.counts(last)
        # positions that follow each other are as many places of each source that follow each other
        self._left_out = [(order.counts(begin), order.counts(end)) for begin, end in left_out]
        self._windows: list[OrderedDict[tuple[int, int], Window]] = [OrderedDict() for _ in order.orders]
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="blocks")

    def close(self) -> None:
        """End the threads; blocks in work are read to their end."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for windows in self._windows:
            for window in windows.values():
                window.close()

    def take(self, start: int, count: int) -> tuple[list[int], list[bytes]]:
        """Of positions start .. start + count - 1 those whose rows are here, counted from start, and the rows, packed."""
        source, place = self._order.split(start, count)
        found: dict[int, bytes] = {}
        for number in np.unique(source).tolist():
            mine = np.flatnonzero(source == number)
            for index, position in zip(mine.tolist(), place[mine].tolist()):
                window = self._window_at(number, position)
                if window.has(position - window.first):
                    found[index] = window.take(position - window.first)
        return sorted(found), [found[index] for index in sorted(found)]

    def _window_at(self, number: int, position: int) -> Window:
        """The window of a source that has this position, with what may be read ahead by now on its way."""
        windows, order = self._windows[number], self._order.orders[number]
        present = next(iter(windows.values()), None)
        while present is not None and position >= present.first + present.length:
            windows.popitem(last=False)[1].close()
            present = next(iter(windows.values()), None)
        if present is None:
            present = self._open(number, order.window_of(position))
        # all that is not on its way yet: steps that are left out may have ended the window before early
        present.read_ahead(present.num_blocks, self._pool, in_corpus_order=False)
        used = (position + 1 - present.first) / present.length
        epoch, window = next(iter(windows))
        following = (epoch, window + 1) if window + 1 < order.num_windows else (epoch + 1, 0)
        ahead = windows.get(following) or self._open(number, following)
        ahead.read_ahead(math.ceil(ahead.num_blocks * min(1.0, used * EARLY)), self._pool, in_corpus_order=True)
        return present

    def _open(self, number: int, key: tuple[int, int]) -> Window:
        order: RowOrder = self._order.orders[number]
        first, rows = order.window(*key)
        positions = first + np.arange(len(rows))
        needed = positions >= self._first[number]
        if self._last is not None:
            needed &= positions < self._last[number]
        for begin, end in self._left_out:
            needed &= (positions < begin[number]) | (positions >= end[number])
        if self._owners > 1:
            blocks = order.blocks(*key)
            # whoever has one more than the others changes from window to window
            own = blocks[(np.arange(len(blocks)) + sum(key)) % self._owners == self._owner]
            needed &= np.isin(rows[:, 0], own)
        if self._readers > 1:
            trains_at = self._order.positions(number, positions[needed])
            needed[needed] = (trains_at >= 0) & (trains_at % self._readers == self._reader)
        offset = int(self._order.first_blocks[number])
        opened = Window(first, rows, needed, lambda block: self._read(offset + block), self._shelf)
        self._windows[number][key] = opened
        return opened
