"""The forward that engines are compared with, on nodes that have no memory for it, hang, or go away: real Ray, several raylets."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from nodes import Nodes

from scorer.forward_cost import forward_cost

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
# what the forward does is written in the environment of the node that it comes to
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path

import scorer.forwards
from scorer.cluster import ray_cluster
from scorer.engine import EngineConfig
from scorer.forward_cost import ForwardCost
from scorer.forwards import ForwardTask

folder, gib, seconds = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])

def compute(model, prompts, kept, dtypes, threads):
    does = os.environ.get("REMIT_TEST_NODE", "head")
    Path(model, f"begun-{does}-{time.monotonic_ns()}").touch()
    if does == "raise":
        raise ValueError("the weights are not there")
    time.sleep(1)
    if does.startswith("kill"):
        os.kill(os.getpid(), signal.SIGKILL)
    if does.startswith("hang"):
        time.sleep(600)
    return does

class Cost(ForwardCost):
    memory_bytes = int(gib * 2**30)
    def seconds(self, threads):
        return seconds

scorer.forwards.compute = compute
scorer.forwards.forward_cost = lambda *rest: Cost(0, 0, 0, 1)
notes, answer = [], {}
with ray_cluster():
    task = ForwardTask(EngineConfig(folder, "float32", 8, 9, "", ""), [], (), notes.append)
    try:
        answer["result"] = task.wait(lambda: False)
    except RuntimeError as error:
        answer["error"] = str(error)
print("ANSWER " + json.dumps(answer | {"notes": notes}))
"""


@pytest.fixture
def nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Nodes]:
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")  # this machine may be short of memory for real
    nodes = Nodes(tmp_path / "nodes.log", memory=GIB)
    yield nodes
    nodes.close()


class Forward:
    """A forward that takes so many GiB, and is given up after so many seconds."""

    def __init__(self, nodes: Nodes, folder: Path, gib: float, seconds: float = 600) -> None:
        self.folder = folder
        self.process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, folder, str(gib), str(seconds)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT,
            env=os.environ | {"RAY_ADDRESS": nodes.address, "PYTHONPATH": str(ROOT)},
        )  # fmt: skip

    def begun(self) -> list[str]:
        """Where it began, in this order."""
        found = sorted(self.folder.glob("begun-*"), key=lambda path: int(path.name.rpartition("-")[2]))
        return [path.name.split("-")[1] for path in found]

    def answer(self) -> tuple[str, str, str]:
        """The result, the error, the lines."""
        out, errors = self.process.communicate(timeout=400)
        lines = [line for line in out.splitlines() if line.startswith("ANSWER ")]
        assert lines, errors[-3000:]
        answer = json.loads(lines[0].removeprefix("ANSWER "))
        return answer.get("result", ""), answer.get("error", ""), "\n".join(answer["notes"])


def does(what: str) -> dict[str, str]:
    return {"REMIT_TEST_NODE": what}


def test_memory_is_asked_for_and_nodes_that_lack_it_are_left(nodes: Nodes, tmp_path: Path) -> None:
    """Two GiB are on one node alone, neither on the head nor on the first one. That one is killed: the next."""
    nodes.add(memory=GIB, **does("small"))
    nodes.add(memory=4 * GIB, **does("large"))
    result, error, notes = Forward(nodes, tmp_path, gib=2).answer()
    assert (result, error, "tried" in notes) == ("large", "", False), notes
    nodes.add(memory=9 * GIB, **does("kill"))
    forward = Forward(nodes, tmp_path, gib=5)
    result, error, notes = forward.answer()
    assert (result, error, forward.begun()[1:]) == ("large", "", ["kill", "large"])
    assert "its process was killed, as happens where memory runs out; tried elsewhere" in notes
    assert "takes about 5.0 GiB of memory, and no node has as much for Ray (the most is 4.0 GiB, on " in notes


def test_ray_itself_kills_it(nodes: Nodes, tmp_path: Path) -> None:
    """A raylet that takes its node for full: Ray alone would begin it there again and again."""
    full = {"RAY_memory_usage_threshold": "0.001", "RAY_memory_monitor_refresh_ms": "200"}
    nodes.add(memory=4 * GIB, **does("hang"), **full)
    nodes.add(memory=3 * GIB, **does("good"))
    forward = Forward(nodes, tmp_path, gib=3.5)
    result, error, notes = forward.answer()
    assert (result, error) == ("good", ""), (error, notes)
    assert "Ray killed its process, since the node ran out of memory; tried elsewhere" in notes


@pytest.mark.slow  # the others have its ways of ending but for the lost node and the time
def test_what_ends_it(nodes: Nodes, tmp_path: Path) -> None:
    """Its node goes away, which is no failure; it hangs; it raises; then there were three, and the last one is named."""
    raylet = nodes.add(memory=8 * GIB, **does("hang1"))
    nodes.add(memory=4 * GIB, **does("hang2"))
    forward = Forward(nodes, tmp_path, gib=2, seconds=15)
    while not forward.begun():
        time.sleep(0.1)
        assert forward.process.poll() is None, forward.answer()
    first = forward.begun()[0]
    if first == "hang1":
        nodes.kill(raylet)
    else:  # Ray chose the other one
        nodes.kill(nodes.raylets[1])
    nodes.add(memory=3 * GIB, **does("kill"))
    nodes.add(memory=2 * GIB, **does("raise"))
    result, error, notes = forward.answer()
    assert result == ""
    assert "is lost: its node has left the cluster; it begins again" in notes
    assert notes.count("tried elsewhere") == 2
    assert "it has not ended within 15 s; tried elsewhere" in notes
    assert sorted(forward.begun()) == sorted(["hang1", "hang2", "kill", "raise"])
    assert "that engines are compared with failed: " in error
    assert error.endswith("--no-canary goes on without it")


def test_cost_by_hand(tmp_path: Path) -> None:
    """Numbers of any dtype are four bytes each in float32, and a fifth more; a slow machine has half an hour and its work."""
    safetensors.numpy.save_file({"a": np.zeros((300, 500), np.float16)}, tmp_path / "model-1.safetensors")
    safetensors.numpy.save_file(
        {"b": np.zeros(50_000, np.float32), "c": np.array(1.0)}, tmp_path / "model-2.safetensors"
    )
    cost = forward_cost(tmp_path, 10_000_000, 2)
    assert cost.parameters == 200_001
    assert cost.memory_bytes == -(-200_001 * 48 // 10)
    assert cost.file_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert cost.seconds(4) == pytest.approx(1800 + 2 * (cost.file_bytes / 20e6 + 2 * 200_001 * 1e7 / 20e9))
