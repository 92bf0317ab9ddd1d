"""kill -9 at every named point of pack and score, then the same command again: the folder of an undisturbed run."""

import os
import signal
from pathlib import Path

import pytest
from faulty import Faulty
from processes import Command, content

from shards.crash import CRASH_POINTS

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

WORKER = {
    "score": {name for name in CRASH_POINTS if name.startswith(("part.", "record."))},
    "pack": {name for name in CRASH_POINTS if name.startswith(("part.", "record."))} | {"staging.written"},
}
DRIVER = {
    "score": set(CRASH_POINTS) - WORKER["pack"] - {"staging.done"},
    "pack": set(CRASH_POINTS) - WORKER["pack"],
}
ALWAYS = {
    "score": {"part.synced", "record.linked", "lease.taken", "manifest.linked", "driver.assigned"},
    "pack": {"part.linked", "record.published", "staging.written", "output.begun", "driver.committed"},
}


def cases(points: dict[str, set[str]]) -> list:
    return [
        pytest.param(command, point, marks=() if point in ALWAYS[command] else pytest.mark.slow)
        for command in points
        for point in CRASH_POINTS
        if point in points[command]
    ]


def test_every_point_is_tried() -> None:
    assert WORKER["pack"] | DRIVER["pack"] == set(CRASH_POINTS)
    assert WORKER["score"] | DRIVER["score"] == set(CRASH_POINTS) - {"staging.written", "staging.done"}


@pytest.mark.parametrize(("command", "point"), cases(DRIVER))
def test_driver_dies(faulty: Faulty, tmp_path: Path, command: str, point: str) -> None:
    arguments, want = faulty.command(command, tmp_path / "out"), faulty.undisturbed(command)
    killed = Command(tmp_path, *arguments, REMIT_CRASH_AT=point)
    assert killed.finish() == -signal.SIGKILL, killed.errors
    again = Command(tmp_path, *arguments)
    assert again.finish() == 0, again.errors
    assert content(tmp_path / "out") == want


@pytest.mark.parametrize(("command", "point"), cases(WORKER))
def test_worker_dies_once_and_the_driver_goes_on(faulty: Faulty, tmp_path: Path, command: str, point: str) -> None:
    arguments, want = faulty.command(command, tmp_path / "out", engines=2), faulty.undisturbed(command)
    marker = tmp_path / "marker"
    run = Command(tmp_path, *arguments, REMIT_CRASH_AT=f"{point}@{marker}")
    assert run.finish() == 0, run.errors
    assert marker.exists()
    assert content(tmp_path / "out") == want
    if command == "score":
        assert "attempt 1 failed" in run.errors


@pytest.mark.slow
@pytest.mark.parametrize(("command", "point"), cases(WORKER))
def test_worker_and_driver_die_together(faulty: Faulty, tmp_path: Path, command: str, point: str) -> None:
    """As where a machine loses its power."""
    arguments, want = faulty.command(command, tmp_path / "out"), faulty.undisturbed(command)
    marker = tmp_path / "marker"
    killed = Command(tmp_path, *arguments, REMIT_CRASH_AT=f"{point}@{marker}")
    killed.until(marker.exists)
    killed.signal(signal.SIGKILL)
    assert killed.finish() == -signal.SIGKILL
    again = Command(tmp_path, *arguments)
    assert again.finish() == 0, again.errors
    assert content(tmp_path / "out") == want


def test_kill_of_a_driver_with_its_own_ray(faulty: Faulty, tmp_path: Path) -> None:
    """Without a cluster the engines are the driver's own processes: none must outlive it and publish."""
    out = tmp_path / "out"
    killed = Command(
        tmp_path, *faulty.command("score", out), private=True, REMIT_FAKE_ENGINE='{"seconds": 0.2}',
        REMIT_CRASH_AT="driver.committed",
    )  # fmt: skip
    assert killed.finish() == -signal.SIGKILL, killed.errors
    assert 0 < len(os.listdir(out / "_commits")) < faulty.num_parts
    again = Command(tmp_path, *faulty.command("score", out))
    assert again.finish() == 0, again.errors
    assert content(out) == faulty.undisturbed("score")


def test_pack_that_died_within_the_tokenizer(faulty: Faulty, tmp_path: Path) -> None:
    """A tokenizer of which only one file was saved, or another one's, is not taken for a saved one."""
    saved = tmp_path / "out" / "_tokenizer"
    saved.mkdir(parents=True)
    (saved / "tokenizer_config.json").write_text("{}")
    (saved / "added_tokens.json").write_text("{}")
    (saved / ".tokenizer.json.17-aa.tmp").write_text("{")
    again = Command(tmp_path, *faulty.command("pack", tmp_path / "out"))
    assert again.finish() == 0, again.errors
    assert content(tmp_path / "out") == faulty.undisturbed("pack")


def test_score_that_died_within_the_tokenizer(faulty: Faulty, tmp_path: Path) -> None:
    saved = tmp_path / "out" / "_tokenizer"
    saved.mkdir(parents=True)
    (saved / "added_tokens.json").write_text("{}")
    (saved / ".tokenizer.json.17-aa.tmp").write_text("{")
    again = Command(tmp_path, *faulty.command("score", tmp_path / "out"))
    assert again.finish() == 0, again.errors
    assert content(tmp_path / "out") == faulty.undisturbed("score")
