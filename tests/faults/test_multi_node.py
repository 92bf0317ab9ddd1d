"""Several raylets on this machine, each a node: they die, join and leave while remit score runs."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import score_to, source_texts, write_corpus
from faulty import Faulty
from nodes import Nodes
from processes import Command, committed, content, log_lines

from scorer.config import PackConfig
from scorer.pack import pack

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

SLOW = {"REMIT_FAKE_ENGINE": json.dumps({"seconds": 0.5})}


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
    assert ": attempt " not in run.errors  # it was not the part's fault
    assert (
        "is lost: its node has left the cluster; what it had waits again and counts as no attempt: part-" in run.errors
    )


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


def test_an_engine_that_no_node_can_hold_yet(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """Two nodes of one CPU have two, but an engine lives on one node; a larger one comes."""
    nodes.have(2)
    out = tmp_path / "out"
    arguments = faulty.command("score", out, "--tensor-parallel-size", 2, engines=None)
    run = Command(tmp_path, *arguments, private=True, RAY_ADDRESS=nodes.address)
    run.until(
        lambda: (
            (
                "waiting for a node with 2 CPUs; the cluster has 3 nodes so far, none with more than 1 (--tensor-parallel-size is 2, "
                "and an engine lives on one node)"
            )
            in run.errors
        )
    )
    assert not out.exists()
    nodes.add(cpus=2)
    assert run.finish() == 0, run.errors
    assert "a node with 2 CPUs is there, after " in run.errors
    assert log_lines(out)[-1]["event"] == "done"


@pytest.mark.slow
def test_a_node_is_lost_under_a_real_engine(
    nodes: Nodes, tmp_path: Path, tokenizer_folder: Path, reference_model: Path
) -> None:
    """vLLM on two nodes; one dies in the middle. The values are those of a run that was left alone."""
    corpus, shards, out = write_corpus(tmp_path / "a.jsonl", source_texts(4000)), tmp_path / "packed", tmp_path / "out"
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
