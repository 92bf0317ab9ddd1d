"""remit flywheel for real: tiny models through pack, train, a post-training command, score, train; left alone and killed."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import make_model, source_texts, write_corpus
from processes import Command
from safetensors.torch import load_file

from shards import ShardFolder
from shards.fingerprint import weights_fingerprint

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

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


def equal(out: Path, whole: Path) -> None:
    ours, theirs = records(out), records(whole)
    assert {name: entry["fingerprint"] for name, entry in ours.items()} == {
        name: entry["fingerprint"] for name, entry in theirs.items()
    }


def kill_stage(out: Path) -> bool:
    """kill -9 of the command of the stage that runs, and of what it has started; False where none does."""
    for file in (out / "running").glob("*"):
        pid = file.read_text().partition("\n")[2].partition(" ")[0]
        with contextlib.suppress(ProcessLookupError, ValueError):  # it has just ended, or was about to begin
            os.killpg(int(pid), signal.SIGKILL)
            return True
    return False


@pytest.mark.slow
def test_kills_in_training_and_scoring(project: Path, whole: Path) -> None:
    """Of the driver while a checkpoint is there, and of the stage too while an engine starts; then the results of a run
    left alone. The training goes on without its driver: the next one waits, and repeats none of it."""
    out = project / "killed"
    command = Command(project, "flywheel", "--config", project / "flywheel.yaml", "--out", out)
    command.until(lambda: list((out / "stages").glob("round-0-train-*/checkpoints/step-*")), 600)
    command.signal(signal.SIGKILL)
    assert command.finish(600) == -signal.SIGKILL
    command = Command(project, "flywheel", "--config", project / "flywheel.yaml", "--out", out)
    command.until(
        lambda: list((out / "logs").glob("round-1-score-*")) and list((out / "running").glob("round-1-score-*")), 600
    )
    command.signal(signal.SIGKILL)
    assert command.finish(600) == -signal.SIGKILL
    kill_stage(out)
    errors = run(project, out)
    assert "[3/7] round-0/train: done before" in errors
    equal(out, whole)


@pytest.mark.slow
def test_kills_at_random_moments(project: Path, whole: Path) -> None:
    """Driver, its stage or both, again and again, until the loop is through."""
    rng, out, kills = random.Random(11), project / "random", 0
    while True:
        command = Command(project, "flywheel", "--config", project / "flywheel.yaml", "--out", out)
        # short at first, for a quick machine would be through before it is killed often; and longer each time, for an
        # engine may need more to start than any fixed time
        time.sleep(rng.uniform(1, 6 + 4 * kills))
        if not command.process.is_alive():
            assert command.finish() == 0
            break
        kills += 1
        victim = rng.choice(["driver", "stage", "both"])
        if victim != "stage":
            command.signal(signal.SIGKILL)
            assert command.finish(600) == -signal.SIGKILL
        if victim != "driver":
            kill_stage(out)
        if victim == "stage":
            assert command.finish(600) in (0, 1), command.errors
    assert kills > 3
    equal(out, whole)
    assert not list((out / "stages").glob(".*.part"))
