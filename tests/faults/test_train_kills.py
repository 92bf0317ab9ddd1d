"""Training that is killed: whole jobs of two ranks at random moments, one rank alone, by a signal; and its checkpoints."""

import json
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from test_distributed import VOLATILE, finish, kill_tree, launch, metrics_of, torchrun, wait_for

from trainer.checkpoint import Checkpoints
from trainer.distributed import World

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

KILLED_RUN = ("--checkpoint-every", 2, "--max-steps", 16, "--sharding", "full", "--micro-batch-size", 4)


def figures(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in metrics_of(out)]


@pytest.mark.parametrize("kills", [3, pytest.param(30, marks=pytest.mark.slow)])
def test_kills_at_random_moments(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], kills: int
) -> None:
    """Two ranks: metrics and weights are bit-equal to those of a run that was left alone."""
    arguments = (annotated["packed"], models["base"], 2, *KILLED_RUN)
    finish(launch(tmp_path / "whole", *arguments))
    rng, out, done = random.Random(5), tmp_path / "cut", 0
    while done < kills:
        process = launch(out, *arguments)
        began = time.time()
        # until this attempt has trained a step, or there would be nothing to kill
        wait_for(lambda began=began: written_since(out / "metrics.jsonl", began), process)
        time.sleep(rng.uniform(0, 0.6))
        if process.poll() is not None:  # it was faster
            process.communicate()
            if (out / "model").exists():
                assert figures(out) == figures(tmp_path / "whole")
                subprocess.run(["rm", "-rf", str(out)], check=True)
            continue
        kill_tree(process)
        done += 1
    finish(launch(out, *arguments))
    assert figures(out) == figures(tmp_path / "whole")
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert not list((out / "checkpoints").glob(".*"))


def written_since(file: Path, moment: float) -> bool:
    return file.exists() and file.stat().st_size > 0 and file.stat().st_mtime > moment


def test_signal_to_two_ranks_then_one_dies(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    """torchrun hands SIGTERM on: the step is finished and saved, each rank says so. The same command goes on, until a
    kill -9 of one rank ends the job."""
    out, arguments = tmp_path / "out", (annotated["packed"], models["base"], 2, "--max-steps", 2000)
    process = torchrun(out, *arguments)
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(metrics_of(out)) > 2, process)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "stopped by SIGTERM; the same command again goes on" in output
    steps = len(metrics_of(out))
    assert [path.name for path in (out / "checkpoints").glob("*")] == [f"step-{steps:06d}"]

    process = torchrun(out, *arguments)
    wait_for(lambda: len(metrics_of(out)) > steps, process)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    began = time.monotonic()
    process.communicate(timeout=300)
    assert process.returncode != 0
    assert time.monotonic() - began < 60
    assert [line["step"] for line in metrics_of(out)][: steps + 1] == list(range(1, steps + 2))


def test_error_of_a_rank_is_shown(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    """A damaged part: the ranks that meet it name it, with their rank."""
    shards = tmp_path / "shards"
    subprocess.run(["cp", "-r", str(annotated["packed"]), str(shards)], check=True)
    for part in shards.glob("*.arrow"):
        data = bytearray(part.read_bytes())
        for place in range(len(data) // 8, len(data) * 3 // 4, 40):  # of each column of each record batch
            data[place] ^= 1
        part.write_bytes(data)
    process = launch(tmp_path / "out", shards, models["base"], 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0
    assert "remit train: error: rank " in output
    assert "sha256" in output
    assert ".arrow" in output


def make_checkpoints(folder: Path, keep: int = 3) -> tuple[Checkpoints, torch.nn.Module]:
    torch.manual_seed(0)
    model = torch.nn.Linear(7, 5)
    optimizer = torch.optim.AdamW(model.parameters())
    return Checkpoints(folder, model, optimizer, World(torch.device("cpu")), "settings", keep), model


def train_a_step(checkpoints: Checkpoints) -> None:
    checkpoints.model(torch.randn(3, 7)).square().sum().backward()
    checkpoints.optimizer.step()
    checkpoints.optimizer.zero_grad()


def test_every_damage_is_passed_over_by_name(tmp_path: Path) -> None:
    """A flipped bit, a cut file or a missing one, in each file of the newest checkpoint, its index too."""
    checkpoints, model = make_checkpoints(tmp_path)
    weights = {}
    for step in (1, 2):
        train_a_step(checkpoints)
        checkpoints.save(step, 8 * step)
        weights[step] = model.weight.detach().clone()
    checkpoints.wait()
    newest, rng = tmp_path / "step-000002", random.Random(1)
    files = sorted(path for path in newest.iterdir())
    assert {"checkpoint.json", ".metadata"} < {path.name for path in files}
    for trial in range(60):
        file, (again, loaded) = files[trial % len(files)], make_checkpoints(tmp_path)
        good = file.read_bytes()
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        file.write_bytes((bytes(bad), good[: rng.randrange(len(good))])[trial // len(files) % 2])
        step, problems = again.load_newest()
        file.write_bytes(good)
        assert step == 1, (file.name, trial)
        assert len(problems) == 1
        assert "step-000002" in problems[0]
        assert torch.equal(loaded.weight, weights[1])
    again, loaded = make_checkpoints(tmp_path)
    assert again.load_newest() == (2, [])
    assert torch.equal(loaded.weight, weights[2])


def test_a_save_is_of_the_moment_it_was_asked_for(tmp_path: Path) -> None:
    """Training goes on while it is written; the random state comes back too."""
    checkpoints, model = make_checkpoints(tmp_path)
    train_a_step(checkpoints)
    wanted, state = model.weight.detach().clone(), torch.get_rng_state()
    checkpoints.save(1, 8)
    with torch.no_grad():
        model.weight.zero_()
    checkpoints.wait()
    again, loaded = make_checkpoints(tmp_path)
    assert again.load_newest() == (1, [])
    assert torch.equal(loaded.weight, wanted)
    assert torch.equal(torch.get_rng_state(), state)


def test_retention_leftovers_and_other_settings(tmp_path: Path) -> None:
    checkpoints, _ = make_checkpoints(tmp_path, keep=2)
    (tmp_path / ".step-000001.9-dead.tmp").mkdir(parents=True)  # of a save that was cut off
    for step in range(1, 5):
        train_a_step(checkpoints)
        checkpoints.save(step, step)
    checkpoints.wait()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000003", "step-000004"]
    index = json.loads((tmp_path / "step-000004" / "checkpoint.json").read_text())
    assert (index["step"], index["position"], index["world_size"]) == (4, 4, 1)
    other = make_checkpoints(tmp_path)[0]
    other.settings = "others"
    with pytest.raises(ValueError, match=r"no checkpoint can be used: .*step-000004: of a run with other settings"):
        other.load_newest()


def test_damaged_newer_ones_do_not_crowd_out_what_follows(tmp_path: Path) -> None:
    """Steps 8 and 9 are damaged, the run goes on from 3: what it saves is kept, what it passed over goes."""
    checkpoints, _ = make_checkpoints(tmp_path)
    for step in (3, 999_999, 1_000_000):  # by number, not by name
        train_a_step(checkpoints)
        checkpoints.save(step, step)
    checkpoints.wait()
    for step in (999_999, 1_000_000):
        (tmp_path / f"step-{step}" / ".metadata").write_bytes(b"gone")
    again, _ = make_checkpoints(tmp_path, keep=1)
    assert again.load_newest()[0] == 3
    again.save(4, 4)
    again.wait()
    assert [path.name for path in tmp_path.iterdir()] == ["step-000004"]
    (tmp_path / "step-000004" / ".metadata").unlink()
    with pytest.raises(ValueError, match=r"no checkpoint can be used: .*delete the run's folder to start over"):
        make_checkpoints(tmp_path)[0].load_newest()
