"""How a scoring run goes: counted here, shown by the command, kept in `_score.jsonl` of the output folder."""

import errno
import json
import os
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from time import monotonic
from typing import Any

from shards.store import LocalStore, Store

SCORE_LOG = "_score.jsonl"
REMOTE_SECONDS = 60.0  # between two writes; an object store takes the whole log each time
LOCAL_SECONDS, LOCAL_AGAIN_SECONDS = 0.1, 5.0
CLOSING_SECONDS = 10.0  # for what is still to be written at the end


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


class ScoreLog:
    """Appends to `_score.jsonl`: a line a second at most of how the run goes, one for each event.

    A thread writes, since a disk may be full and a store or filesystem away while the run goes on: what cannot be written
    now is written later, and a run never ends for it. note: told when that begins and when it is over.
    """

    def __init__(self, out: Store, note: Callable[[str], None] = lambda line: None) -> None:
        self._out, self._note = out, note
        self._local = isinstance(out, LocalStore)
        self._began = self._written = monotonic()
        self._first_tokens: tuple[float, int] | None = None
        self._lock = threading.Lock()
        self._lines: list[str] = []
        self._tasks: list[Callable[[], None]] = []
        self._earlier: str | None = None  # all lines so far, of a store that cannot append
        self._failing = False
        self._closed = threading.Event()
        self._thread: threading.Thread | None = None

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
        if now - self._written >= (1.0 if self._local else REMOTE_SECONDS):
            self._written = now
            if not self._failing:  # they would only pile up
                self.write("progress", progress)

    def write(self, event: str, values: ScoreProgress | dict[str, Any]) -> None:
        """Have a line written. event: progress, done, stopped, failed, or what the driver tells of."""
        values = values if isinstance(values, dict) else asdict(values)
        line = json.dumps({"time": time.time(), "event": event, **values}) + "\n"
        self._begin()
        with self._lock:
            self._lines.append(line)

    def also(self, task: Callable[[], None]) -> None:
        """Have something else written into the folder, tried until it is."""
        self._begin()
        with self._lock:
            self._tasks.append(task)

    def close(self) -> None:
        """Write what is left, as far as that is possible now."""
        self._closed.set()
        if self._thread:
            self._thread.join(CLOSING_SECONDS)

    def _begin(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="score log", daemon=True)
            self._thread.start()

    def _run(self) -> None:
        closed = False
        while not closed:
            again = LOCAL_AGAIN_SECONDS if self._failing else LOCAL_SECONDS
            closed = self._closed.wait(again if self._local else REMOTE_SECONDS)
            try:
                self._flush()
            except Exception as error:
                if not self._failing and not closed:
                    self._note(f"{self._out.where(SCORE_LOG)}: cannot be written now ({error}); the run goes on")
                self._failing = True
            else:
                if self._failing and not closed:
                    self._note(f"{self._out.where(SCORE_LOG)}: is written again, no event is missing in it")
                self._failing = False

    def _flush(self) -> None:
        with self._lock:
            lines, tasks = list(self._lines), list(self._tasks)
        if lines:
            self._append("".join(lines))
            with self._lock:
                del self._lines[: len(lines)]
        for task in tasks:
            task()
            with self._lock:
                self._tasks.remove(task)

    def _append(self, lines: str) -> None:
        if isinstance(self._out, LocalStore):
            data = lines.encode()
            with open(self._out.path(SCORE_LOG), "ab", buffering=0) as file:
                end = file.tell()
                if file.write(data) != len(data):
                    file.truncate(end)  # half a line, and the whole one behind it later, would be no JSON
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return
        if self._earlier is None:
            try:
                self._earlier = self._out.read(SCORE_LOG).decode()
            except FileNotFoundError:
                self._earlier = ""
        self._out.replace(SCORE_LOG, (self._earlier + lines).encode())
        self._earlier += lines


def engine_line(facts: dict[str, Any]) -> str:
    """What the first engine says of itself, and how it compares with transformers, for the output; the log has the facts."""
    texts = [facts["engine"]]
    if "dtype" in facts:
        texts.append(facts["dtype"] + (f" (logits {facts['head_dtype']})" if "head_dtype" in facts else ""))
    if "max_num_batched_tokens" in facts:
        texts.append(f"{facts['max_num_batched_tokens']:,} tokens per step")
    if "logprob_kernel" in facts:
        texts.append(f"logprob_kernel {facts['logprob_kernel']}")
    texts += [f"{count:g} {kind} each" for kind, count in facts["resources"].items()]
    if facts.get("device_name", "cpu") != "cpu":
        texts.append(facts["device_name"])
    canary = facts["canary"]
    if "mean" in canary:
        texts.append(
            f"compared with transformers over {canary['tokens']:,.0f} tokens: mean |difference| {canary['mean']:.2g} nat, "
            f"largest {canary['max']:.2g}"
        )
    return f"engines run: {', '.join(texts)}"
