"""The thread that copies beside the training (--mirror)."""

import threading
from collections.abc import Callable


class Worker:
    """A thread that does one job after the other; a process that ends does not wait for it."""

    def __init__(self) -> None:
        self._jobs: dict[str, Callable[[], None]] = {}
        self._busy, self._changed = False, threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, name: str, job: Callable[[], None]) -> bool:
        """Queue a job, which catches its own errors; whether it takes the place of one of this name that had not begun."""
        with self._changed:
            was_waiting = self._jobs.pop(name, None) is not None
            self._jobs[name] = job
            self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="mirror", daemon=True)
                self._thread.start()
        return was_waiting

    def wait(self, seconds: float) -> bool:
        """Whether all is done, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._jobs and not self._busy, seconds)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._jobs)
                job, self._busy = self._jobs.pop(next(iter(self._jobs))), True
            try:
                job()
            finally:
                with self._changed:
                    self._busy = False
                    self._changed.notify_all()
