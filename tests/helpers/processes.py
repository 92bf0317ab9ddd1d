"""remit commands as processes that can be killed: forked from a server that has imported everything already.

They join the Ray of the test session, or with private=True start their own as on a machine without a cluster.
"""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import outside
import pyarrow as pa
import ray

MODULES = [
    "scorer.score", "scorer.pack", "trainer.train", "pipelines.cli", "pipelines.commands.score", "pipelines.commands.train", "datasets", "transformers",
    "torch", "transformers.models.llama.modeling_llama", "transformers.models.olmo2.modeling_olmo2",
]  # fmt: skip
FORKS: Any = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Ray reads RAY_AUTH_MODE when it is imported, so the server needs it from the beginning."""
    from multiprocessing import forkserver

    before = os.environ.get("RAY_AUTH_MODE")
    if (Path.home() / ".ray" / "auth_token").exists():
        os.environ.setdefault("RAY_AUTH_MODE", "token")
    try:
        FORKS.set_forkserver_preload(MODULES)
        forkserver.ensure_running()
    finally:
        if before is None:
            os.environ.pop("RAY_AUTH_MODE", None)


def _main(arguments: list[str], environment: dict[str, str], output: Path, first: str) -> None:
    os.setsid()
    for number, suffix in ((1, "out"), (2, "err")):
        os.dup2(os.open(output.with_suffix(f".{suffix}"), os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), number)
    for name in [name for name in os.environ if name.startswith("REMIT_") and name != "REMIT_CACHE"]:
        del os.environ[name]
    os.environ.update(environment)
    if "OMP_NUM_THREADS" in environment:  # torch has read its own long ago
        import torch

        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = ["remit", *arguments]
    exec(first, {})
    from pipelines.cli import main

    main(arguments)


class Command:
    """A running remit command. first: Python code that runs in its process before."""

    def __init__(
        self, folder: Path, *arguments: object, private: bool = False, first: str = "", **environment: str
    ) -> None:
        outside.require_allowed("a remit command")
        start_server()
        self.output = folder / f"command-{time.monotonic_ns()}"
        if not private:
            environment["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        words = [str(argument) for argument in arguments]
        self.process = FORKS.Process(target=_main, args=(words, environment, self.output, first))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def errors(self) -> str:
        file = self.output.with_suffix(".err")  # which it makes as it starts
        return file.read_text().replace("\r", "\n") if file.exists() else ""

    @property
    def last_error(self) -> str:
        return self.errors.strip().splitlines()[-1]

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def finish(self, seconds: float = 600) -> int:
        """Exit code, negative for a signal."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            os.killpg(self.pid, signal.SIGKILL)
            self.process.join()
            raise AssertionError(f"does not end: {self.errors}")
        return self.process.exitcode

    def until(self, condition: Callable[[], object], seconds: float = 300) -> None:
        """Wait for the condition; the command must not end before."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.process.is_alive(), self.errors
            assert time.monotonic() < deadline, self.errors
            time.sleep(0.01)


class Ranks:
    """A remit train on several ranks without a launcher: each is a `Command` with the variables that torchrun sets.

    machines: the ranks are spread over so many, as far as they can tell. first: as of a Command. What is asked of it is what
    a subprocess.Popen of torchrun is asked.
    """

    def __init__(self, folder: Path, arguments: list[object], ranks: int, machines: int = 1, first: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        local = ranks // machines
        everyones = {
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(local), "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        self._commands = [
            Command(
                folder, *arguments, private=True, first=first, RANK=str(rank), LOCAL_RANK=str(rank % local), **everyones
            )
            for rank in range(ranks)
        ]

    def poll(self) -> int | None:
        """None while all that have ended have ended well and some have not; else the first bad exit code, or 0."""
        codes = [command.process.exitcode for command in self._commands]
        return next((code for code in codes if code), None if None in codes else 0)

    returncode = property(poll)

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """Wait for the end; where a rank fails the others are ended. What all have written."""
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                self.kill()
                raise AssertionError(f"does not end: {self._output()}")
            time.sleep(0.01)
        self.kill()
        return self._output(), None

    def kill(self) -> None:
        """kill -9 of the ranks that are left."""
        for command in self._commands:
            command.process.kill()
        for command in self._commands:
            command.process.join()

    def _output(self) -> str:
        files = [command.output.with_suffix(suffix) for command in self._commands for suffix in (".out", ".err")]
        return "\n".join(file.read_text() for file in files if file.exists())


def content(folder: Path) -> dict[str, bytes]:
    """What a finished folder holds, and that nothing else is left."""
    assert [str(path) for path in folder.rglob("*.tmp")] == []
    assert not (folder / "_lease").exists()
    assert not (folder.parent / f".{folder.name}.staging").exists()
    assert list((folder / "_quarantine" / "failed").glob("*")) == []
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "_score.jsonl"]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def committed(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "_commits").glob("part-*.json"))


def log_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "_score.jsonl").read_text().splitlines()]


def part_rows(folder: Path, part: int) -> list[dict]:
    return pa.ipc.open_file(folder / f"part-{part:05d}.arrow").read_all().to_pylist()


def token_of_one_row(folder: Path, parts: range, length: int = 40) -> tuple[int, int, int]:
    """A token that only one row of the folder has, its part (one of `parts`) and the row's place in it."""
    where: dict[int, list[tuple[int, int, int]]] = defaultdict(list)
    for part in range(len(list(folder.glob("part-*.arrow")))):
        for place, row in enumerate(part_rows(folder, part)):
            for token in np.unique(row["input_ids"]).tolist():
                where[token].append((part, place, len(row["input_ids"])))
    for token, rows in sorted(where.items()):
        if len(rows) == 1 and rows[0][0] in parts and rows[0][2] >= length:
            return token, rows[0][0], rows[0][1]
    raise AssertionError("no token is in one row only")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
