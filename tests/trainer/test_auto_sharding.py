"""--sharding auto against sums by hand, with machines and memory that are not there."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model

import trainer.auto_sharding
import trainer.memory
from trainer.auto_sharding import choose_sharding, fitting_sharding
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.model_shape import ModelShape
from trainer.session import Session

MIXED: Any = SimpleNamespace(first=SimpleNamespace(manifest=SimpleNamespace(seq_len=1000)))
# 20 layers of 40 million parameters and two embeddings of 50,000 x 2,000; 100 kB are kept per token
ONE_B = ModelShape("1b", 1_000_000_000, 50_000, 2000, False, 20, 0, 0, 100_000, None)
REST = 0.2 + 0.2 + 0.4  # GB: 2 rows of 1,000 tokens; the logits of one; the gradient of the output embedding
REST_16 = REST + 0.4  # in 16 bits that gradient comes beside its sum
# weights, gradients, moments: 16 GB over the shards. Gathered: 2 layers and the embeddings, 280 million; cast: 900 million
NEEDED = {
    ("replicate", "float32"): 16 + REST,
    ("replicate", "bfloat16"): 16 + 1.8 + REST_16,
    ("hybrid", "float32"): 4 + 1.12 + REST,
    ("hybrid", "bfloat16"): 4 + 0.56 + REST_16,
    ("full", "float32"): 2 + 1.12 + REST,
    ("full", "bfloat16"): 2 + 0.56 + REST_16,
}
KINDS = ["replicate", "hybrid", "full"]


def session_of(machines: int, notes: list[str]) -> Session:
    world = World(torch.device("cpu"), 0, 8, 8 // machines)
    return Session(world, None, lambda *step: None, lambda: False, notes.append, lambda name: None)


def config_of(folder: Path, **settings: Any) -> TrainConfig:
    return TrainConfig(
        shards=("shards",), model=str(folder), out=folder / "out", objective="ntp", max_steps=1,
        global_batch_size=16, **{"micro_batch_size": 2, "dtype": "float32"} | settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("base"), "Llama")


def remember(monkeypatch: pytest.MonkeyPatch, shape: ModelShape | ValueError, gigabytes: float) -> None:
    def count(*arguments: object) -> ModelShape:
        if isinstance(shape, ValueError):
            raise shape
        return shape

    monkeypatch.setattr(trainer.auto_sharding, "count", count)
    monkeypatch.setattr(trainer.auto_sharding, "device_bytes", lambda world: gigabytes * 1e9)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_that_fits(monkeypatch: pytest.MonkeyPatch, base: Path, kind: str, dtype: str) -> None:
    needed = {one: NEEDED[one, dtype] for one in KINDS}
    for share, wanted in ((1.001, kind), (0.999, KINDS[min(KINDS.index(kind) + 1, 2)])):
        usable = share * needed[kind]
        remember(monkeypatch, ONE_B, usable / 0.9)
        notes: list[str] = []
        assert fitting_sharding(config_of(base, dtype=dtype), session_of(2, notes), MIXED) == wanted
        is_first_and_fits = wanted == "replicate"
        assert notes == (
            []
            if is_first_and_fits
            else [
                f"--sharding auto: {wanted}, which takes {needed[wanted]:,.3g} GB per process by the formula of remit plan; "
                f"replicate takes {needed['replicate']:,.3g} GB, and {usable:,.3g} GB may be filled"
            ]
        )


def test_one_machine_has_no_hybrid(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    remember(monkeypatch, ONE_B, 10)
    notes: list[str] = []
    assert fitting_sharding(config_of(base), session_of(1, notes), MIXED) == "full"
    assert notes[0].startswith("--sharding auto: full, which takes 3.92 GB per process")


def test_rows_and_checkpointing_count(monkeypatch: pytest.MonkeyPatch, base: Path) -> None:
    """50 rows keep 5 GB; with checkpointing their inputs of 20 layers, 8 GB in float32, and one layer, 0.25 GB."""
    for checkpointing, kept in ((False, 5.0), (True, 8.25)):
        needed = NEEDED["replicate", "float32"] - 0.2 + kept
        for share, wanted in ((1.001, "replicate"), (0.999, "hybrid")):
            remember(monkeypatch, ONE_B, share * needed / 0.9)
            config = config_of(base, micro_batch_size=50, activation_checkpointing=checkpointing)
            assert fitting_sharding(config, session_of(2, []), MIXED) == wanted


@pytest.mark.parametrize(
    ("limit", "machines", "kind"), [(10**9, 2, "replicate"), (1000, 2, "hybrid"), (1000, 1, "full")]
)
def test_a_base_that_cannot_be_counted_goes_by_its_parameters(
    monkeypatch: pytest.MonkeyPatch, base: Path, limit: int, machines: int, kind: str
) -> None:
    remember(monkeypatch, ValueError("cannot be counted without weights"), 1e-9)
    monkeypatch.setattr(trainer.memory, "DDP_PARAMETERS", limit)
    notes: list[str] = []
    assert fitting_sharding(config_of(base), session_of(machines, notes), MIXED) == kind
    assert notes == []


def test_what_is_asked_for_is_taken(base: Path) -> None:
    assert choose_sharding(config_of(base, sharding="hybrid"), session_of(2, []), MIXED) == "hybrid"
    alone = Session(World(torch.device("cpu")), None, lambda *step: None, lambda: False, print, lambda name: None)
    assert choose_sharding(config_of(base, sharding="full"), alone, MIXED) == "replicate"
