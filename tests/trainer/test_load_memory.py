"""A base is loaded, trained, saved and exported by processes that could not hold it, under a limit that the kernel enforces."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from in_shares import on_ranks

from benchmarks.load_memory import SEQ_LEN, Phases, Settings, expected, load_and_export, make_base
from benchmarks.memory_limit import Limits, own_bytes
from benchmarks.random_shards import make_shards
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.model import load_base
from trainer.train import train

RANKS, VOCABULARY, GIGABYTES = 4, 2000, 0.6
SETTINGS = Settings(GIGABYTES, RANKS, VOCABULARY, phase="export")
TRAINED = replace(SETTINGS, phase="all")
MARGIN = 150_000_000
"""For what else counts: stacks of threads, buffers."""


def enter(limits: Limits, world: World) -> None:
    """Beside what it has of the process that it was forked from."""
    limits.size += own_bytes()
    limits.enter(world.rank)


def load_whole(world: World, limits: Limits, folder: Path) -> None:
    enter(limits, world)
    load_base(folder / "base", "float32", world.device, "packed", world, "replicate")


def load_in_shares(world: World, limits: Limits, folder: Path) -> None:
    enter(limits, world)
    load_and_export(SETTINGS, folder, Phases())


def train_a_step(world: World, limits: Limits, folder: Path) -> None:
    enter(limits, world)
    config = TrainConfig(
        shards=(str(folder / "shards"),), model=str(folder / "base"), out=folder / "trained", objective="ntp", dtype="float32",
        max_steps=1, global_batch_size=world.size, sharding="full", checkpoint_every=1,
    )  # fmt: skip
    assert train(config).finished


def under(limit: int, call: Any, folder: Path) -> None:
    files = sum(file.stat().st_size for file in (folder / "base").glob("*.safetensors"))
    limits = Limits(limit, RANKS, "data", files)  # a control group would count what they write to of their parent
    try:
        on_ranks(folder, call, RANKS, limits, folder)
    finally:
        limits.remove()


@pytest.mark.slow
@pytest.mark.usefixtures("starts_processes")
def test_no_process_holds_more_than_its_share(tmp_path: Path) -> None:
    size = make_base(tmp_path / "base", GIGABYTES, VOCABULARY, 768, "bfloat16")
    make_shards(tmp_path / "shards", VOCABULARY, 1, 64, SEQ_LEN)
    whole, needed = 4 * size["parameters"], expected(SETTINGS, size)
    limit = int(max(needed["read"], needed["checks"], needed["export"])) + MARGIN
    assert limit < 0.75 * whole
    under(limit, load_in_shares, tmp_path)
    with pytest.raises(AssertionError, match=r"(?s)ranks ended with \[.*(-9|allocate)"):
        under(limit, load_whole, tmp_path)
    limit = int(expected(TRAINED, size)["train"]) + 2 * MARGIN  # twice as many threads
    assert limit < 2 * whole  # weights, gradients and moments are four times the whole without shares
    under(limit, train_a_step, tmp_path)
    assert (tmp_path / "trained" / "model" / "config.json").exists()
