"""A rank that is gone while the base is loaded, a step is made, a checkpoint is hashed, the model is exported: the others end
soon, nothing half done has a name, and the same command again finishes."""

import os
import time
from pathlib import Path

import pytest
from exporting import make_base
from in_shares import on_ranks

import trainer.checkpoint
import trainer.gathered
import trainer.sharded
import trainer.train
from benchmarks.random_shards import make_shards
from trainer.config import TrainConfig

PHASES = {
    "load": (trainer.sharded.Slots, "put"),
    "train": (trainer.train, "train_step"),
    "save": (trainer.checkpoint, "_sync_and_hash"),
    "export": (trainer.gathered.Gathered, "pop"),
}


def config_of(folder: Path) -> TrainConfig:
    return TrainConfig(
        shards=(str(folder / "shards"),), model=str(folder / "base"), out=folder / "out", objective="ntp", dtype="float32",
        max_steps=2, global_batch_size=4, checkpoint_every=1, sharding="full", timeout_seconds=30,
    )  # fmt: skip


def train_and_die(world: object, folder: Path, phase: str) -> None:
    if world.rank == 1:  # type: ignore[attr-defined]
        where, name = PHASES[phase]
        setattr(where, name, lambda *arguments, **named: os._exit(9))
    trainer.train.train(config_of(folder))


def train(world: object, folder: Path) -> None:
    assert trainer.train.train(config_of(folder)).finished


@pytest.mark.usefixtures("starts_processes")
@pytest.mark.parametrize("phase", PHASES)
def test_a_rank_dies(tmp_path: Path, phase: str) -> None:
    make_base(tmp_path / "base", "Qwen3")
    make_shards(tmp_path / "shards", 521, 1, 16, 32)
    began = time.monotonic()
    with pytest.raises(AssertionError):
        on_ranks(tmp_path, train_and_die, 3, tmp_path, phase)
    assert time.monotonic() - began < 120
    assert not (tmp_path / "out/model").exists()
    steps = sorted(path.name for path in (tmp_path / "out/checkpoints").glob("step-*"))
    assert steps == (["step-000001", "step-000002"] if phase == "export" else [])
    on_ranks(tmp_path, train, 3, tmp_path)
    assert (tmp_path / "out/model").exists()
    assert not list((tmp_path / "out/checkpoints").glob(".*"))
