"""--float8 with torchao, emulated: which layers are in 8 bit, that the numerics are float8's, that it is part of what a run is.

This needs torchao and no published model; tests/trainer/test_float8.py has what needs neither.
"""

import json
from pathlib import Path

import pytest
import torch
from annotated import run
from conftest import make_model
from safetensors.torch import load_file
from test_distributed import finish, launch, metrics_of
from test_experts import make

from trainer.float8 import is_suitable, use_float8
from trainer.model import load_base

pytestmark = pytest.mark.real

CPU = torch.device("cpu")
EMULATED: dict = {"float8": True, "float8_emulated": True, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    return make_model(tmp_path_factory.mktemp("float8") / "base", "Llama", positions=128, **sizes)


def rounded(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """To float8 with the scale that brings the largest entry to the largest number, by the definition, in float64."""
    largest = torch.finfo(dtype).max
    scale = largest / values.abs().max().double()
    return (values.double() * scale).clamp(-largest, largest).to(torch.float32).to(dtype).double() / scale


def test_products_are_of_rounded_operands(base: Path) -> None:
    """Output and both gradients of a layer against products in float64 of operands that were rounded by hand."""
    loaded = load_base(base, "bfloat16", CPU)
    line = use_float8(loaded, emulated=True)
    assert line.startswith("float8, emulated: 14 of 14 linear layers, ")
    layer = loaded.layers[0].mlp.up_proj
    torch.manual_seed(2)
    inputs = torch.randn(3, 17, 64, dtype=torch.bfloat16, requires_grad=True)  # 51 tokens, no multiple of 16
    grad = torch.randn(3, 17, 96, dtype=torch.bfloat16)
    output = layer(inputs)
    output.backward(grad)
    x, w = rounded(inputs.detach(), torch.float8_e4m3fn), rounded(layer.weight.detach(), torch.float8_e4m3fn)
    g = rounded(grad, torch.float8_e5m2)
    for found, wanted in (
        (output, x @ w.T), (inputs.grad, g @ w), (layer.weight.grad, g.flatten(0, 1).T @ x.flatten(0, 1)),
    ):  # fmt: skip
        assert (found.double() - wanted).norm() < 0.004 * wanted.norm()  # bfloat16 results
    assert output.dtype == torch.bfloat16
    assert layer.weight.grad.dtype == torch.float32
    exact = inputs.detach().double() @ layer.weight.detach().double().T
    assert (output.double() - exact).norm() > 0.01 * exact.norm()


def test_what_stays_in_bfloat16(tmp_path: Path) -> None:
    loaded = load_base(make(tmp_path / "moe", "Qwen2Moe"), "bfloat16", CPU)
    names = {name for name, _ in loaded.model.named_parameters()}
    use_float8(loaded, emulated=True)
    kinds = {name: type(module).__name__ for name, module in loaded.model.named_modules()}
    in_float8 = {name for name, kind in kinds.items() if kind == "Float8Linear"}
    assert "model.layers.0.self_attn.q_proj" in in_float8
    assert "model.layers.1.mlp.shared_expert.gate_proj" in in_float8
    assert "lm_head" not in in_float8
    assert not any(name.endswith(("mlp.gate", "shared_expert_gate")) for name in in_float8)
    assert {name for name, _ in loaded.model.named_parameters()} == names == set(loaded.model.state_dict())
    for name, sizes, suits in (
        ("mlp.gate_proj", (64, 96), True), ("mlp.gate", (64, 16), False), ("block.router.layer", (64, 16), False),
        ("q_proj", (64, 24), False), ("q_proj", (40, 32), False),
    ):  # fmt: skip
        assert is_suitable(torch.nn.Linear(*sizes), name) == suits
    odd = make_model(
        tmp_path / "odd",
        "Llama",
        positions=64,
        hidden_size=40,
        intermediate_size=40,
        num_attention_heads=1,
        head_dim=40,
    )
    with pytest.raises(ValueError, match=r"--float8: LlamaForCausalLM has no linear layer .* multiples of 16"):
        use_float8(load_base(odd, "bfloat16", CPU), emulated=True)


def test_a_run_is_another_one_and_near_bfloat16s(tmp_path: Path, annotated: dict[str, Path], base: Path) -> None:
    settings: dict = {"max_steps": 8, "learning_rate": 3e-3, "checkpoint_every": 4}
    plain = run(tmp_path / "plain", annotated["packed"], base, dtype="bfloat16", **settings)
    found = run(tmp_path / "float8", annotated["packed"], base, **EMULATED, **settings)
    assert found[0]["ntp_loss"] != plain[0]["ntp_loss"]
    for a, b in zip(found, plain):
        assert a["ntp_loss"] == pytest.approx(b["ntp_loss"], rel=0.02)
        assert a["model_flops_per_token"] == b["model_flops_per_token"]
    assert found[-1]["ntp_loss"] < found[0]["ntp_loss"] - 0.1
    record = json.loads((tmp_path / "float8/run.json").read_text())
    assert record["float8"] is record["float8_emulated"] is True
    names = [set(load_file(tmp_path / out / "model/model.safetensors")) for out in ("plain", "float8")]
    assert names[0] == names[1]
    with pytest.raises(ValueError, match="--float8 is true there, not set"):
        run(tmp_path / "float8", annotated["packed"], base, dtype="bfloat16", **settings)
    # the same command again, from a checkpoint: bit for bit
    whole = (tmp_path / "float8/model/model.safetensors").read_bytes()
    for path in ("model", "checkpoints/step-000008"):
        (tmp_path / "float8" / path).rename(tmp_path / f"away-{path.partition('/')[0]}")
    again = run(tmp_path / "float8", annotated["packed"], base, **EMULATED, **settings)
    assert [line["loss"] for line in again] == [line["loss"] for line in found]
    assert (tmp_path / "float8/model/model.safetensors").read_bytes() == whole


@pytest.mark.parametrize("sharding", ["replicate", "full"])
@pytest.mark.usefixtures("starts_processes")
def test_two_processes(tmp_path: Path, annotated: dict[str, Path], base: Path, sharding: str) -> None:
    """Scales are of a process's own rows, so losses agree to float8's rounding."""
    one = run(
        tmp_path / "one", annotated["packed"], base, **EMULATED, max_steps=3, global_batch_size=6, micro_batch_size=1
    )
    words = ("--float8", "--float8-emulated", "--dtype", "bfloat16", "--sharding", sharding, "--global-batch-size", 6)
    finish(launch(tmp_path / "two", annotated["packed"], base, 2, *words, "--micro-batch-size", 1, "--max-steps", 3))
    for got, want in zip(metrics_of(tmp_path / "two"), one):
        assert got["ntp_loss"] == pytest.approx(want["ntp_loss"], rel=5e-3)
