"""Weights are hashed once per node, and again as soon as a file is another one."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from scorer import once_per_node
from scorer.once_per_node import node_weights_fingerprint, user_folder
from shards.fingerprint import weights_fingerprint


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setenv("TMPDIR", str(folder))
    return folder


def model(folder: Path, value: float = 1.0) -> Path:
    folder.mkdir(exist_ok=True)
    save_file({"weight": torch.full((3, 5), value)}, folder / "model.safetensors")
    return folder


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have files count as old."""
    monkeypatch.setattr(once_per_node, "SETTLED_SECONDS", -60)


def count_hashings(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    done: list[Path] = []

    def counted(folder: Path) -> str:
        done.append(folder)
        return weights_fingerprint(folder)

    monkeypatch.setattr(once_per_node, "weights_fingerprint", counted)
    return done


def test_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    done = count_hashings(monkeypatch)
    folder = model(tmp_path / "model")
    assert node_weights_fingerprint(folder) == node_weights_fingerprint(folder) == weights_fingerprint(folder)
    assert len(done) == 1


def test_a_file_with_the_same_size_and_time_is_another_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    folder = model(tmp_path / "model")
    first, file = node_weights_fingerprint(folder), folder / "model.safetensors"
    before = file.stat()
    model(folder, 2.0)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_size == before.st_size
    assert node_weights_fingerprint(folder) == weights_fingerprint(folder) != first


def test_a_file_that_just_changed_is_hashed_every_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = count_hashings(monkeypatch)
    folder = model(tmp_path / "model")
    node_weights_fingerprint(folder)
    node_weights_fingerprint(folder)
    assert len(done) == 2


@pytest.mark.parametrize("content", [b"", b"abc\n", b"x" * 200, b"\xff" * 65])
def test_a_damaged_note_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path, content: bytes
) -> None:
    settle(monkeypatch)
    folder = model(tmp_path / "model")
    node_weights_fingerprint(folder)
    (note,) = user_folder("remit-fingerprints").iterdir()
    note.write_bytes(content)
    assert node_weights_fingerprint(folder) == weights_fingerprint(folder)
    assert node_weights_fingerprint(folder) == weights_fingerprint(folder)


def test_a_temporary_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, temporary: Path
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(temporary / "missing"))
    folder = model(tmp_path / "model")
    assert node_weights_fingerprint(folder) == weights_fingerprint(folder)


def test_without_weights(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*.safetensors"):
        node_weights_fingerprint(tmp_path)


SLOW_HASH = """
import sys, time
from pathlib import Path
from scorer import once_per_node
once_per_node.SETTLED_SECONDS = -60
def slow(folder):
    with open(sys.argv[2], "a") as file:
        file.write("x")
    time.sleep(1)
    return "f" * 64
once_per_node.weights_fingerprint = slow
print(once_per_node.node_weights_fingerprint(Path(sys.argv[1])))
"""


@pytest.mark.usefixtures("starts_processes")
def test_processes_wait_for_the_first(tmp_path: Path) -> None:
    folder, log = model(tmp_path / "model"), tmp_path / "log"
    command = [sys.executable, "-c", SLOW_HASH, str(folder), str(log)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate(timeout=60)[0].strip() for process in running] == ["f" * 64] * 4
    assert log.read_text() == "x"


@pytest.mark.usefixtures("starts_processes")
def test_the_next_goes_on_where_the_first_was_killed(tmp_path: Path) -> None:
    folder, log = model(tmp_path / "model"), tmp_path / "log"
    command = [sys.executable, "-c", SLOW_HASH, str(folder), str(log)]
    first = subprocess.Popen(command, stdout=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not log.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    first.kill()
    first.communicate()
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "f" * 64
    assert log.read_text() == "xx"


def test_one_file_under_two_names_is_two_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fingerprint has the names in it, and folders of the hub's cache link to the same blob."""
    settle(monkeypatch)
    first, second = model(tmp_path / "first"), tmp_path / "second"
    second.mkdir()
    (second / "other.safetensors").symlink_to(first / "model.safetensors")
    assert node_weights_fingerprint(first) == weights_fingerprint(first)
    assert node_weights_fingerprint(second) == weights_fingerprint(second) != weights_fingerprint(first)
