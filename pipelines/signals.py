"""SIGTERM and SIGINT: a command that can finish what it is at is asked to, the others leave at once.

The same command again goes on in both cases. A second signal always leaves at once.
"""

import os
import signal
from typing import Any


class SignalReceived(BaseException):
    """A signal arrived; not an Exception, so that nothing on the way swallows it."""


class StopRequest:
    """Handles both signals from `install` on. graceful: the command asks `requested` at safe points."""

    def __init__(self, graceful: bool) -> None:
        self.name: str | None = None
        self._graceful = graceful

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def requested(self) -> bool:
        return self.name is not None

    def _handle(self, number: int, frame: Any) -> None:
        again, self.name = self.requested(), signal.Signals(number).name
        if again or not self._graceful:
            raise SignalReceived(self.name)
        # by write, since the signal may have come in the middle of a print
        os.write(2, f"\n{self.name}: finishing what is in work; a second signal leaves at once\n".encode())
        return
