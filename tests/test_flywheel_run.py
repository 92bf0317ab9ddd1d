"""remit flywheel for real: tiny models through pack, train, a post-training command, score, train; left alone and killed."""

import json
import random
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, source_texts, write_corpus
from processes import Command
from safetensors.torch import load_file

from shards import ShardFolder
from shards.fingerprint import weights_fingerprint

# post-training by a command: every weight moves by noise from the seed, in float32, so that the result is exact
NUDGE = """
import os, shutil, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
start, out = Path(os.environ["REMIT_MODEL"]), Path(os.environ["REMIT_OUTPUT"])
shutil.copytree(start, out, dirs_exist_ok=True)
noise = torch.Generator().manual_seed(int(os.environ["REMIT_SEED"]))
weights = load_file(start / "model.safetensors")
for name in sorted(weights):
    weights[name] += 0.02 * torch.randn(weights[name].shape, generator=noise)
save_file(weights, out / "model.safetensors", {"format": "pt"})
"""
STAGES = ["pack", "pack-heldout", "round-0/train", "round-0/nudge", "round-1/score", "round-1/train", "round-1/nudge"]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = tmp_path_factory.mktemp("flywheel")
    make_model(folder / "base")
    shutil.copytree(tokenizer_folder, folder / "base", dirs_exist_ok=True)
    write_corpus(folder / "data" / "a.jsonl", source_texts(50, seed=21))
    write_corpus(folder / "data" / "b.jsonl.zst", source_texts(40, seed=22))
    write_corpus(folder / "heldout.jsonl", source_texts(15, seed=23))
    (folder / "nudge.py").write_text(NUDGE)
    values = {
        "base": str(folder / "base"),
        "corpus": [str(folder / "data")],
        "heldout": str(folder / "heldout.jsonl"),
        "out": str(folder / "out"),
        "seq_len": 64,
        "seed": 3,
        "pack": {"tokens_per_shard": 64 * 20},
        "score": {"dtype": "float32", "num_engines": 1},
        "train": {"max_steps": 8, "global_batch_size": 4, "dtype": "float32", "checkpoint_every": 2},
        "posttrain": [{"command": [sys.executable, str(folder / "nudge.py")], "name": "nudge"}],
    }
    (folder / "flywheel.yaml").write_text(yaml.safe_dump(values))
    return folder


def records(out: Path) -> dict[str, dict]:
    return {entry["name"]: entry for entry in json.loads((out / "flywheel.json").read_text())["stages"]}


def run(project: Path, out: Path, seconds: float = 900) -> str:
    command = Command(project, "flywheel", "--config", project / "flywheel.yaml", "--out", out)
    assert command.finish(seconds) == 0, command.errors
    return command.errors


@pytest.fixture(scope="module")
def whole(project: Path) -> Path:
    """The folder of a loop that was left alone."""
    errors = run(project, project / "whole")
    assert re.findall(r"\] (\S+): done \(", errors) == STAGES
    return project / "whole"


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_loop_is_what_it_says(project: Path, whole: Path) -> None:
    """Both rounds start from the base, on the same rows; the reference is the model after round 0."""
    found = records(whole)
    assert list(found) == STAGES
    first, second = (lines(whole / found[f"round-{n}/train"]["output"] / "metrics.jsonl") for n in (0, 1))
    assert len(first) == len(second) == 8
    assert first[0]["ntp_loss"] == second[0]["ntp_loss"]  # the same weights, the same rows
    assert first[0]["weight_std"] == 0 < second[0]["weight_std"]
    assert first[-1]["ntp_loss"] != second[-1]["ntp_loss"]
    heldout = lines(whole / found["round-1/train"]["output"] / "evaluation.jsonl")
    assert [line["step"] for line in heldout] == [0, 8]
    nudged = whole / found["round-0/nudge"]["result"]
    scored = ShardFolder(whole / found["round-1/score"]["result"]).manifest.references["rl"]
    assert weights_fingerprint(nudged) in json.dumps(scored)
    start = load_file(whole / found["round-0/train"]["result"] / "model.safetensors")
    moved = load_file(nudged / "model.safetensors")
    noise = torch.Generator().manual_seed(3)
    for name in sorted(start):
        assert torch.equal(moved[name], start[name] + 0.02 * torch.randn(start[name].shape, generator=noise))
    for name in ("command", "inputs", "seed", "started", "seconds", "versions", "code", "fingerprint"):
        assert all(name in entry for entry in found.values())
    assert found["round-1/train"]["inputs"]["shards"]["stage"] == "round-1/score"
    assert found["round-1/train"]["inputs"]["model"]["path"] == str(project / "base")


def test_nothing_to_do(project: Path, whole: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in (whole / "stages").rglob("*")}
    errors = run(project, whole)
    assert errors.count("done before") == len(STAGES)
    assert {path: path.stat().st_mtime_ns for path in (whole / "stages").rglob("*")} == before


def equal(out: Path, whole: Path) -> None:
    ours, theirs = records(out), records(whole)
    assert {name: entry["fingerprint"] for name, entry in ours.items()} == {
        name: entry["fingerprint"] for name, entry in theirs.items()
    }


def log(out: Path, name: str) -> Callable[[], str]:
    def read() -> str:
        found = list((out / "logs").glob(f"{name.replace('/', '-')}-*.log"))
        return found[0].read_text() if found else ""

    return read


def test_kills_in_training_and_scoring(project: Path, whole: Path) -> None:
    """Of the driver, while a checkpoint is there and while an engine starts; then the results of a run left alone."""
    out = project / "killed"
    for name in ("round-0/train", "round-1/score"):
        command = Command(project, "flywheel", "--config", project / "flywheel.yaml", "--out", out)
        if name == "round-0/train":
            command.until(lambda: list((out / "stages").glob("round-0-train-*/checkpoints/step-*")), 600)
        else:
            command.until(log(out, name), 600)
        command.signal(signal.SIGKILL)
        assert command.finish(600) == -signal.SIGKILL
    errors = run(project, out)
    assert "[3/7] round-0/train: done before" in errors
    equal(out, whole)


@pytest.mark.slow
def test_kills_at_random_moments(project: Path, whole: Path) -> None:
    """Driver or a stage's own process, again and again, until the loop is through."""
    rng, out, kills = random.Random(11), project / "random", 0
    while True:
        command = Command(project, "flywheel", "--config", project / "flywheel.yaml", "--out", out)
        # short at first, for a quick machine would be through before it is killed often; and longer each time, for an
        # engine may need more to start than any fixed time
        time.sleep(rng.uniform(1, 6 + 4 * kills))
        if command.process.is_alive():
            kills += 1
            command.signal(signal.SIGKILL)
            assert command.finish(600) == -signal.SIGKILL
        elif command.finish() == 0:
            break
    assert kills > 3
    equal(out, whole)
    assert not list((out / "stages").glob(".*.part"))
