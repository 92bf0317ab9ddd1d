"""A Ray cluster of several raylets on this machine, each a node that comes, goes, or has something wrong with it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NOTICED_SOON = {
    "RAY_health_check_initial_delay_ms": "0",
    "RAY_health_check_period_ms": "500",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
HOLDER = """
import json, os, sys
from ray.cluster_utils import Cluster


def say(value):
    print("ANSWER " + json.dumps(value), flush=True)

cluster = Cluster()
here = {"object_store_memory": 80 << 20}
memory = json.loads(sys.argv[1])
head = cluster.add_node(num_cpus=0, include_dashboard=False, memory=memory, **here)
say(cluster.address)
for line in sys.stdin:
    number, memory, environment = json.loads(line)
    node = cluster.add_node(num_cpus=number, memory=memory, env_vars=environment, **here)
    say(node.all_processes["raylet"][0].process.pid)
os._exit(0)
"""


class Nodes:
    """A Ray cluster in a process of its own: a head without CPUs, and nodes that come and go."""

    def __init__(self, log: Path, memory: int | None = None) -> None:
        """memory: bytes that Ray may promise on the head."""
        self._log, self._apart = log, list[subprocess.Popen[bytes]]()
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, json.dumps(memory)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
                env=os.environ | NOTICED_SOON,
                start_new_session=True,
            )
        self.raylets: list[int] = []
        self.address = str(self._answer())

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("ANSWER "):
                return json.loads(line.removeprefix("ANSWER "))
        raise AssertionError("the cluster did not start")

    def add(self, cpus: int = 1, memory: int | None = None, **environment: str) -> int:
        """A node more, whose engines have these variables; returns the pid of its raylet. memory: bytes, as of the head."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps([cpus, memory, environment]) + "\n")
        self._process.stdin.flush()
        self.raylets.append(int(self._answer()))
        return self.raylets[-1]

    def add_apart(self, prepare: str, **environment: str) -> subprocess.Popen[bytes]:
        """A node with mounts of its own: `prepare` is what the shell does before it starts. Ends with the cluster."""
        ray = Path(sys.executable).parent / "ray"
        start = f"{ray} start --address={self.address} --num-cpus=1 --object-store-memory={80 << 20} --block"
        log = self._log.with_name(f"apart-{time.monotonic_ns()}")
        with open(log, "w") as file:
            process = subprocess.Popen(
                ["unshare", "-rm", "sh", "-ec", f"{prepare}\nexec {start}"],
                stdout=file, stderr=file, env=os.environ | NOTICED_SOON | environment, start_new_session=True,
            )  # fmt: skip
        self._apart.append(process)
        deadline = time.monotonic() + 240
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
        return process

    def kill(self, pid: int) -> None:
        """End a raylet as a power cut would, as far as one process can tell."""
        os.kill(pid, signal.SIGKILL)
        self.raylets.remove(pid)

    def have(self, count: int) -> None:
        """Start or end nodes until there are `count`."""
        while len(self.raylets) < count:
            self.add()
        while len(self.raylets) > count:
            self.kill(self.raylets[-1])
            time.sleep(4)

    def close(self) -> None:
        """End all that was started here: each has a session of its own."""
        for process in (*self._apart, self._process):
            for pid in session_members(process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait(30)

    def kill_head(self) -> None:
        """End the process that knows of all nodes; they and their engines live on for a while."""
        for pid in session_members(self._process.pid):
            if Path(f"/proc/{pid}/comm").read_text().strip() == "gcs_server":
                os.kill(pid, signal.SIGKILL)


def session_members(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            found.append(int(stat.parent.name))
    return found
