"""Nodes of a real cluster that cannot be worked on: each costs itself, and neither the run nor a part."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty import Faulty
from nodes import Nodes
from processes import Command, committed, content, log_lines, token_of_one_row
from s3_server import BUCKET, REGION, S3Server

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
needs_mounts = pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace")


def faults(**settings: object) -> dict[str, str]:
    """Of all engines."""
    return {"REMIT_FAKE_ENGINE": json.dumps({"seconds": 0.3} | settings)}


def own(**settings: object) -> dict[str, str]:
    """Of the engines of one node."""
    return {"REMIT_FAKE_NODE": json.dumps(settings)}


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    nodes = Nodes(tmp_path / "nodes.log")
    yield nodes
    nodes.close()


def start(nodes: Nodes, folder: Path, faulty: Faulty, *more: object, **environment: str) -> tuple[Command, Path]:
    out = folder / "out"
    arguments = faulty.command("score", out, *more, engines=None)
    return Command(folder, *arguments, private=True, RAY_ADDRESS=nodes.address, **(faults() | environment)), out


def events(out: Path, kind: str) -> list[dict]:
    if not (out / "_score.jsonl").exists():
        return []
    return [line for line in log_lines(out) if line["event"] == kind]


def complete(run: Command, out: Path, faulty: Faulty) -> None:
    """The run is what it would have been with good nodes alone."""
    assert run.finish() == 0, run.errors
    assert "Traceback" not in run.errors
    assert "given up" not in run.errors
    assert content(out) == faulty.undisturbed("score")
    assert events(out, "done")[-1]["parts_failed"] == 0
    for line in events(out, "engine_lost"):  # where and why stands in the output as in the log
        assert line["line"] in run.errors
    assert ": attempt " not in run.errors


def test_nodes_that_are_lost_while_engines_load(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """Three, one after the other, beside an engine at work."""
    nodes.add()
    run, out = start(nodes, tmp_path, faulty, **faults(seconds=1))
    run.until(lambda: committed(out))
    for count in (1, 2, 3):
        raylet = nodes.add(**own(start=600))
        run.until(lambda count=count: len(events(out, "node_joined")) == count)
        time.sleep(3)  # its engine is placed and loads
        nodes.kill(raylet)
        run.until(lambda count=count: len(events(out, "node_left")) == count)
    complete(run, out, faulty)
    assert "its node has left the cluster" in run.errors
    assert all(line["fault"] == "nobody's" for line in events(out, "engine_lost"))


def test_an_engine_that_never_starts_and_one_that_computes_wrongly(
    nodes: Nodes, tmp_path: Path, faulty: Faulty
) -> None:
    nodes.add()
    nodes.add(**own(start="raise"))
    nodes.add(**own(wrong=True))
    run, out = start(nodes, tmp_path, faulty, **faults(seconds=1, canary=True))
    complete(run, out, faulty)
    lost = [line["line"] for line in events(out, "engine_lost")]
    (wrong,) = [line for line in lost if "log-probs are not the model's" in line]
    assert "gets no engine any more in this run: look at its device" in wrong
    unstarted = [line for line in lost if "was told not to start" in line]
    assert len(unstarted) == 2
    assert "2 failures in a row, so " in unstarted[1]
    assert "is left alone until " in unstarted[1]


@needs_mounts
def test_a_node_whose_mount_is_dead(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """From the beginning on one, in the middle of its work on another."""
    nodes.add()
    nodes.add_apart(f"mount -t tmpfs none {faulty.packed}")
    gone = tmp_path / "gone"
    script = f"(until test -e {gone}; do sleep 0.1; done; mount -t tmpfs none {faulty.packed}; rm {gone}) &"
    nodes.add_apart(script)
    run, out = start(nodes, tmp_path, faulty, **faults(seconds=0.7))
    run.until(lambda: len(events(out, "engine_ready")) >= 2)
    gone.touch()
    complete(run, out, faulty)
    reasons = {(line["node"], line["line"]) for line in events(out, "engine_lost")}
    assert {node for node, _ in reasons}
    assert all(f"NodeUnfit: the node cannot read {faulty.packed}: " in line for _, line in reasons)
    assert not gone.exists()


def s3(server: S3Server) -> dict[str, str]:
    return {
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip


@pytest.fixture
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@needs_mounts
def test_nodes_without_credentials_and_without_room_for_temporary_files(
    nodes: Nodes, tmp_path: Path, faulty: Faulty, server: S3Server
) -> None:
    keys = s3(server)
    nodes.add(**keys)
    nodes.add(AWS_ENDPOINT_URL=server.endpoint, AWS_EC2_METADATA_DISABLED="true")
    small = tmp_path / "small"
    small.mkdir()
    nodes.add_apart(f"mount -t tmpfs -o size=4k tmpfs {small}", TMPDIR=str(small), RAY_TMPDIR="/tmp", **keys)
    out = f"s3://{BUCKET}/out"
    words = [
        out if word == tmp_path / "out" else word for word in faulty.command("score", tmp_path / "out", engines=None)
    ]
    run = Command(tmp_path, *words, private=True, RAY_ADDRESS=nodes.address, **faults(seconds=1), **keys)
    assert run.finish() == 0, run.errors
    files = {name: data for name, data in server.files("out").items() if name != "_score.jsonl"}
    assert files == faulty.undisturbed("score")
    assert ": attempt " not in run.errors
    lost = [json.loads(line) for line in server.get("out/_score.jsonl").splitlines()]
    lines = [line["line"] for line in lost if line["event"] == "engine_lost"]
    unauthorised = [line for line in lines if "Unable to locate credentials" in line]
    full = [line for line in lines if "No space left on device" in line]
    assert len(unauthorised) == 2
    assert "is left alone until" in unauthorised[-1]
    assert full
    assert all(str(small) in line for line in full)
    assert len(unauthorised) + len(full) == len(lines)


def test_the_sample_of_a_threshold_comes_from_a_good_engine(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """The first node computes wrongly, the second hangs in the middle of the sample: the run is one without them."""
    options = ("--top-k", 3, "--entropy", "--top-k-below-entropy", "quantile:0.3")
    sound = Command(tmp_path, *faulty.command("score", tmp_path / "sound", *options))
    assert sound.finish() == 0, sound.errors
    token, _, _ = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    nodes.add(**own(wrong=True))
    options += ("--progress-timeout-seconds", 5)
    run, out = start(nodes, tmp_path, faulty, *options, **faults(seconds=0, canary=True))
    run.until(lambda: "gets no engine any more in this run" in run.errors)
    nodes.add(**own(hang=[token]))
    run.until(lambda: "no progress for" in run.errors)
    assert not out.exists()
    nodes.add()
    assert run.finish() == 0, run.errors
    assert content(out) == content(tmp_path / "sound")
    lines = [
        line for line in run.errors.splitlines() if "log-probs are not the model's" in line or "no progress for" in line
    ]
    assert "for the estimate: engine 1 on " in lines[0]
    assert "for the estimate: engine 2 on " in lines[1]


@pytest.mark.slow
def test_thirty_nodes_are_taken_away_in_a_row(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """Each in the middle of a part, which is none of its attempts."""
    run, out = start(nodes, tmp_path, faulty, **faults(seconds=600))  # engines go on for a while without their raylet
    for count in range(1, 31):
        raylet = nodes.add()
        run.until(lambda count=count: len(events(out, "engine_ready")) == count)
        time.sleep(1)
        nodes.kill(raylet)
        run.until(lambda count=count: len(events(out, "node_left")) == count)
    assert len(events(out, "engine_lost")) == 30
    assert "given up" not in run.errors
    assert ": attempt " not in run.errors
    run.signal(signal.SIGTERM)
    assert run.finish() == 3
    again, _ = start(nodes, tmp_path, faulty)
    nodes.add()
    assert again.finish() == 0, again.errors
    assert content(out) == faulty.undisturbed("score")


def test_a_cluster_that_is_empty_at_first(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    """pack waits and ends at once on a signal; score waits, nodes come, it goes on."""
    run = Command(tmp_path, *faulty.command("pack", tmp_path / "packed"), private=True, RAY_ADDRESS=nodes.address)
    waiting = "waiting for a node with a CPU; the cluster has 1 node so far, none with one"
    run.until(lambda: waiting in run.errors)
    run.signal(signal.SIGTERM)
    began = time.monotonic()
    assert run.finish() == 3
    assert time.monotonic() - began < 30
    run, out = start(nodes, tmp_path, faulty)
    run.until(lambda: waiting in run.errors)
    time.sleep(5)
    nodes.add()
    nodes.add()
    complete(run, out, faulty)
    assert "a node with a CPU is there, after " in run.errors


def test_the_head_of_the_cluster_dies(nodes: Nodes, tmp_path: Path, faulty: Faulty) -> None:
    nodes.add()
    run, out = start(nodes, tmp_path, faulty, **faults(seconds=4), RAY_gcs_rpc_server_reconnect_timeout_s="20")
    run.until(lambda: events(out, "engine_ready"))
    nodes.kill_head()
    began = time.monotonic()
    assert run.finish() == 1, run.errors
    assert time.monotonic() - began < 60
    assert f"the head of the Ray cluster, {nodes.address}, does not answer" in run.errors
    assert run.last_error == (
        f"remit score: error: Ray failed: RayGone: the head of the cluster, {nodes.address}, has not answered for 12 s; start it "
        "again; the same command again goes on"
    )
    assert log_lines(out)[-1]["event"] == "failed"
    again = Command(tmp_path, *faulty.command("score", out, engines=None))
    assert again.finish() == 0, again.errors
    assert content(out) == faulty.undisturbed("score")


def test_a_signal_while_the_store_is_away(nodes: Nodes, tmp_path: Path, faulty: Faulty, server: S3Server) -> None:
    keys = s3(server)
    nodes.add(**keys)
    words = [
        f"s3://{BUCKET}/out" if word == tmp_path / "out" else word
        for word in faulty.command("score", tmp_path / "out", engines=None)
    ]
    arguments = [*words, "--grace-seconds", 3]
    run = Command(tmp_path, *arguments, private=True, RAY_ADDRESS=nodes.address, **faults(seconds=1), **keys)
    run.until(lambda: server.keys("out/_commits/"))
    server.tell("stop")
    run.until(lambda: f"s3://{BUCKET}: has not answered for" in run.errors)
    run.signal(signal.SIGTERM)
    began = time.monotonic()
    assert run.finish() == 3, run.errors
    assert time.monotonic() - began < 3 + 20
    assert run.last_error == "remit score: stopped by SIGTERM; the same command again goes on"
    server.tell("start")
    again = Command(tmp_path, *arguments, **keys, private=True, RAY_ADDRESS=nodes.address)
    assert again.finish() == 0, again.errors
    files = {name: data for name, data in server.files("out").items() if name != "_score.jsonl"}
    assert files == faulty.undisturbed("score")


def test_ray_client_is_refused(tmp_path: Path, faulty: Faulty) -> None:
    for address in ("ray://head:10001", "http://head:8265"):
        run = Command(
            tmp_path, *faulty.command("score", tmp_path / "out", engines=None), private=True, RAY_ADDRESS=address
        )
        assert run.finish() == 1
        assert run.last_error.startswith(f"remit score: error: RAY_ADDRESS is {address}, expected host:port of the ")
    assert not os.path.exists(tmp_path / "out")
