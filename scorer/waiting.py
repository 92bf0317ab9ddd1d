"""Lines about what is being waited for: one when it takes long, one now and then, one when it is over. No clock in it."""

from dataclasses import dataclass

AGAIN_SECONDS = 600.0


@dataclass
class _Wait:
    began: float
    said: float | None = None


class Waits:
    """What a run waits for, each by a key of its own; `update` is told often and mostly has nothing to say."""

    def __init__(self) -> None:
        self._waits: dict[str, _Wait] = {}

    def update(self, now: float, key: str, what: str | None, after: float = 0.0, over: str = "") -> str | None:
        """A line to show, if one is due.

        what: that is waited for now, None where it is not. after: seconds before the first line; what is over sooner
        is not worth one. over: what the line of the end begins with, such as `s3://bucket answers again`.
        """
        wait = self._waits.get(key)
        if what is None:
            self._waits.pop(key, None)
            return f"{over or key}, after {duration(now - wait.began)}" if wait and wait.said is not None else None
        if wait is None:
            wait = self._waits[key] = _Wait(now)
        if wait.said is None and now - wait.began >= after:
            wait.said = now
            return f"waiting for {what}"
        if wait.said is not None and now - wait.said >= AGAIN_SECONDS:
            wait.said = now
            return f"still waiting, for {duration(now - wait.began)}, for {what}"
        return None


def duration(seconds: float) -> str:
    """48 s, 12 min, 3 h 5 min."""
    minutes = round(seconds / 60)
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60} min"


def counted(number: int, what: str) -> str:
    """1 node, 2 nodes."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
