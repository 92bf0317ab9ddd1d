"""How a scoring run goes: counted here, shown by the command, kept in `_score.jsonl` of the output folder."""

import json
import time
from dataclasses import asdict, dataclass, field
from time import monotonic
from typing import Any

from shards.store import LocalStore, Store

SCORE_LOG = "_score.jsonl"
REMOTE_SECONDS = 60.0


@dataclass
class ScoreProgress:
    """State of a run. tokens and parts count what earlier runs did too; tokens_per_second what this one does.

    engines: that are ready for parts; retries: parts that were tried again; engine_restarts: engines that died.
    read, wait and write seconds: of the parts of this run, summed; wait is the time for the engine.
    """

    tokens: int
    tokens_total: int
    parts: int
    parts_total: int
    engines: int = 0
    retries: int = 0
    engine_restarts: int = 0
    parts_failed: int = 0
    rows_quarantined: int = 0
    tokens_per_second: float = 0.0
    seconds_left: float | None = None
    seconds: float = 0.0
    read_seconds: float = 0.0
    wait_seconds: float = 0.0
    write_seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)


class ScoreLog:
    """Appends one line a second at most to `_score.jsonl`."""

    def __init__(self, out: Store) -> None:
        self._out = out
        self._began = self._written = monotonic()
        self._first_tokens: tuple[float, int] | None = None
        self._lines: list[str] = []
        try:
            self._lines = out.read(SCORE_LOG).decode().splitlines(keepends=True)
        except FileNotFoundError:
            pass

    def update(self, progress: ScoreProgress) -> None:
        """Derive the rates, and write a line when one is due."""
        now = monotonic()
        progress.seconds = now - self._began
        if progress.engines and self._first_tokens is None:
            self._first_tokens = (now, progress.tokens)  # the start of the engines is not their speed
        if self._first_tokens is not None and now > self._first_tokens[0]:
            progress.tokens_per_second = (progress.tokens - self._first_tokens[1]) / (now - self._first_tokens[0])
        if progress.tokens_per_second > 0:
            progress.seconds_left = (progress.tokens_total - progress.tokens) / progress.tokens_per_second
        if now - self._written >= (1.0 if isinstance(self._out, LocalStore) else REMOTE_SECONDS):
            self.write("progress", progress)

    def write(self, event: str, progress: ScoreProgress | dict[str, Any]) -> None:
        """Write a line now. event: engine, progress, done, stopped or failed."""
        self._written = monotonic()
        values = progress if isinstance(progress, dict) else asdict(progress)
        line = json.dumps({"time": time.time(), "event": event, **values}) + "\n"
        if isinstance(self._out, LocalStore):
            with open(self._out.path(SCORE_LOG), "a", encoding="utf-8") as file:
                file.write(line)
        else:  # an object store cannot append
            self._lines.append(line)
            self._out.replace(SCORE_LOG, "".join(self._lines).encode())
