"""Start the process that evaluates a model, on this machine, and end it with the training."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from pipelines.own_packages import ROOT

END_SECONDS = 5.0  # for a process that was told to end
# by torchrun for its own processes; libraries take them for theirs
OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
PREFIXES = ("GROUP_", "ROLE_", "TORCHELASTIC_")


class Running(Protocol):
    """A process that evaluates a model, here or elsewhere."""

    def wait(self, seconds: float) -> int | None:
        """Its exit code, -N for signal N; None where it still runs after so long."""

    def end(self) -> None:
        """Have it end now, and wait for that."""


Launch = Callable[[list[str], Path], Running]
"""Called as launch(words of child.py, log)."""


class Process:
    """pipelines/beside/child.py with its words, beside this process. log: what it writes. gpu: number or id, "" for none, None
    for what this process may use."""

    def __init__(self, words: list[str], log: Path, cwd: str, gpu: str | None) -> None:
        with open(log, "ab") as file:
            # a session of its own: Ctrl-C reaches the training alone, which decides
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipelines.beside.child", *words], stdin=subprocess.PIPE, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True, cwd=cwd, env=environment(gpu),
            )  # fmt: skip
        assert self._process.stdin
        self._stdin = self._process.stdin  # held open: its end tells the process that this one is gone

    def wait(self, seconds: float) -> int | None:
        """Its exit code, -N for signal N; None where it still runs after so long."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        self._stdin.close()
        return code

    def end(self) -> None:
        self._process.terminate()
        if self.wait(END_SECONDS) is None:
            self._process.kill()
            self.wait(END_SECONDS)


def environment(gpu: str | None) -> dict[str, str]:
    """Of the process: our own packages, whatever lies in the current folder, and no word of torchrun's."""
    own = {
        name: value for name, value in os.environ.items() if name not in OF_TORCHRUN and not name.startswith(PREFIXES)
    }
    own |= {"PYTHONUNBUFFERED": "1", "PYTHONSAFEPATH": "1"}
    own["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), own.get("PYTHONPATH")]))
    if "TORCHELASTIC_RUN_ID" in os.environ and own.get("OMP_NUM_THREADS") == "1":
        del own["OMP_NUM_THREADS"]  # torchrun's choice for many processes a machine; this is one
    if gpu is not None:
        own["CUDA_VISIBLE_DEVICES"] = gpu
    return own


def free_gpu(asked: str, devices: int, trained: int, visible: str | None) -> str:
    """For CUDA_VISIBLE_DEVICES of the evaluation: a GPU of this machine, "" for none. ValueError where there is no such GPU.

    asked: --eval-device; devices: GPUs that torch sees; trained: the first so many of them train; visible: this process' own
    CUDA_VISIBLE_DEVICES.
    """
    if asked == "cpu" or (asked == "auto" and devices <= trained):
        return ""
    number = int(asked.partition(":")[2]) if ":" in asked else devices - 1
    if number not in range(devices):
        raise ValueError(
            f"--eval-device is {asked}, and torch sees {devices} GPUs here, expected one of them; or give cpu"
        )
    if asked == "cuda" and devices <= trained:
        raise ValueError(
            f"--eval-device is cuda, and all {devices} GPUs that torch sees here train; train on fewer, give cuda:N to share one, "
            "or cpu"
        )
    return visible.split(",")[number].strip() if visible else str(number)


def last_words(log: Path, code: int) -> str:
    """Why a process failed, in one line."""
    lines = [line.strip() for line in _text(log).splitlines() if line.strip()]
    said = [line.partition("error: ")[2] for line in lines if line.startswith("remit eval: error: ")]
    if said:
        return said[-1]
    if code == -9:
        return "it was killed by signal 9, as a machine without free memory does; a smaller batch_size needs less"
    if code < 0:
        return f"it was killed by signal {-code}"
    return lines[-1] if lines else f"exit code {code}"


def _text(log: Path) -> str:
    try:
        return log.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
