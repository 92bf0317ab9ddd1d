"""An existing Ray cluster, named by RAY_ADDRESS, gives the same bytes as a private one; the pages on clusters run."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from annotated import run as train
from processes import Command
from test_distributed import assert_same, metrics_of
from test_documents import DOCS, blocks, environment_of_a_reader, make_workspace

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


@contextlib.contextmanager
def ray_start(log: Path, *options: object) -> Iterator[None]:
    """A node that `ray start` holds for the block, on loopback, with the token that Ray asks for by default."""
    command = [Path(sys.executable).parent / "ray", "start", *options, "--block", "--num-cpus=2"]
    command += ["--node-ip-address=127.0.0.1", "--object-store-memory=100000000"]
    with open(log, "w") as file:
        process = subprocess.Popen(list(map(str, command)), stdout=file, stderr=file)
    deadline = time.monotonic() + 240
    try:
        while "Ray runtime started" not in log.read_text():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        process.wait(120)


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[str]:
    """Address of a cluster of one node."""
    port = free_port()
    with ray_start(tmp_path / "ray.log", "--head", f"--port={port}", "--include-dashboard=false"):
        yield f"127.0.0.1:{port}"


def test_existing_cluster_gives_the_same_bytes(
    tmp_path: Path,
    cluster: str,
    corpus_folder: Path,
    tokenizer_folder: Path,
    packed: Path,
    scored_rl: Path,
    reference_model: Path,
) -> None:
    sizes = ("--seq-len", 64, "--tokens-per-shard", 64 * 50)
    out = (tmp_path / "packed", tmp_path / "scored")
    pack = ("pack", "--corpus", corpus_folder, "--tokenizer", tokenizer_folder, "--out", out[0], *sizes)
    score = ("score", "--shards", out[0], "--model", reference_model, "--out", out[1], "--dtype", "float32")
    for command in (pack, (*score, "--num-engines", 1, "--no-canary")):
        run = Command(tmp_path, *command, private=True, RAY_ADDRESS=cluster)
        assert run.finish() == 0, run.errors
    for here, there in ((packed, out[0]), (scored_rl, out[1])):
        files = sorted(path.relative_to(here) for path in here.rglob("*") if path.is_file())
        files.remove(Path("_score.jsonl")) if Path("_score.jsonl") in files else None  # has times in it
        assert set(files) == {path.relative_to(there) for path in there.rglob("*") if path.is_file()} - {
            Path("_score.jsonl")
        }
        assert all((here / file).read_bytes() == (there / file).read_bytes() for file in files)


def test_address_without_a_cluster_is_an_error_at_once(
    tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path
) -> None:
    address = f"127.0.0.1:{free_port()}"
    pack = ("pack", "--corpus", corpus_folder, "--tokenizer", tokenizer_folder, "--out", tmp_path / "o")
    run = Command(tmp_path, *pack, private=True, RAY_ADDRESS=address)
    assert run.finish() == 1
    assert f"RAY_ADDRESS is {address}" in run.last_error
    assert not (tmp_path / "o").exists()


def block_with(page: str, words: str) -> list[str]:
    """The lines of the one shell block of a page that has these words, without what the shell leaves out."""
    (found,) = [block for _, block in blocks(DOCS / page, "sh") if words in block]
    return [line.partition("  #")[0].strip() for line in found.replace("\\\n", " ").splitlines()]


def shell(command: str, workspace: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", "-euo", "pipefail", "-c", command], cwd=workspace, env=environment_of_a_reader(),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.mark.slow
def test_the_page_on_ray_clusters_runs(tmp_path: Path, cluster: str, tokenizer_folder: Path) -> None:
    """A head and a second node on this machine; fewer workers and steps."""
    make_workspace(tmp_path / "there", tokenizer_folder)
    head, node, *commands = block_with("cluster.md", "ray start --head")
    assert head == "ray start --head --port 6379"  # what the fixture does, on another port
    assert node == "ray start --address head:6379"
    script = "\n".join(commands).replace("head:6379", cluster).replace("--ray-workers 32", "--ray-workers 2")
    assert [line.split()[:2] for line in commands[1:]] == [["remit", word] for word in ("pack", "score", "train")]
    with ray_start(tmp_path / "node.log", *node.replace("head:6379", cluster).split()[2:]):
        process = shell(f"{script} --global-batch-size 2 --max-steps 2", tmp_path / "there")
        output = process.communicate(timeout=1200)[0]
    assert process.returncode == 0, output
    for file in ("scored/_manifest.json", "run/model/model.safetensors"):
        assert (tmp_path / "there" / file).exists()
    assert len((tmp_path / "there" / "run" / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.slow
def test_torchrun_on_several_machines_as_the_page_says(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    """Two launchers on this machine with two processes each; the same losses as one process."""
    command = block_with("training.md", "torchrun --nnodes 4")[0]
    (tmp_path / "scored").symlink_to(annotated["packed"])
    (tmp_path / "base").symlink_to(models["base"])
    for word, smaller in (
        ("--nnodes 4", "--nnodes 2"), ("--nproc-per-node 8", "--nproc-per-node 2"), ("host0:29500", f"127.0.0.1:{free_port()}"),
    ):  # fmt: skip
        assert command.count(word) == 1
        command = command.replace(word, smaller)
    command += " --max-steps 3 --global-batch-size 8 --dtype float32"
    processes = [shell(command, tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    train(tmp_path / "one", annotated["packed"], models["base"], max_steps=3, micro_batch_size=1)
    assert_same(metrics_of(tmp_path / "run"), metrics_of(tmp_path / "one"))


def test_workers_are_as_nice_as_their_driver() -> None:
    """Ray's own 15 starves engines beside any other work on the machine."""
    assert ray.get(ray.remote(lambda: os.nice(0)).remote()) == os.nice(0)
