"""Experts in bfloat16, and on more ranks than there are experts."""

from pathlib import Path

import pytest
import torch
import transformers
from annotated import run
from safetensors.torch import load_file
from test_distributed import assert_same, finish, launch, metrics_of
from test_experts import BALANCED, SIZES, make, make_rows
from torch.utils._python_dispatch import TorchDispatchMode

from trainer.batch import collate
from trainer.expert_products import IN_AUTOCAST
from trainer.loss_model import LossModel
from trainer.model import load_base
from trainer.objectives.ntp import NTP
from trainer.statistics import StepStatistics

CPU = torch.device("cpu")


class Products(TorchDispatchMode):
    """Notes the dtypes of grouped products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[tuple[torch.dtype, ...]] = []

    def __torch_dispatch__(self, function, types, arguments=(), settings=None):  # type: ignore[no-untyped-def]
        if "grouped_mm" in str(function):
            self.dtypes.append(tuple(value.dtype for value in arguments[:2]))
        return function(*arguments, **(settings or {}))


def gradients(folder: Path, dtype: str, compiled: bool = False) -> tuple[dict[str, torch.Tensor], Products]:
    base = load_base(folder, dtype, CPU)
    base.prepare(False, "on" if compiled else "off")
    rows = make_rows([21, 9, 14])
    with Products() as products:
        LossModel(base)(collate(rows, "packed", CPU), NTP, 1, 1, StepStatistics()).backward()
    return {name: p.grad for name, p in base.model.named_parameters() if p.grad is not None}, products


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss"])
def test_products_of_experts_are_in_bfloat16(tmp_path: Path, family: str) -> None:
    """Of one process or DDP, whose weights are in float32: forward and backward, gradients in float32 and near float32's."""
    folder = make(tmp_path, family)
    exact, plain = gradients(folder, "float32")
    assert {dtype for dtypes in plain.dtypes for dtype in dtypes} == {torch.float32}
    found, products = gradients(folder, "bfloat16")
    layers = SIZES["num_hidden_layers"]
    assert len(products.dtypes) >= 2 * layers  # and those of the backward
    assert {dtype for dtypes in products.dtypes for dtype in dtypes} == {torch.bfloat16}
    assert found.keys() == exact.keys()
    for name in found:
        assert found[name].dtype == torch.float32
        if "experts" in name and exact[name].norm() > 0:
            assert (found[name] - exact[name]).norm() < 0.1 * exact[name].norm(), name


@pytest.mark.usefixtures("starts_processes")
def test_they_can_be_compiled(tmp_path: Path) -> None:
    folder = make(tmp_path, "Qwen3Moe")
    plain, _ = gradients(folder, "bfloat16")
    compiled, _ = gradients(folder, "bfloat16", compiled=True)
    for name in plain:
        assert (plain[name] - compiled[name]).norm() <= 0.05 * plain[name].norm() + 1e-4, name


def test_float32_and_dense_bases_are_left_alone(tmp_path: Path, models: dict[str, Path]) -> None:
    for folder, dtype, expected in (
        (make(tmp_path, "Mixtral"), "float32", "grouped_mm"),
        (make(tmp_path / "low", "Mixtral"), "bfloat16", IN_AUTOCAST),
    ):
        base = load_base(folder, dtype, CPU)
        base.prepare(False, "off")
        assert base.model.config._experts_implementation == expected
        assert "experts_implementation" not in base.model.config.to_json_string()
    assert set(BALANCED) >= {"Mixtral"}
    base = load_base(models["base"], "bfloat16", CPU)
    base.prepare(False, "off")  # which has no experts to set


@pytest.mark.usefixtures("starts_processes")
def test_two_experts_on_three_ranks(tmp_path: Path, annotated: dict[str, Path]) -> None:
    """A rank without any part of the experts: losses, gradient norms and weights are those of one process, also when it goes on
    from a checkpoint."""
    base = make(tmp_path / "base", "Mixtral", num_local_experts=2, num_experts_per_tok=1)
    shapes = {name: p.shape for name, p in transformers.AutoModelForCausalLM.from_pretrained(base).named_parameters()}
    assert any(shape[0] == 2 and len(shape) == 3 for shape in shapes.values())
    shards = annotated["packed"]
    options: dict = {"router_aux_loss": 0.5, "global_batch_size": 7, "micro_batch_size": 1, "schedule": "constant"}
    one = run(tmp_path / "one", shards, base, max_steps=5, **options)
    out, words = tmp_path / "three", ("--router-aux-loss", 0.5, "--sharding", "full", "--schedule", "constant")
    words += ("--checkpoint-every", 2, "--warmup-steps", 1, "--micro-batch-size", 1)  # what is balanced together
    finish(launch(out, shards, base, 3, *words, "--max-steps", 3))
    finish(launch(out, shards, base, 3, *words))
    assert_same(metrics_of(out), one, 1e-4)
    for got, want in zip(metrics_of(out), one):
        assert got["router_aux_loss"] == pytest.approx(want["router_aux_loss"], rel=1e-4)
    got, want = (load_file(folder / "model/model.safetensors") for folder in (out, tmp_path / "one"))
    assert got.keys() == want.keys()
    assert any("experts" in name for name in got)
    assert all((got[name] - want[name]).abs().max() < 1e-4 for name in want)
