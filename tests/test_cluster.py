"""An existing Ray cluster, named by RAY_ADDRESS, gives the same bytes as a private one."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def remit_process(address: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        env=os.environ | {"RAY_ADDRESS": address},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def cluster(tmp_path: Path) -> str:
    """Address of a cluster that `ray start` holds, with the token that Ray asks for by default."""
    port = free_port()
    command = [str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={port}"]
    with open(tmp_path / "ray.log", "w") as log:
        process = subprocess.Popen([*command, "--include-dashboard=false"], stdout=log, stderr=log)
        deadline = time.monotonic() + 90
        while "Ray runtime started" not in (tmp_path / "ray.log").read_text():
            assert process.poll() is None, (tmp_path / "ray.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.5)
        yield f"127.0.0.1:{port}"
        process.terminate()
        process.wait(60)


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
    done = remit_process(
        cluster, "pack", "--corpus", corpus_folder, "--tokenizer", tokenizer_folder, "--out", out[0], *sizes
    )
    assert done.returncode == 0, done.stderr
    score = ("score", "--shards", out[0], "--model", reference_model, "--out", out[1], "--dtype", "float32")
    done = remit_process(cluster, *score, "--num-engines", 1)
    assert done.returncode == 0, done.stderr
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
    done = remit_process(
        address, "pack", "--corpus", corpus_folder, "--tokenizer", tokenizer_folder, "--out", tmp_path / "o"
    )
    assert done.returncode == 1
    assert f"RAY_ADDRESS is {address}" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())
