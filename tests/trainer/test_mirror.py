"""--mirror: a copy of the run in another folder or a bucket, from which another machine goes on bit for bit."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from annotated import run
from processes import Command
from s3_server import BUCKET, REGION, S3Server
from test_distributed import VOLATILE, arguments, finish, launch, metrics_of

from shards.lease import Lease
from shards.store import LocalStore, open_store
from shards.store_errors import StoreSilent
from shards.transfer import receive, send
from trainer import mirror as mirror_module
from trainer.config import TrainConfig
from trainer.train import train

SETTINGS: dict[str, Any] = {"max_steps": 6, "checkpoint_every": 2, "global_batch_size": 7, "dtype": "float32"}
MODEL = "model/model.safetensors"


def figures(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in metrics_of(out)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part(files: dict[str, bytes], *folders: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith(tuple(f"{folder}/" for folder in folders))}


@pytest.fixture(scope="module")
def start(annotated: dict[str, Path], models: dict[str, Path]) -> Callable:
    """Train into `out` with SETTINGS and others, told where to stop; whether it is finished, and the notes."""

    def begin(out: Path, stop_after: int = 0, **settings: Any) -> tuple[bool, list[str]]:
        notes, done = [], 0

        def progress(step: int, total: int, metrics: dict[str, Any]) -> None:
            nonlocal done
            done = step

        config = TrainConfig((str(annotated["packed"]),), str(models["base"]), out, **(SETTINGS | settings))
        result = train(config, progress, lambda: bool(stop_after) and done >= stop_after, notes.append)
        return result.finished, notes

    return begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Callable) -> Path:
    """A run without a mirror that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert start(out)[0]
    return out


def test_the_mirror_has_the_run_and_gives_it_back(tmp_path: Path, start: Callable, whole: Path) -> None:
    """A finished run: checkpoints, exports and records are there byte for byte; without OUT the models come back from there."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    settings = {"mirror": f"file://{mirror}", "export_every": 4, "average": "last:2"}
    assert start(out, **settings)[0]
    ours, theirs = contents(out), contents(mirror)
    assert figures(out) == figures(whole)
    folders = ("checkpoints", "model", "model-average", "exports", "tensorboard")
    assert part(theirs, *folders) == part(ours, *folders)
    assert {name.split("/")[1] for name in part(theirs, "checkpoints")} == {"step-000004", "step-000006"}
    records = {"run.json", "metrics.jsonl", "exported.json"}
    assert {name: theirs[name] for name in records} == {name: ours[name] for name in records}
    assert {name for name in theirs if "/" not in name} == {*records, "mirror.json"}
    assert not (mirror / "_lease").exists()

    shutil.rmtree(out)
    finished, notes = start(out, **settings)
    assert finished
    assert f"fetched from file://{mirror}: model, model-average" in notes
    again = contents(out)
    assert part(again, "model", "model-average") == part(ours, "model", "model-average")
    assert again["metrics.jsonl"] == ours["metrics.jsonl"]
    assert contents(mirror).keys() == theirs.keys()
