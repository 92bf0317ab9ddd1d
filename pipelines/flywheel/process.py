"""A stage that runs: its process behind a guard, its cores, its log."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pipelines
from pipelines.flywheel import guard
from pipelines.flywheel.stage import Stage

ROOT = Path(pipelines.__file__).parent.parent
TAIL = 15  # lines of a log that are shown


@dataclass
class Process:
    """One attempt at a stage. folder: what it writes into; cores: those it was given, none for no bound."""

    stage: Stage
    key: str
    command: list[str]
    environment: dict[str, str]
    folder: Path
    log: Path
    cores: list[int]
    began: float = field(default_factory=time.time)
    _process: "subprocess.Popen[bytes] | None" = None
    _alive: int = -1
    _log_start: int = 0

    def start(self, lock: int) -> None:
        """lock: descriptor of the folder's lock, which the guard holds on to for as long as it runs."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        variables = os.environ | {"PYTHONUNBUFFERED": "1"}
        if any(word.split(".")[0] == "pipelines" for word in self.command):  # ours: the packages of this process
            if not any(word.endswith(".py") for word in self.stage.launcher):  # which may have modules beside it
                variables["PYTHONSAFEPATH"] = "1"  # python -m would look in the current folder first
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        if self.cores:
            variables["OMP_NUM_THREADS"] = str(len(self.cores))
        variables |= self.environment
        cores = ",".join(map(str, self.cores)) or "all"
        watch, self._alive = os.pipe()
        words = [sys.executable, "-I", "-S", guard.__file__, str(watch), cores, *self.command]
        try:
            with open(self.log, "ab") as log:
                self._log_start = log.tell()
                log.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {self.stage.name}\n".encode())
                log.flush()
                self._process = subprocess.Popen(
                    words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=variables,
                    pass_fds=(watch, lock), start_new_session=True,
                )  # fmt: skip
        finally:
            os.close(watch)

    def poll(self) -> int | None:
        """Exit code, 128 + N for signal N, None while it runs."""
        assert self._process is not None
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def stop(self) -> None:
        """Ask it to end where it can go on later."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it and all that it has started, now, and wait until that is so."""
        if self._alive >= 0:
            os.close(self._alive)
            self._alive = -1
        if self._process is not None:
            self._process.wait()

    @property
    def seconds(self) -> float:
        return time.time() - self.began

    @property
    def num_cores(self) -> int:
        """Cores that it may use."""
        return len(self.cores or os.sched_getaffinity(0))

    def tail(self) -> list[str]:
        """The last lines of this attempt's log, as a terminal would show them."""
        return log_tail(self.log, TAIL, self._log_start)


def log_tail(log: Path, lines: int, start: int = 0) -> list[str]:
    """The last lines of a log from byte `start` on; of what a progress bar wrote over itself, the last state."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in shown if line][-lines:]
