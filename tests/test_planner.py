"""remit plan for costs: shapes against real models, arithmetic against numbers done by hand, the command as a user meets it."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import FAMILIES, make_model
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode

from pipelines.cli import parse
from pipelines.plan.costs import plan_costs
from pipelines.plan.measure_score import steady_rate, time_scoring
from pipelines.plan.model import Attention, ModelShape, mean_context, read_config, read_shape, reduced, shape_of
from pipelines.plan.planner import (
    Job,
    Layout,
    Machine,
    Rates,
    costs,
    disk,
    engine_size,
    memory,
    powers_down,
    propose,
    runs_until_paid,
)

Remit = Callable[..., tuple[int, str, str]]
TIED = [False, True]
# P = 8e9: 32 layers of 217e6, and two embeddings of 128,256 x 4,096
EIGHT_B = ModelShape(
    "8b", 8_030_261_248, 6_979_321_856, 128_256, 4096, False, (Attention(8192, None),) * 32, (16384, 86016), 8192
)
ONE_B = ModelShape(
    "1b", 1_235_814_400, 973_078_528, 128_256, 2048, True, (Attention(4096, None),) * 16, (8192, 48128), None
)


def machine(num_gpus: int = 8, memory_gb: float = 141, dtype: str = "bfloat16", share: float = 0.9) -> Machine:
    return Machine("h200", num_gpus, 8, dtype, 989e12, memory_gb * 1e9, share)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models without weights: config.json is all that a plan needs."""
    out = tmp_path_factory.mktemp("configs")
    make_model(out / "base", "Llama", positions=128, num_hidden_layers=3)
    make_model(out / "rl", "Qwen3", positions=128)
    for path in (*out.glob("*/*.safetensors"), *out.glob("*/generation_config.json")):
        path.unlink()
    return out


def plan(remit: Remit, folder: Path, *options: object, code: int = 0) -> tuple[dict, str, str]:
    to = folder / "plan.json"
    to.unlink(missing_ok=True)
    common = ("--base", folder / "base", "--reference", folder / "rl", "--seq-len", 128)
    given = () if "--tokens" in options else ("--tokens", "1e6")
    found, output, error = remit("plan", *common, *given, "--json", to, *options)
    assert found == code, error
    return json.loads(to.read_text()) if to.exists() else {}, output, error


@pytest.mark.parametrize("tied", TIED)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_parameters_are_those_that_are_stored(tmp_path: Path, family: str, tied: bool) -> None:
    make_model(tmp_path, family, tie_word_embeddings=tied, num_key_value_heads=1 if family != "Youtu" else 2)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:  # a tied tensor is stored once
        sizes = {name: file.get_tensor(name).numel() for name in file.keys()}  # noqa: SIM118
    shape = read_shape("--base", tmp_path, "x")
    assert (shape.parameters, shape.tied) == (sum(sizes.values()), tied)
    assert shape.num_layers == 2
    layers = [name for name in sizes if ".layers." in name and "norm" not in name and not name.endswith("bias")]
    assert shape.matrix_parameters == sum(sizes[name] for name in layers)


@pytest.mark.parametrize("family", ["Olmo2", "SmolLM3", "Llama", "Qwen3", "Youtu", "Gemma2"])
def test_flops_are_those_that_torch_counts(tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family)
    shape, config = read_shape("--base", tmp_path, "x"), read_config("--base", tmp_path)
    for seq_len in (7, 48):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=torch.zeros(2, seq_len, dtype=torch.long), use_cache=False).logits.sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        # eager attention computes both halves
        tokens, counted = 2 * seq_len, forward.get_total_flops() + backward.get_total_flops()
        assert tokens * shape.forward_flops(seq_len, causal=False) == pytest.approx(forward.get_total_flops(), rel=0.03)
        assert tokens * shape.train_flops(seq_len, causal=False) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(("seq_len", "window"), [(1, None), (4, None), (4, 2), (9, 1), (5, 5), (5, 50)])
def test_causal_attention_reaches_what_precedes(seq_len: int, window: int | None) -> None:
    reach = [min(position + 1, window or seq_len) for position in range(seq_len)]
    assert mean_context(seq_len, window) == pytest.approx(sum(reach) / seq_len)


def test_only_chosen_experts_compute() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=12,
    )  # fmt: skip
    shape = shape_of("--base", config, "moe")
    attention, router, expert = 16 * (16 + 8 + 8 + 16), 8 * 16, 3 * 16 * 12
    assert shape.matrix_parameters == attention + router + 2 * expert
    assert shape.parameters == 2 * 100 * 16 + attention + router + 8 * expert + 3 * 16 + 2 * 8


def test_sliding_layers_look_back_less(tmp_path: Path) -> None:
    make_model(tmp_path, "Gemma2", sliding_window=8)
    windows = [layer.window for layer in read_shape("--base", tmp_path, "x").attention]
    assert sorted(windows, key=str) == [8, None]


@pytest.mark.parametrize("family", ["Olmo2", "Llama", "Qwen3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_keeps(tmp_path: Path, family: str, dtype: torch.dtype) -> None:
    make_model(tmp_path, family, num_hidden_layers=4, hidden_size=128, intermediate_size=320)
    shape, config = read_shape("--base", tmp_path, "x"), read_config("--base", tmp_path)
    kept = {}
    for layers in (1, 4):  # the difference is three layers and nothing else
        model = transformers.AutoModelForCausalLM.from_config(reduced(config, layers))
        known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, seen: dict = seen, known: set = known) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)
        with low, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.get_decoder()(input_ids=torch.zeros(4, 64, dtype=torch.long), use_cache=False)
        weights = {tuple(p.shape) for p in model.parameters()} | {tuple(p.shape)[::-1] for p in model.parameters()}
        kept[layers] = sum(
            tensor.untyped_storage().nbytes() for tensor in seen.values() if tuple(tensor.shape) not in weights
        )
    element = 4 if dtype == torch.float32 else 2
    in_float32, in_dtype = shape.activation_width
    formula = 3 * 4 * 64 * (4 * in_float32 + element * in_dtype)
    assert 0.75 < formula / (kept[4] - kept[1]) < 1.35


def test_costs_by_hand() -> None:
    # forward 2 x 10 + 2 x 3 x 2 = 32 FLOPs per token, training 96; the reference 64
    base = ModelShape("b", 22, 10, 3, 2, False, (Attention(0, None),), (1, 1), None)
    reference = replace(base, matrix_parameters=26)
    two = Machine("x", 2, 8, "bfloat16", 1000.0, 1e9, 0.9)
    rates = Rates(0.8, 0.5, 0.4, 1.5, 2.0, 30.0, 7.0)
    job = Job(1000, 2.0, 10, 40)  # 200 rows in two epochs, 5 steps
    found = costs(base, reference, two, rates, job, recompute=False)
    assert found.score == pytest.approx(64 * 1000 / (2000 * 0.8) + 30)  # 70
    assert found.ntp == pytest.approx(192 + 5 * 2 + 7)
    assert found.stored == pytest.approx(192 * 1.5 + 17)
    assert found.online_per_epoch == pytest.approx(80)
    assert found.online == pytest.approx(305 + 160)
    assert found.break_even_epochs == pytest.approx(70 / 80)
    assert [runs_until_paid(found, epochs) for epochs in (2, 0.5, 0.875, 0.1)] == [1, 2, 1, 9]
    # activations computed again: one forward of the layers more, without the head
    assert costs(base, reference, two, rates, job, recompute=True).ntp == pytest.approx(192 + 2 * 20 + 17)


def test_gpu_hours_of_an_eight_b_model() -> None:
    """50e9 tokens on 64 H200 at 40 %: 8.75e21 FLOPs and a little, by the rule of six and the attention."""
    config = parse(["plan", "--base", "b", "--reference", "r", "--tokens", "50e9", "--num-gpus", "64"])
    figures = plan_costs(config, EIGHT_B, EIGHT_B)
    products = 6_979_321_856 + 128_256 * 4096
    attention = 32 * 2 * 8192 * 2048.5
    seconds = 50e9 * 3 * (2 * products + attention) / (64 * 989e12 * 0.4) + 120
    assert figures["costs"]["train NTP"]["wall_seconds"] == pytest.approx(seconds)
    assert figures["costs"]["train NTP"]["gpu_hours"] == pytest.approx(seconds * 64 / 3600)
    six = 6 * (products + 128_256 * 4096) * 50e9 / (64 * 989e12 * 0.4)
    assert seconds == pytest.approx(six, rel=0.1)
    assert figures["break_even"]["epochs"] == pytest.approx(1.0, abs=0.01)  # the same forward, once or in every epoch
    assert figures["break_even"]["runs"] == 2  # because engines have to start too
    for total in figures["break_even"]["totals"]:
        stored = figures["costs"]["train ReMiT, stored log-probs"]["gpu_hours"]
        once = figures["costs"]["score once"]["gpu_hours"]
        assert total["stored_gpu_hours"] == pytest.approx(once + total["runs"] * stored)


def test_memory_by_hand() -> None:
    sharded = memory(EIGHT_B, machine(), Layout("full", 8, 2, True), 4096)
    tables = 128_256 * 4096
    assert list(sharded.values()) == pytest.approx(
        [
            *(4 * 8_030_261_248 / 8, 4 * 8_030_261_248 / 8, 8 * 8_030_261_248 / 8),
            2 * (2 * (8_030_261_248 - 2 * tables) / 32 + 2 * tables),
            2 * 2 * 4096 * 4096 * 32 + 2 * 4096 * (4 * 16384 + 2 * 86016),
            4 * 4096 * 128_256,
            4 * tables,
        ]
    )
    alone = memory(ONE_B, machine(1), Layout("replicate", 1, 1, False), 65_536)
    tied = 128_256 * 2048
    assert alone["gathered or cast weights, bfloat16"] == 2 * 1_235_814_400  # tied: once
    assert alone["activations"] == 65_536 * 16 * (4 * 8192 + 2 * 48128)
    assert (alone["logits of one row"], alone["gradient of the output embedding"]) == (3 << 30, 4 * tied)
    exact = memory(ONE_B, machine(1, dtype="float32"), Layout("replicate", 1, 1, False), 64)
    assert exact["gathered or cast weights, float32"] == 0


@pytest.mark.parametrize(
    ("shape", "where", "expected"),
    [
        (ONE_B, machine(1), ("replicate", 1, False)),
        (ONE_B, machine(64), ("replicate", 1, False)),
        (ONE_B, machine(8, 24), ("full", 8, False)),  # a replica does not fit
        (EIGHT_B, machine(8), ("full", 8, False)),
        (EIGHT_B, machine(64), ("hybrid", 8, False)),
        (EIGHT_B, machine(8, 80), ("full", 8, False)),
        (EIGHT_B, machine(8, 40), ("full", 8, True)),
        (EIGHT_B, machine(12), ("full", 12, False)),  # machines of 8 and of 4 are no replicas of each other
        (EIGHT_B, machine(64, 24), ("full", 64, True)),  # not within one machine, but over all
    ],
)
def test_proposals(shape: ModelShape, where: Machine, expected: tuple[str, int, bool]) -> None:
    found = propose(shape, where, Job(10**9, 1, 4096, 64))
    layout = found.layout
    assert found.fits
    assert (layout.sharding, layout.shards, layout.activation_checkpointing) == expected
    assert found.bytes == pytest.approx(sum(memory(shape, where, layout, 4096).values()))
    assert found.bytes <= where.usable_bytes
    bigger = replace(layout, micro_batch_size=2 * layout.micro_batch_size)
    no_more_rows = 2 * layout.micro_batch_size > -(-64 // where.num_gpus)
    assert no_more_rows or sum(memory(shape, where, bigger, 4096).values()) > where.usable_bytes


def test_what_is_given_is_kept_and_what_does_not_fit_says_so() -> None:
    job = Job(10**9, 1, 4096, 64)
    found = propose(EIGHT_B, machine(1, 24), job)
    assert not found.fits
    assert (found.layout.micro_batch_size, found.layout.activation_checkpointing) == (1, True)
    assert found.bytes > 128e9
    kept = propose(ONE_B, machine(8), job, "full", 3, "on")
    assert (kept.fits, kept.layout) == (True, Layout("full", 8, 3, True))
    assert not propose(EIGHT_B, machine(8), job, "replicate").fits
    assert [powers_down(largest) for largest in (1, 2, 5, 8)] == [[1], [2, 1], [5, 4, 2, 1], [8, 4, 2, 1]]


def test_engines_have_room_for_their_weights() -> None:
    """16 GB of weights in 60 % of the memory."""
    assert [engine_size(EIGHT_B, machine(8, gb)) for gb in (141, 24, 12, 3)] == [1, 2, 4, None]
    assert engine_size(EIGHT_B, machine(1, 24)) is None


def test_disk_by_hand() -> None:
    found = disk(Job(1000, 3, 10, 1), packed_bytes=2.0, logprob_bytes=1.4, topk_entry_bytes=4.0, top_k=8)
    assert list(found.values()) == pytest.approx([2000, 1400, 32_000, 35_400, 37_400])


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        *[("50e9", 50 * 10**9), ("50B", 50 * 10**9), ("2.1M", 2_100_000), ("50_000", 50_000), ("1.5t", 15 * 10**11)],
        *[("300k", 300_000), ("1,000", 1000), ("7", 7), ("5E+3", 5000)],
    ],
)
def test_numbers_of_tokens(text: str, tokens: int) -> None:
    assert parse(["plan", "--base", "b", "--reference", "r", "--tokens", text]).num_tokens == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--gpu", "h900"), "--gpu is 'h900', expected one of h200, h100, a100, b200, l40s, rtx4090, cpu"),
        (("--gpu", "h900", "--peak-tflops", "5"), "--gpu-memory-gb too"),
        (("--num-gpus", "0"), "--num-gpus is 0, expected at least 1"),
        (("--tokens", "many"), "--tokens is 'many', expected a whole number of tokens"),
        (("--tokens", "12.5"), "--tokens is '12.5', expected a whole number of tokens"),
        (("--tokens", "-5"), "--tokens"),
        (("--tokens", "0"), "--tokens is '0'"),
        (("--tokens", "nan"), "--tokens is 'nan'"),
        (("--mfu-train", "1.5"), "--mfu-train is 1.5, expected a share"),
        (("--mfu-score", "0"), "--mfu-score is 0, expected a number above 0"),
        (("--epochs", "inf"), "--epochs is inf"),
        (("--update-seconds", "-1"), "--update-seconds is -1, expected 0 or more"),
        (("--seq-len", "1"), "--seq-len is 1, expected at least 2"),
        (("--json", "no-such-folder/x.json"), "its folder does not exist"),
        (("--epsilons", "0.1"), "--epsilons belongs to --weights"),
        (("--shards", "x"), "--shards belongs to --weights"),
        (("--weights",), "--tokens belongs to the plan of costs"),
        (("--sharding", "some"), "some"),
    ],
)
def test_bad_options_are_bad_usage(remit: Remit, options: tuple[str, ...], message: str) -> None:
    given = () if "--tokens" in options else ("--tokens", "1e6")
    code, _, error = remit("plan", "--base", "b", "--reference", "r", *given, *options)
    assert (code, message in " ".join(re.sub("│", "", error).split())) == (2, True), error


def test_what_is_missing_is_named(remit: Remit, folder: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--reference", "r", "--tokens", "5"), "--base is not given"),
        (("--base", "b", "--tokens", "5"), "--reference is not given"),
        (("--base", "b", "--reference", "r"), "--tokens is not given"),
    ):
        code, _, error = remit("plan", *options)
        assert (code, message in error) == (2, True), error
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "t5"}')
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "evil.Config"}}')
    for name, message in (
        ("missing", "no such folder"),
        ("empty", "has no config.json"),
        ("odd", "is no causal language model"),
        ("code", "its config.json cannot be used"),
    ):
        _, _, error = plan(remit, folder, "--base", tmp_path / name, code=1)
        assert message in error
        assert "Traceback" not in error


def test_tables_show_what_json_holds(remit: Remit, folder: Path) -> None:
    figures, output, _ = plan(remit, folder, "--top-k", 8, "--gpu", "a100", "--num-gpus", 16, "--epochs", 2)
    for role in ("base", "reference"):
        assert f"{figures['models'][role]['parameters']:,}" in output
    for name, cost in figures["costs"].items():
        line = next(line for line in output.splitlines() if line.startswith(name))
        assert f"{cost['gpu_hours']:,.4g}" in line
        assert f"{cost['tokens_per_second']:,.0f}" in line
        assert cost["gpu_hours"] == pytest.approx(cost["wall_seconds"] * 16 / 3600)
    for total in figures["break_even"]["totals"]:
        cells = [f"{total['runs']}", f"{total['stored_gpu_hours']:,.4g}", f"{total['online_gpu_hours']:,.4g}"]
        assert any(
            [cell.strip() for cell in line.split("┃")] == cells for line in re.sub("│", "┃", output).splitlines()
        )
    for entry in figures["assumptions"]:
        line = next(line for line in output.splitlines() if line.startswith(f"{entry['option']} "))
        assert f"{entry['value']:.4g}" in line
    assert figures["memory_bytes"]["in all"] == pytest.approx(sum(figures["memory_bytes"].values()) / 2)
    assert figures["disk_bytes"]["top-k entries"] == pytest.approx(1e6 * 8 * 4.3)
    assert f"--micro-batch-size {figures['proposal']['micro_batch_size']}" in output
    assert f"after {figures['break_even']['epochs']:.2f} epochs" in output


def test_every_assumption_is_an_option_that_wins(remit: Remit, folder: Path) -> None:
    before, _, _ = plan(remit, folder, "--gpu", "h100")
    others = {"--logprob-step": 0.5, "--gpus-per-node": 4, "--seq-len": 64, "--global-batch-size": 32, "--top-k": 3}
    assert len(before["assumptions"]) > 15
    for entry in before["assumptions"]:
        value = others.get(entry["option"], entry["value"] * 0.75 + 0.1)
        config = parse(
            *[["plan", "--base", "b", "--reference", "r", "--tokens", "1e6", entry["option"], str(value)]]
        )  # fmt: skip
        shape = read_shape("--base", folder / "base", "b")
        after = {line["option"]: line for line in plan_costs(config, shape, shape)["assumptions"]}
        assert (after[entry["option"]]["value"], after[entry["option"]]["source"]) == (value, "given")
    figures, _, _ = plan(remit, folder, "--gpu", "mine", "--peak-tflops", 2, "--gpu-memory-gb", 3, "--mfu-train", 0.5)
    base = read_shape("--base", folder / "base", "base")
    seconds = 1e6 * base.train_flops(128) / (8 * 2e12 * 0.5) + 120
    assert figures["costs"]["train NTP"]["wall_seconds"] == pytest.approx(seconds)
    assert figures["disk_bytes"]["log-probs"] == pytest.approx(1.4e6)
    exact, _, _ = plan(remit, folder, "--logprob-step", 0)
    assert exact["disk_bytes"]["log-probs"] == pytest.approx(3.8e6)


def test_warnings(remit: Remit, folder: Path) -> None:
    figures, output, _ = plan(remit, folder, "--gpu", "x", "--peak-tflops", 1, "--gpu-memory-gb", 0.00002)
    assert not figures["proposal"]["fits"]
    assert any("training does not fit: the leanest layout needs" in line for line in figures["warnings"])
    assert any("scoring does not fit" in line for line in figures["warnings"])
    assert "warning: training does not fit" in output
    figures, _, _ = plan(remit, folder, "--seq-len", 129, "--num-gpus", 65)
    assert sum("takes rows of at most 128 tokens, --seq-len is 129" in line for line in figures["warnings"]) == 2
    assert any("some have no row in a step" in line for line in figures["warnings"])
    assert plan(remit, folder)[0]["warnings"] == []


def test_measured_rates_are_kept_and_used(remit: Remit, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "here.json"
    options = ("--measure-engine", "transformers", "--measure-seconds", 0.1, "--micro-batch-size", 2)
    first, output, _ = plan(remit, folder, "--gpu", "cpu", "--measure", *options, "--calibration", file)
    kept = json.loads(file.read_text())
    assert (kept["gpu"], kept["dtype"], kept["how"]["layers"]) == ("cpu", "float32", {"base": 3, "reference": 2})
    assert kept["peak_tflops"] > 0
    by_option = {entry["option"]: entry for entry in first["assumptions"]}
    for name in ("mfu_train", "mfu_score", "mfu_online", "remit_cost", "update_seconds", "peak_tflops"):
        entry = by_option[f"--{name.replace('_', '-')}"]
        assert (entry["value"], entry["source"]) == (kept[name], "calibration")
    # the calibrated plan has the measured step: 1e6 tokens are 3,906.25 micro-batches of 2 x 128, 123 steps of 64 rows
    steps = {entry["what"]: entry for entry in first["measured"]}
    measured = steps["NTP, forward and backward"]["measured_seconds"] * 1e6 / 256
    measured += 123 * kept["update_seconds"] + 5
    assert first["costs"]["train NTP"]["wall_seconds"] == pytest.approx(measured)
    for entry in first["measured"]:
        assert entry["ratio"] == pytest.approx(entry["measured_seconds"] / entry["predicted_seconds"])
        assert entry["what"] in output
    again, _, _ = plan(remit, folder, "--calibration", file, "--micro-batch-size", 2)
    assert again["costs"] == first["costs"]
    wins, _, _ = plan(remit, folder, "--calibration", file, "--mfu-train", 0.01)
    assert wins["costs"]["train NTP"] != first["costs"]["train NTP"]
    _, _, error = plan(remit, folder, "--calibration", file, "--gpu", "h100", code=1)
    assert "was measured with gpu cpu, the plan is for h100" in error
    for change, message in (
        ({"version": 9}, "its version is 9, expected 1"),
        ({"mfu_train": -1}, "mfu_train is -1"),
        ({"remit_cost": "1"}, "remit_cost is '1'"),
        ({"gpu": None}, "gpu is None"),
        ({"measured": [3]}, "measured is damaged"),
    ):
        (tmp_path / "bad.json").write_text(json.dumps(kept | change))
        _, _, error = plan(remit, folder, "--calibration", tmp_path / "bad.json", code=1)
        assert message in error
    none = tmp_path / "none.json"
    assert f"{none}: no such file; write it with" in plan(remit, folder, "--calibration", none, code=1)[2]
    (tmp_path / "bad.json").write_text("{")
    assert "cannot be read" in plan(remit, folder, "--calibration", tmp_path / "bad.json", code=1)[2]


def test_a_deep_model_is_timed_at_two_depths(folder: Path) -> None:
    from pipelines.plan.measure import Times, cut, fitting

    few, many = Times(1.0, 2.0, 3.0, 0.5), Times(1.5, 2.5, 3.25, 0.5)  # at 2 and 4 layers
    assert many.line_through(few, 4, 2, 32) == Times(8.5, 9.5, 6.75, 0.5)
    half = cut(EIGHT_B, 16)
    assert half.parameters == 2 * 128_256 * 4096 + (EIGHT_B.parameters - 2 * 128_256 * 4096) // 2
    assert (half.num_layers, half.matrix_parameters) == (16, EIGHT_B.matrix_parameters // 2)
    laptop = Machine("cpu", 1, 8, "float32", 1e12, 64e9, 0.9)
    rows, layers = fitting(EIGHT_B, EIGHT_B, laptop, Job(10**9, 1, 512, 64), Layout("replicate", 1, 8, False), 8)
    assert rows == 1
    assert 1 <= layers[0] == layers[1] < 16
    large = replace(laptop, peak_flops=1e15, memory_bytes=1e12)
    job, layout = Job(10**9, 1, 512, 64), Layout("replicate", 1, 8, False)
    assert fitting(EIGHT_B, EIGHT_B, large, job, layout, 8) == (8, (32, 32))


def test_remit_score_is_timed_for_real(tmp_path: Path) -> None:
    config = read_config("--reference", make_model(tmp_path / "model", positions=64))
    tokens, start_seconds, seconds = time_scoring(config, 1, 32, 40)
    assert tokens == 16 * 2 * 32  # 16 parts of 2 rows
    assert start_seconds > 0
    assert seconds > 0


def test_rate_of_scoring_is_that_with_all_engines() -> None:
    # 100 tokens/s by one engine until 21 s, then 250 by two; the run ends some time after its last token
    seen = [(10.0, 0, 0), (19.0, 0, 1), (20.0, 50, 1), (21.0, 150, 2), (22.0, 400, 2), (23.0, 650, 2), (24.0, 650, 0)]
    assert steady_rate(seen, 60.0) == (650, pytest.approx(650 / 250))
    assert steady_rate([(10.0, 0, 1), (20.0, 50, 1)], 60.0) == (50, 60.0)
    assert steady_rate([(10.0, 0, 1), (11.0, 1, 1), (20.0, 2, 1)], 12.0) == (2, 12.0)


def test_a_plan_needs_no_weights_and_no_engine(folder: Path) -> None:
    script = (
        "import sys, pipelines.cli\n"
        f"try: pipelines.cli.main(['plan', '--base', {str(folder / 'base')!r}, '--reference', {str(folder / 'rl')!r}, "
        "'--tokens', '5B', '--seq-len', '64'])\n"
        "except SystemExit as done: print(done.code, sorted({'vllm', 'ray', 'plotly'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "0 []"
