"""Threads that copy beside the training (--mirror), and the wait for them at the end of a command."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue

QUIET_SECONDS = 2.0  # of waiting before a line says so


class Worker:
    """A thread that does one thing after the other beside the training; a process that ends does not wait for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._left, self._changed = 0, threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """work: catches its own errors."""
        with self._changed:
            self._left += 1
        self._queue.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether all is done, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._left, seconds)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            try:
                work()
            finally:
                with self._changed:
                    self._left -= 1
                    self._changed.notify_all()


class Deadline:
    """Waits for workers: as long as it takes, or once the command is to stop for `limit` seconds in all.

    say: told once where it takes a while, with the limit in words.
    """

    def __init__(
        self, workers: tuple[Worker, ...], limit: float, should_stop: Callable[[], bool], say: Callable[[str], None]
    ) -> None:
        self._workers, self._limit, self._should_stop, self._say = workers, limit, should_stop, say
        self._began = time.monotonic()
        self._end: float | None = None
        self._is_said = False

    def wait(self) -> bool:
        """Whether all is done in time."""
        while not all(worker.wait(0.2) for worker in self._workers):
            now = time.monotonic()
            if self._end is None and self._should_stop():
                self._end = now + self._limit
            if self._end is not None and now > self._end:
                return False
            if not self._is_said and now - self._began > QUIET_SECONDS:
                self._is_said = True
                self._say("" if self._end is None else f", for at most {self._limit:g} s")
        return True
