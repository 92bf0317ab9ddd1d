"""Two trainings, or two post-trainings, on one --out: the second is refused, and who lost the folder writes nothing more."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_model, make_tokenizer
from processes import Command
from test_distributed import arguments, metrics_of
from test_leases import take_over
from test_posttrain import PAIRS, VOCABULARY, assert_same_run, write
from test_train_kills import figures, make_checkpoints, train_a_step

from pipelines.posttrain.settings import SftConfig
from pipelines.posttrain.sft import sft
from shards import lease as lease_module
from shards.lease import Lease, LeaseLost, lease_numbers
from shards.store import open_store
from trainer import checkpoint, export
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.train import train

pytestmark = pytest.mark.usefixtures("starts_processes")

REFUSED = f"another driver writes to this folder: host {socket.gethostname()}, pid %s, since 0 min"


def snapshot(out: Path) -> dict[str, bytes]:
    """All files of a run but those of its lease, and of TensorBoard, which each process has of its own."""
    names = [path.relative_to(out) for path in out.rglob("*") if path.is_file()]
    kept = [name for name in names if name.parts[0] not in ("_lease", "tensorboard") and ".tmp" not in str(name)]
    return {str(name): (out / name).read_bytes() for name in kept}


def wait_for_steps(out: Path, steps: int, is_alive: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not ((out / "metrics.jsonl").exists() and len(metrics_of(out)) >= steps):
        assert is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_second_training_is_refused_and_the_first_goes_on(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    out, quiet = tmp_path / "out", tmp_path / "quiet"
    words = lambda folder: arguments(  # noqa: E731
        folder, annotated["packed"], models["base"], ("--max-steps", 30, "--checkpoint-every", 4)
    )
    assert Command(tmp_path, *words(quiet), private=True, OMP_NUM_THREADS="1").finish() == 0
    first = Command(tmp_path, *words(out), private=True, OMP_NUM_THREADS="1")
    wait_for_steps(out, 3, first.process.is_alive)
    first.signal(signal.SIGSTOP)  # so that it cannot end before the second looks; it is alive
    before = snapshot(out)
    second = Command(tmp_path, *words(out), private=True, OMP_NUM_THREADS="1")
    assert second.finish() == 1
    assert REFUSED % first.pid in second.last_error
    assert snapshot(out) == before
    first.signal(signal.SIGKILL)
    first.process.join()
    third = Command(tmp_path, *words(out), private=True, OMP_NUM_THREADS="1")
    assert third.finish() == 0, third.errors
    assert "waiting up to" not in third.errors  # the dead lose the lease at once
    assert figures(out) == figures(quiet)
    name = "model/model.safetensors"
    assert (out / name).read_bytes() == (quiet / name).read_bytes()
    assert not (out / "_lease").exists()


@pytest.mark.parametrize("moment", ["step", "checkpoint", "evaluation", "export"])
def test_a_training_that_lost_its_folder_writes_and_deletes_nothing_more(
    tmp_path: Path,
    annotated: dict[str, Path],
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
) -> None:
    """The machine slept, and another process has taken over and is further on when this one wakes up."""
    monkeypatch.setattr(lease_module, "TRUSTED_SECONDS", 0.0)
    out, after = tmp_path / "out", {}

    def wake() -> None:
        if after:
            return
        take_over(out)
        for name in (
            "checkpoints/step-000050/checkpoint.json",
            "checkpoints/.step-000060.1-a.tmp/x",
            "exports/step-000050/y",
        ):
            (out / name).parent.mkdir(parents=True)
            (out / name).write_text("of the other")
        after.update(snapshot(out))

    def first(function: Any) -> Any:
        def wrapped(*values: Any, **named: Any) -> Any:
            wake()
            return function(*values, **named)

        return wrapped

    if moment == "checkpoint":
        monkeypatch.setattr(checkpoint, "_sync_and_hash", first(checkpoint._sync_and_hash))
    elif moment == "export":
        monkeypatch.setattr(export, "write_weights", first(export.write_weights))
    elif moment == "evaluation":
        from trainer.evaluation import Evaluation

        write_line = Evaluation.write

        def write_late(self: Evaluation, step: int, of_export: bool) -> None:
            if step:
                self.measure = first(self.measure)
            write_line(self, step, of_export)

        monkeypatch.setattr(Evaluation, "write", write_late)

    def progress(done: int, total: int, metrics: dict[str, Any]) -> None:
        if moment == "step" and done == 5:
            wake()

    config = TrainConfig(
        str(annotated["packed"]), str(models["base"]), out, max_steps=12, global_batch_size=7, micro_batch_size=4,
        dtype="float32", checkpoint_every=0 if moment == "export" else 6, export_every=0 if moment == "checkpoint" else 6,
        eval_shards=str(annotated["packed"]) if moment == "evaluation" else None, eval_every=3,
    )  # fmt: skip
    with pytest.raises(LeaseLost, match="another driver has taken this folder over; this one publishes nothing more"):
        train(config, progress)
    now = snapshot(out)
    if moment == "checkpoint":  # what was logged before it was found out that the save had failed is a step of before
        assert now.pop("metrics.jsonl").startswith(after.pop("metrics.jsonl"))
    assert now == after
    assert (out / "checkpoints" / ".step-000060.1-a.tmp" / "x").exists()
    assert not (out / "model").exists()
    assert lease_numbers(open_store(out)) == [2]


def test_checkpoints_of_another_process_stay(tmp_path: Path) -> None:
    """Those that are newer are deleted only where this process has found them damaged."""
    checkpoints, _ = make_checkpoints(tmp_path)
    train_a_step(checkpoints)
    checkpoints.save(1, 1)
    checkpoints.wait()
    for step in (1000, 1500):
        shutil.copytree(tmp_path / "step-000001", tmp_path / f"step-{step:06d}")
    checkpoints.save(2, 2)
    checkpoints.wait()
    assert {path.name for path in tmp_path.iterdir()} == {f"step-{step:06d}" for step in (1, 2, 1000, 1500)}


def test_a_save_of_a_folder_that_was_lost(tmp_path: Path) -> None:
    lease = Lease(tmp_path).acquire()
    model = torch.nn.Linear(7, 5)
    world, optimizer = World(torch.device("cpu")), torch.optim.AdamW(model.parameters())
    checkpoints = Checkpoints(tmp_path / "checkpoints", model, optimizer, world, "settings", 1, lease)
    for step in (1, 2):
        train_a_step(checkpoints)
        checkpoints.save(step, step)
    checkpoints.wait()
    take_over(tmp_path)
    checkpoints.save(3, 3)
    with pytest.raises(LeaseLost):
        checkpoints.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000002"]


# --- post-training --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    texts = [text for pair in PAIRS[:2] for text in pair] * 9
    folder = make_tokenizer(tmp_path_factory.mktemp("two") / "start", texts, VOCABULARY)
    return make_model(folder, vocabulary=VOCABULARY)


def sft_config(tmp_path: Path, start: Path, out: str) -> SftConfig:
    data = write(tmp_path / "data.jsonl", [{"prompt": prompt, "completion": good} for prompt, good, _ in PAIRS])
    return SftConfig(
        model=str(start),
        data=data,
        out=tmp_path / out,
        max_steps=12,
        batch_size=2,
        learning_rate=1e-3,
        checkpoint_every=2,
    )


def test_the_second_post_training_is_refused(tmp_path: Path, start: Path) -> None:
    quiet, config = (sft_config(tmp_path, start, out) for out in ("quiet", "out"))
    assert sft(quiet, lambda: False) == 0
    command = [
        *(sys.executable, "-m", "pipelines.cli", "sft", "--model", str(start), "--data", str(config.data)),
        *("--out", str(config.out), "--max-steps", "12", "--batch-size", "2", "--learning-rate", "1e-3"),
        *("--checkpoint-every", "2"),
    ]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    wait_for_steps(config.out, 3, lambda: first.poll() is None)
    first.send_signal(signal.SIGSTOP)
    before = snapshot(config.out)
    with pytest.raises(RuntimeError, match=REFUSED % first.pid):
        sft(config, lambda: False)
    assert snapshot(config.out) == before
    first.kill()
    first.wait()
    assert sft(config, lambda: False) == 0
    assert_same_run(config.out, quiet.out)
    assert sorted(os.listdir(config.out)) == ["metrics.jsonl", "model", "run.json"]


@pytest.mark.parametrize("steps", [3, 4])
def test_a_post_training_that_lost_its_folder(
    tmp_path: Path, start: Path, monkeypatch: pytest.MonkeyPatch, steps: int
) -> None:
    """At the end of a step without a checkpoint, and of one with."""
    monkeypatch.setattr(lease_module, "TRUSTED_SECONDS", 0.0)
    config, after, asked = sft_config(tmp_path, start, "out"), {}, []

    def sleep() -> bool:
        asked.append(1)
        if len(asked) == steps:
            take_over(config.out)
            (config.out / "checkpoints" / "checkpoint-8").mkdir(parents=True)
            (config.out / "checkpoints" / "checkpoint-8" / "complete").touch()
            after.update(snapshot(config.out))
        return False

    with pytest.raises(LeaseLost):
        sft(config, sleep)
    assert snapshot(config.out) == after
    assert len(asked) == steps
