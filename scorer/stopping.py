"""A stage that was asked to stop: what it raises, and when it starts nothing more."""

from collections.abc import Callable
from time import monotonic

from shards.asking import leave, silences, stay


class Stopped(Exception):
    """A stage ended because a signal asked for it; the same command again goes on."""


class StopGuard:
    """Tells a driver loop when to start nothing more, and when to wait no longer."""

    def __init__(self, should_stop: Callable[[], bool], grace_seconds: float) -> None:
        stay()  # of an earlier run in this process
        self._should_stop, self._grace_seconds = should_stop, grace_seconds
        self._deadline: float | None = None

    def requested(self) -> bool:
        """Whether a signal came; from the first True on the grace period runs."""
        if self._deadline is None and self._should_stop():
            self._deadline = monotonic() + self._grace_seconds
        return self._deadline is not None

    def check(self, running: int) -> None:
        """Stopped where a signal came and nothing runs any more, or the grace period is over."""
        if self.requested() and (not running or monotonic() > (self._deadline or 0)):
            if silences():
                leave()  # what is left to be done in the folder would wait for the store
            raise Stopped("stopped by a signal")
