"""Several raylets on this machine, each a node: they die, join and leave while remit score runs."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import score_to, source_texts, write_corpus
from faulty import Faulty
from processes import Command, committed, content, log_lines

from scorer.config import PackConfig
from scorer.pack import pack

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

SLOW = {"REMIT_FAKE_ENGINE": json.dumps({"seconds": 0.5})}
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
head = cluster.add_node(num_cpus=0, include_dashboard=False, **here)
say(cluster.address)
for line in sys.stdin:
    verb, _, number = line.strip().partition(" ")
    if verb == "add":
        node = cluster.add_node(num_cpus=int(number), **here)
        say(node.all_processes["raylet"][0].process.pid)
os._exit(0)
"""


class Nodes:
    """A Ray cluster in a process of its own: a head without CPUs, and nodes that come and go."""

    def __init__(self, log: Path) -> None:
        with open(log, "w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-c", HOLDER],
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

    def add(self, cpus: int = 1) -> int:
        """A node more; returns the pid of its raylet."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"add {cpus}\n")
        self._process.stdin.flush()
        self.raylets.append(int(self._answer()))
        return self.raylets[-1]

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
        """End all that was started here: it has a session of its own."""
        for pid in session_members(self._process.pid):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self._process.wait(30)


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


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path_factory.mktemp("nodes") / "log")
    yield nodes
    nodes.close()


def states(out: Path) -> list[dict]:
    """What the run has said of itself."""
    if not (out / "_score.jsonl").exists():
        return []
    return [line for line in log_lines(out) if "engines" in line]


def engines(out: Path) -> list[int]:
    return [state["engines"] for state in states(out)]


def start(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> tuple[Command, Path]:
    out = tmp_path / "out"
    return Command(
        tmp_path, *faulty.command("score", out, engines=None), private=True, RAY_ADDRESS=nodes.address, **SLOW
    ), out


def finish(run: Command, out: Path, faulty: Faulty) -> dict:
    """The last state of a run that must end with the bytes of an undisturbed one."""
    assert run.finish() == 0, run.errors
    assert "Traceback" not in run.errors
    assert content(out) == faulty.undisturbed("score")
    return states(out)[-1]


def test_a_node_joins(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    nodes.have(1)
    run, out = start(nodes, tmp_path, faulty)
    run.until(lambda: committed(out))
    assert set(engines(out)) <= {0, 1}
    nodes.add()
    run.until(lambda: 2 in engines(out))
    last = finish(run, out, faulty)
    assert (last["retries"], last["engine_restarts"], last["parts_failed"]) == (0, 0, 0)


def test_a_node_is_lost(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """Its part is tried again on the engine that is left."""
    nodes.have(2)
    run, out = start(nodes, tmp_path, faulty)
    run.until(lambda: engines(out)[-1:] == [2] and len(committed(out)) >= 2)
    nodes.kill(nodes.raylets[0])
    last = finish(run, out, faulty)
    assert last["retries"] >= 1
    assert last["engine_restarts"] >= 1
    assert last["parts_failed"] == 0
    assert "attempt 1 failed" in run.errors


def test_the_only_node_leaves_and_another_comes(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    nodes.have(1)
    run, out = start(nodes, tmp_path, faulty)
    run.until(lambda: len(committed(out)) >= 2)
    nodes.kill(nodes.raylets[0])
    run.until(lambda: states(out)[-1]["engine_restarts"] == 1)
    run.until(lambda: engines(out)[-1] == 0)
    time.sleep(2)
    assert run.process.is_alive(), run.errors
    nodes.add()
    last = finish(run, out, faulty)
    assert last["parts_failed"] == 0
    assert 0 in engines(out)[engines(out).index(1) :]


def test_an_engine_that_no_node_can_hold(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """Two nodes of one CPU have two, but an engine lives on one node."""
    nodes.have(2)
    arguments = faulty.command("score", tmp_path / "out", "--tensor-parallel-size", 2, engines=None)
    run = Command(tmp_path, *arguments, private=True, RAY_ADDRESS=nodes.address)
    assert run.finish() == 1
    assert run.last_error == (
        "remit score: error: --tensor-parallel-size is 2, but no node of the cluster has more than 1 CPUs, and an engine "
        "lives on one node; lower it"
    )
    assert "Traceback" not in run.errors
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_node_is_lost_under_a_real_engine(
    nodes: Nodes, tmp_path: Path, tokenizer_folder: Path, reference_model: Path
) -> None:
    """vLLM on two nodes; one dies in the middle. The values are those of a run that was left alone."""
    corpus, shards, out = write_corpus(tmp_path / "a.jsonl", source_texts(1500)), tmp_path / "packed", tmp_path / "out"
    pack(PackConfig([str(corpus)], str(tokenizer_folder), str(shards), seq_len=64, tokens_per_shard=64 * 100))
    alone = score_to(tmp_path / "alone", shards, reference_model).path
    nodes.have(2)
    arguments = ["score", "--shards", shards, "--model", reference_model, "--out", out, "--dtype", "float32"]
    arguments += ["--max-num-batched-tokens", 64]
    run = Command(tmp_path, *arguments, private=True, RAY_ADDRESS=nodes.address)
    run.until(lambda: engines(out)[-1:] == [2] and committed(out), 300)
    nodes.kill(nodes.raylets[0])
    assert run.finish() == 0, run.errors
    last = states(out)[-1]
    assert (last["engine_restarts"] >= 1, last["retries"] >= 1, last["parts_failed"]) == (True, True, 0), last
    assert content(out) == content(Path(alone))
