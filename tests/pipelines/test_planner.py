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
from pipelines.plan.costs import Rates, costs, disk, step_of
from pipelines.plan.figures import plan_costs
from pipelines.plan.hardware import Machine
from pipelines.plan.layout import Job, engine_size, exchange, powers_down, propose
from pipelines.plan.presets import find_model, read_config
from pipelines.plan.rmt import RmtJob, seconds_of, tokens_of
from trainer.memory import Layout, memory
from trainer.model_shape import ModelShape, count, mean_context

Remit = Callable[..., tuple[int, str, str]]
TIED = [False, True]
# 32 layers of 217e6 parameters, and two embeddings of 128,256 x 4,096; attention of width 8,192 over rows of 4,096
EIGHT_B = ModelShape(
    "8b", 8_030_261_248, 128_256, 4096, False, 32, 2 * 6_979_321_856, 32 * 2 * 8192 * 2048.5, 32 * 237_568, 8192
)  # fmt: skip
ONE_B = ModelShape(
    "1b", 1_235_814_400, 128_256, 2048, True, 16, 2 * 973_078_528, 16 * 2 * 4096 * 2048.5, 16 * 129_024, None
)  # fmt: skip


def machine(num_gpus: int = 8, memory_gb: float = 141, dtype: str = "bfloat16", share: float = 0.9) -> Machine:
    return Machine("h200", num_gpus, 8, dtype, 989e12, memory_gb * 1e9, share)


def read_shape(folder: Path, seq_len: int = 48, dtype: str = "float32") -> ModelShape:
    return count("--base", read_config("--base", folder), "x", seq_len, dtype)


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
    shape = read_shape(tmp_path)
    assert (shape.parameters, shape.tied, shape.num_layers) == (sum(sizes.values()), tied, 2)
    layers = [name for name in sizes if ".layers." in name and "norm" not in name and not name.endswith("bias")]
    assert shape.matrix_flops == 2 * sum(sizes[name] for name in layers)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_flops_are_those_of_a_real_forward_and_backward(tmp_path: Path, family: str) -> None:
    make_model(tmp_path, family)
    config = read_config("--base", tmp_path)
    for seq_len in (7, 48):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        with FlopCounterMode(display=False) as forward:
            loss = model(input_ids=torch.zeros(2, seq_len, dtype=torch.long), use_cache=False).logits.sum()
        with FlopCounterMode(display=False) as backward:
            loss.backward()
        shape = read_shape(tmp_path, seq_len)
        # eager attention computes both halves
        whole = shape.attention_flops * seq_len / mean_context(seq_len) - shape.attention_flops
        tokens, counted = 2 * seq_len, forward.get_total_flops() + backward.get_total_flops()
        assert tokens * (shape.forward_flops + whole) == pytest.approx(forward.get_total_flops(), rel=0.001)
        assert tokens * (shape.train_flops + 3 * whole) == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize(("seq_len", "window"), [(1, None), (4, None), (4, 2), (9, 1), (5, 5), (5, 50)])
def test_causal_attention_reaches_what_precedes(seq_len: int, window: int | None) -> None:
    reach = [min(position + 1, window or seq_len) for position in range(seq_len)]
    assert mean_context(seq_len, window) == pytest.approx(sum(reach) / seq_len)


def test_only_chosen_experts_compute() -> None:
    config = transformers.Qwen3MoeConfig(
        vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=12,
    )  # fmt: skip
    shape = count("--base", config, "moe", 16)
    attention, router, expert = 16 * (16 + 8 + 8 + 16), 8 * 16, 3 * 16 * 12
    assert shape.matrix_flops == 2 * (attention + router + 2 * expert)
    assert shape.parameters == 2 * 100 * 16 + attention + router + 8 * expert + 3 * 16 + 2 * 8


def test_sliding_layers_look_back_less(tmp_path: Path) -> None:
    make_model(tmp_path, "Gemma2", sliding_window=8)
    width = 2 * (32 + 32)
    everything, back = (48 + 1) / 2, (sum(range(1, 9)) + 40 * 8) / 48
    assert read_shape(tmp_path).attention_flops == pytest.approx(2 * width * (everything + back))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [(family, dtype) for family in ("Olmo2", "Llama", "Qwen3", "Gemma2", "Cohere") for dtype in ("float32", "bfloat16")]
    + [("Qwen3Moe", "float32")],  # in bfloat16 autocast leaves the experts in float32, and sharded weights do not
)
def test_activations_are_those_that_autograd_keeps(tmp_path: Path, family: str, dtype: str) -> None:
    """On a CPU, of real tensors; two rows less one, so that what is kept once does not count."""
    sizes = {"num_hidden_layers": 2, "hidden_size": 128, "intermediate_size": 320, "num_attention_heads": 4}
    if family == "Qwen3Moe":
        sizes |= {"num_key_value_heads": 2, "head_dim": 32, "num_experts": 4, "num_experts_per_tok": 2}
        config = transformers.Qwen3MoeConfig(**sizes, moe_intermediate_size=96, vocab_size=64)
    else:
        config = read_config("--base", make_model(tmp_path, family, **sizes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    known = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = []
    for rows in (1, 2):
        seen: dict[int, torch.Tensor] = {}

        def keep(tensor: torch.Tensor, seen: dict = seen) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                seen[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        low = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16", cache_enabled=False)
        with low, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.get_decoder()(input_ids=torch.zeros(rows, 64, dtype=torch.long), use_cache=False)
        kept.append(sum(tensor.untyped_storage().nbytes() for tensor in seen.values()))
    found = count("--base", config, "x", 64, dtype).kept_bytes * 64
    assert found == pytest.approx(kept[1] - kept[0], rel=0.1)


def test_presets_are_the_models_that_they_are_called_after() -> None:
    """Parameters as on their model cards; FLOPs per token at 4,096 by hand."""

    def shape(name: str, seq_len: int = 64) -> ModelShape:
        found, name = find_model("--base", name)
        return count("--base", read_config("--base", found), name, seq_len)

    one = shape("olmo2-1b", 4096)
    assert (one.parameters, one.max_position) == (1_484_916_736, 4096)
    layer = 4 * 2048**2 + 3 * 2048 * 8192
    assert one.forward_flops == 2 * 16 * layer + 16 * 2 * 2 * 2048 * 2048.5 + 2 * 100_352 * 2048
    assert shape("llama3-8b").parameters == 8_030_261_248
    assert shape("olmo2-7b").parameters == 7_298_617_344


def test_costs_by_hand() -> None:
    job = Job.of_full_rows(1000, 2.0, 10, 40)  # 200 rows in two epochs, 5 steps of 40
    rates = Rates(score=0.04, train=0.1, online=0.05, remit_cost=1.5, score_start_seconds=30.0, train_start_seconds=7.0)
    two = replace(machine(2), link=1000.0)
    base = replace(ONE_B, parameters=22)
    alone = Layout("replicate", 1, 20, False)
    step = step_of(base, two, rates, job, alone)
    # 20 rows of 10 tokens; half of 2 x 4 bytes x 22 parameters go each way, beside the whole backward
    assert (step.compute, step.exchange, step.waits) == pytest.approx((20, 0.088, 0))
    found = costs(step, two, rates, job)
    assert found.score == pytest.approx(0.04 * 1000 / 2 + 30)  # 50
    assert found.ntp == pytest.approx(5 * 20 + 7)
    assert found.stored == pytest.approx(5 * 20 * 1.5 + 7)
    assert found.online_per_epoch == pytest.approx(25)
    assert found.online == pytest.approx(157 + 50)
    assert found.break_even_epochs == pytest.approx(2)
    assert [found.runs_until_paid(epochs) for epochs in (2, 0.5, 2.5, 0.1)] == [1, 4, 1, 20]
    # a slow link: 880 s, beside 2/3 of 20 s, or of the last of four micro-batches
    slow = replace(two, link=0.1)
    assert step_of(base, slow, rates, job, alone).waits == pytest.approx(880 - 40 / 3)
    quarter = step_of(base, slow, rates, job, replace(alone, micro_batch_size=5))
    assert quarter.waits == pytest.approx(880 - 10 / 3)
    assert costs(quarter, slow, rates, job).ntp == pytest.approx(5 * (20 + 880 - 10 / 3) + 7)


def test_gpus_without_a_row_wait() -> None:
    job = Job.of_full_rows(10_000, 1.0, 10, 40)
    rates = Rates(0.04, 0.1, 0.05, 1.0, 0.0, 0.0)
    hours = {}
    for num_gpus in (20, 30, 40, 80):
        many = machine(num_gpus)
        hours[num_gpus] = costs(
            step_of(ONE_B, many, rates, job, Layout("replicate", 1, 1, False)), many, rates, job
        ).ntp
    # 40 rows on 30 GPUs take as long as on 20, on 80 as long as on 40
    assert hours == pytest.approx({20: 25 * 2, 30: 25 * 2, 40: 25, 80: 25})


@pytest.mark.parametrize(
    ("layout", "num_gpus", "expected"),
    [
        (Layout("replicate", 1, 1, False), 8, (7 / 8 * 8, 0)),  # once per step, in float32
        (Layout("replicate", 1, 1, False), 64, (0, 63 / 64 * 8)),
        (Layout("full", 8, 1, False), 8, (7 / 8 * (2 + 2 + 4) * 3, 0)),  # each of three micro-batches
        (Layout("full", 64, 1, False), 64, (0, 63 / 64 * (2 + 2 + 4) * 3)),
        (Layout("hybrid", 8, 1, False), 64, (7 / 8 * (2 + 2 + 4) * 3, 7 / 8 * 8 / 8)),
        (Layout("hybrid", 8, 1, False), 8, (7 / 8 * (2 + 2 + 4) * 3, 0)),
        (Layout("replicate", 1, 1, False), 1, (0, 0)),
    ],
)
def test_exchange_by_hand(layout: Layout, num_gpus: int, expected: tuple[float, float]) -> None:
    found = exchange(EIGHT_B, machine(num_gpus), layout, 3)
    assert found == pytest.approx(tuple(8_030_261_248 * share for share in expected))


def test_machines_exchange_beside_the_last_backward_of_a_step() -> None:
    """Two machines of eight, three micro-batches: 462 bytes within, 11 between in the last third of two thirds of 3 s."""
    slow = replace(machine(16), link=1000.0, network=1.0)
    rates = Rates(0.04, 0.1, 0.05, 1.0, 0.0, 0.0)
    job, base = Job.of_full_rows(1000, 1.0, 10, 40), replace(ONE_B, parameters=22)
    step = step_of(base, slow, rates, job, Layout("hybrid", 8, 1, False))
    assert (step.compute, step.exchange, step.waits) == pytest.approx((3, 0.462 + 11, 11 - 2 / 3))


def test_gpu_hours_of_an_eight_b_model() -> None:
    """50e9 tokens on 64 H200 at 40 %: 8.75e21 FLOPs and a little, by the rule of six and the attention."""
    common = ["plan", "--base", "b", "--reference", "r", "--tokens", "50e9", "--num-gpus", "64", "--mfu-train", "0.4"]
    figures = plan_costs(parse(common), EIGHT_B, EIGHT_B)
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
    # checkpointing computes the layers once more
    again = plan_costs(parse([*common, "--activation-checkpointing", "on"]), EIGHT_B, EIGHT_B)
    more = 50e9 * (2 * 6_979_321_856 + attention) / (64 * 989e12 * 0.4)
    assert again["costs"]["train NTP"]["wall_seconds"] == pytest.approx(seconds + more)


def test_replicas_of_a_one_b_model_wait_for_the_network() -> None:
    """64 H100 with one row each: 11.7 GB at 50 GB/s are 234 ms, the row takes 78 ms, two thirds of which hide it."""
    common = ["plan", "--base", "b", "--reference", "r", "--tokens", "50e9", "--num-gpus", "64", "--gpu", "h100"]
    one = replace(ONE_B, parameters=1_484_916_736)
    found = {
        rows: plan_costs(parse([*common, "--global-batch-size", str(rows)]), one, one) for rows in (32, 64, 512)
    }  # fmt: skip
    row = 4096 * one.train_flops / (989e12 * 0.45)
    sent = 63 / 64 * 8 * 1_484_916_736 / 50e9
    for rows, figures in found.items():
        step = figures["step"]
        assert step["compute_seconds"] == pytest.approx(row * max(1, rows / 64))
        assert step["exchange_seconds"] == pytest.approx(sent)
        last = figures["proposal"]["micro_batch_size"]
        hidden = min(sent, 2 / 3 * row * last)
        seconds = 50e9 / 4096 / rows * (step["compute_seconds"] + sent - hidden) + 120
        assert figures["costs"]["train NTP"]["wall_seconds"] == pytest.approx(seconds)
    hours = {rows: figures["costs"]["train NTP"]["wall_seconds"] - 120 for rows, figures in found.items()}
    assert hours[32] == pytest.approx(2 * hours[64])  # half of the GPUs idle
    assert hours[512] < hours[64] / 2
    assert any("50% of the GPUs' time is lost" in line for line in found[32]["warnings"])
    assert any("exchange gradients for 0.234 s of a step and compute for 0.0" in line for line in found[64]["warnings"])
    assert any("4,096 tokens per GPU and step are few" in line for line in found[64]["warnings"])
    assert found[512]["warnings"] == []
    free = plan_costs(parse([*common, "--global-batch-size", "64", "--network", "1e9"]), one, one)
    assert free["step"]["exchange_seconds"] == pytest.approx(0, abs=1e-6)


def test_measured_rates_stand_for_flops() -> None:
    common = ["plan", "--base", "b", "--reference", "r", "--tokens", "50e9", "--num-gpus", "64", "--network", "1e9"]
    rates = ["--train-rate", "6000", "--score-rate", "15000", "--link", "1e9"]
    figures = plan_costs(parse([*common, *rates]), EIGHT_B, EIGHT_B)
    assert figures["costs"]["train NTP"]["wall_seconds"] == pytest.approx(50e9 / 64 / 6000 + 120)
    assert figures["costs"]["score once"]["wall_seconds"] == pytest.approx(50e9 / 64 / 15_000 + 180)
    # the reference computes a third of what a training step does, at the same utilisation
    online = figures["costs"]["train ReMiT, reference online"]["wall_seconds"]
    assert online == pytest.approx(50e9 / 64 / 6000 * (1.01 + 1 / 3) + 120)
    options = [entry["option"] for entry in figures["assumptions"]]
    assert {"--train-rate", "--score-rate"} < {*options}
    assert not {"--mfu-train", "--mfu-score"} & {*options}


def test_a_published_run_with_a_large_teacher_online() -> None:
    """arXiv 2609.01532: 60.4B tokens on 32 GPUs, 26 hours without the 7B teacher and 56 with it; its rates give its hours."""
    rate, online = 60.4e9 / 32 / 3600 / 26, 60.4e9 / 32 / 3600 / 30
    common = ("plan", "--base", "x", "--reference", "y", "--tokens", "60.4B", "--gpu", "h200", "--num-gpus", "32")
    measured = ("--train-rate", str(rate), "--online-rate", str(online), "--score-rate", "30000", "--top-k", "32")
    found = plan_costs(parse([*common, *measured, "--top-k-share", "0.25"]), ONE_B, EIGHT_B)
    hours = {name: entry["wall_seconds"] / 3600 for name, entry in found["costs"].items()}
    assert hours["train NTP"] == pytest.approx(26, abs=0.1)
    assert hours["train ReMiT, reference online"] == pytest.approx(56, abs=0.5)
    assert hours["score once"] == pytest.approx(60.4e9 / 32 / 30000 / 3600 + 180 / 3600)
    assert found["break_even"]["epochs"] == pytest.approx(hours["score once"] / 30, rel=1e-3)
    assert found["disk_bytes"]["top-k entries"] == pytest.approx(60.4e9 * 32 * 4.3 * 0.25)
    drawn = plan_costs(parse([*common, "--sample-k", "50"]), ONE_B, EIGHT_B)
    assert drawn["disk_bytes"]["drawn tokens"] == pytest.approx(60.4e9 * 50 * 1.1)
    assert {"--online-rate", "--top-k-share"} <= {entry["option"] for entry in found["assumptions"]}


def test_memory_by_hand() -> None:
    sharded = memory(EIGHT_B, machine(), Layout("full", 8, 2, True), 4096)
    tables = 128_256 * 4096
    assert list(sharded.values()) == pytest.approx(
        [
            *(4 * 8_030_261_248 / 8, 4 * 8_030_261_248 / 8, 8 * 8_030_261_248 / 8),
            2 * (2 * (8_030_261_248 - 2 * tables) / 32 + 2 * tables),
            2 * 4096 * 4 * 4096 * 32 + 2 * 4096 * 237_568,
            4 * 4096 * 128_256,
            2 * 4 * tables,
        ]
    )
    alone = memory(ONE_B, machine(1), Layout("replicate", 1, 1, False), 65_536)
    tied = 128_256 * 2048
    assert alone["gathered or cast weights, bfloat16"] == 2 * 1_235_814_400  # tied: once
    assert alone["activations"] == 65_536 * 16 * 129_024
    assert (alone["logits of one row"], alone["gradient of the output embedding"]) == (3 << 30, 2 * 4 * tied)
    exact = memory(ONE_B, machine(1, dtype="float32"), Layout("replicate", 1, 1, False), 64)
    assert exact["gathered or cast weights, float32"] == 0
    assert exact["gradient of the output embedding"] == 4 * tied


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
    layout, needed = propose(shape, where, Job.of_full_rows(10**9, 1, 4096, 64))
    assert (layout.sharding, layout.shards, layout.activation_checkpointing) == expected
    assert needed == pytest.approx(sum(memory(shape, where, layout, 4096).values()))
    assert needed <= where.usable_bytes
    bigger = replace(layout, micro_batch_size=2 * layout.micro_batch_size)
    no_more_rows = 2 * layout.micro_batch_size > -(-64 // where.num_gpus)
    assert no_more_rows or sum(memory(shape, where, bigger, 4096).values()) > where.usable_bytes


def test_what_is_given_is_kept_and_what_does_not_fit_says_so() -> None:
    job = Job.of_full_rows(10**9, 1, 4096, 64)
    layout, needed = propose(EIGHT_B, machine(1, 24), job)
    assert (layout.micro_batch_size, layout.activation_checkpointing) == (1, True)
    assert needed > 128e9
    layout, needed = propose(ONE_B, machine(8), job, "full", 3, "on")
    assert layout == Layout("full", 8, 3, True)
    assert needed < machine(8).usable_bytes
    assert propose(EIGHT_B, machine(8), job, "replicate")[1] > machine(8).usable_bytes
    assert [powers_down(largest) for largest in (1, 2, 5, 8)] == [[1], [2, 1], [5, 4, 2, 1], [8, 4, 2, 1]]


def test_engines_have_room_for_their_weights() -> None:
    """16 GB of weights in 60 % of the memory."""
    assert [engine_size(EIGHT_B, machine(8, gb)) for gb in (141, 24, 12, 3)] == [1, 2, 4, None]
    assert engine_size(EIGHT_B, machine(1, 24)) is None


def test_disk_by_hand() -> None:
    found = disk(1000, {"packed": 2.0, "log-probs": 1.4, "top-k entries": 32.0, "entropy": 4.2})
    assert list(found.values()) == pytest.approx([2000, 1400, 32_000, 4200, 39_600, 41_600])
    assert list(found)[4] == "scored folder (packed, log-probs, top-k, entropy)"
    without = disk(1000, {"packed": 2.0, "log-probs": 1.4, "top-k entries": 0.0, "entropy": 0})
    assert without == pytest.approx(
        {"packed": 2000, "log-probs": 1400, "scored folder (packed, log-probs)": 3400, "both folders": 5400}
    )


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
        (("--mfu-score", "0"), "--mfu-score is 0.0, expected a number above 0"),
        (("--epochs", "inf"), "--epochs is inf"),
        (("--top-k", "-1"), "--top-k is -1, expected 0 or more"),
        (("--train-rate", "inf"), "--train-rate is inf, expected a number above 0"),
        (("--train-rate", "9", "--mfu-train", "0.4"), "--train-rate and --mfu-train are both given"),
        (("--weights",), "--weights is a command of its own now: remit weights"),
        (("--seq-len", "1"), "--seq-len is 1, expected at least 2"),
        (("--json", "no-such-folder/x.json"), "its folder does not exist"),
        (("--sharding", "some"), "some"),
    ],
)
def test_bad_options_are_bad_usage(remit: Remit, options: tuple[str, ...], message: str) -> None:
    given = () if "--tokens" in options else ("--tokens", "1e6")
    code, _, error = remit("plan", "--base", "b", "--reference", "r", *given, *options)
    assert (code, message in " ".join(re.sub("│", "", error).split())) == (2, True), error
    assert "--weights" in options or "remit plan --help" in error


def test_what_is_missing_is_named(remit: Remit, folder: Path, tmp_path: Path) -> None:
    for options, message in (
        (("--reference", "r", "--tokens", "5"), "--base STR"),
        (("--base", "b", "--tokens", "5"), "--reference STR"),
        (("--base", "b", "--reference", "r"), "--tokens STR"),
    ):
        code, _, error = remit("plan", *options)
        assert (code, message in error, "remit plan --help" in error) == (2, True, True), error
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
    stored = ("--top-k", 8, "--entropy", "--entropy-temperature", 2)
    figures, output, _ = plan(remit, folder, *stored, "--gpu", "a100", "--num-gpus", 16, "--epochs", 2)
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
        label = entry["option"] or entry["name"].replace("_", " ")
        line = next(line for line in output.splitlines() if line.startswith(f"{label} "))
        assert f"{entry['value']:.4g}" in line
    assert figures["memory_bytes"]["in all"] == pytest.approx(sum(figures["memory_bytes"].values()) / 2)
    assert figures["disk_bytes"]["top-k entries"] == pytest.approx(1e6 * 8 * 4.3)
    assert figures["disk_bytes"]["entropy"] == pytest.approx(1e6 * 3 * 1.4)
    assert plan(remit, folder, "--entropy")[0]["disk_bytes"]["entropy"] == pytest.approx(1e6 * 1.4)
    assert f"--micro-batch-size {figures['proposal']['micro_batch_size']}" in output
    assert f"after {figures['break_even']['epochs']:.2f} epochs" in output


def test_every_option_of_an_assumption_wins(remit: Remit, folder: Path) -> None:
    before, _, _ = plan(remit, folder, "--gpu", "h100")
    others = {"--gpus-per-node": 4, "--global-batch-size": 32}
    replaceable = [entry for entry in before["assumptions"] if entry["option"]]
    assert len(replaceable) == 9
    base = read_shape(folder / "base", 128, "bfloat16")
    for entry in replaceable:
        value = others.get(entry["option"], entry["value"] * 0.75 + 0.1)
        config = parse(["plan", "--base", "b", "--reference", "r", "--tokens", "1e6", entry["option"], str(value)])
        after = {line["option"]: line for line in plan_costs(config, base, base)["assumptions"]}
        assert (after[entry["option"]]["value"], after[entry["option"]]["source"]) == (value, "given")
    mine = ("--gpu", "mine", "--peak-tflops", 2, "--gpu-memory-gb", 3, "--mfu-train", 0.5, "--link", "1e9")
    figures, _, _ = plan(remit, folder, *mine)
    seconds = 1e6 * base.train_flops / (8 * 2e12 * 0.5) + 120
    assert figures["costs"]["train NTP"]["wall_seconds"] == pytest.approx(seconds)
    assert figures["disk_bytes"]["log-probs"] == pytest.approx(1.4e6)


def test_warnings(remit: Remit, folder: Path) -> None:
    figures, output, _ = plan(remit, folder, "--gpu", "x", "--peak-tflops", 1, "--gpu-memory-gb", 0.00002)
    assert not figures["proposal"]["fits"]
    assert any("training does not fit: the leanest layout needs" in line for line in figures["warnings"])
    assert any("scoring does not fit" in line for line in figures["warnings"])
    assert "warning: training does not fit" in output
    figures, _, _ = plan(remit, folder, "--seq-len", 129, "--num-gpus", 65)
    assert sum("takes rows of at most 128 tokens, --seq-len is 129" in line for line in figures["warnings"]) == 2
    assert any("2% of the GPUs' time is lost" in line for line in figures["warnings"])  # 512 rows in 65 x 8 places
    figures, _, _ = plan(remit, folder, "--seq-len", 129, "--reference", folder / "base")
    assert sum("takes rows of at most" in line for line in figures["warnings"]) == 1
    assert plan(remit, folder, "--network", "1e9", "--link", "1e9")[0]["warnings"] == []


def test_rmt_by_hand() -> None:
    # 8 * 0.25^(t/4) = 5.66, 4, 2.83, 2: 5 + 4 + 2 + 2 tokens of thought, with B_min = 3: 5 + 4 + 3 + 3
    job = RmtJob(4, 6, 2, 8, 1, 0.25, prompt=10, answer=3, seq_len=32)
    found = tokens_of(job)
    assert (found.prefilled, found.decoded, found.predicted) == (4 * 6 * 10, 12 * (13 + 12), 4 * 6 * 32)
    assert found.learned == 12 * (4 * 10 + 13 + 12)
    assert found.most_decoded == 12 * (26 + 12)
    assert tokens_of(replace(job, least_budget=3)).decoded == 12 * (15 + 12)
    shape = replace(ONE_B, matrix_flops=60, attention_flops=20, vocab_size=2, hidden_size=5)  # 100 forward, 300 in all
    rates = Rates(score=9.0, train=0.3, online=9.0, remit_cost=9.0, score_start_seconds=11.0, train_start_seconds=7.0)
    seconds = seconds_of(found, shape, rates, prefill_rate=20, decode_rate=5, num_gpus=2)
    assert list(seconds.values()) == pytest.approx(
        [240 / 20 / 2, 300 / 5 / 2, 780 * (0.3 + 0.1) / 2, 768 * 0.3 / 2, 18]
    )


def test_rmt_is_planned_where_it_is_asked_for(remit: Remit, folder: Path) -> None:
    small = ("--rmt-positions", 16, "--rmt-first-budget", 32, "--rmt-prompt", 50, "--network", "1e9", "--link", "1e9")
    without, _, _ = plan(remit, folder)
    figures, output, _ = plan(remit, folder, "--rmt-steps", 10, *small, "--prefill-rate", 1e5, "--decode-rate", 2e3)
    assert "rmt" not in without
    assert not any("rmt" in entry["name"] or "code" in entry["name"] for entry in without["assumptions"])
    # floor(32 * 0.2^(t/10)): 27 23 19 16 14 12 10 8 7 6
    tokens = figures["rmt"]["tokens"]
    assert tokens["decoded"] == 16 * 8 * (142 + 10 * 4)
    assert tokens["decoded at most"] == 16 * 8 * (284 + 10 * 4)
    assert tokens["prefilled"] == 16 * 10 * 50
    costs = figures["rmt"]["costs"]
    assert costs["rollouts, decode"]["gpu_hours"] == pytest.approx(16 * 8 * 182 / 2e3 / 3600)
    assert costs["rollouts, prefill"]["gpu_hours"] == pytest.approx(16 * 10 * 50 / 1e5 / 3600)
    assert costs["remit rmt in all"]["gpu_hours"] == pytest.approx(
        sum(cost["gpu_hours"] for name, cost in costs.items() if name != "remit rmt in all")
    )
    for name, cost in costs.items():
        line = next(line for line in output.splitlines() if line.startswith(name))
        assert f"{cost['gpu_hours']:,.4g}" in line
    for entry in figures["assumptions"]:  # each is printed, and can be replaced
        if "rmt" in entry["name"] or "code" in entry["name"]:
            line = next(line for line in output.splitlines() if line.startswith(f"{entry['option']} "))
            value = entry["value"]
            assert (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") in line
    given = {entry["name"] for entry in figures["assumptions"] if entry["source"] == "given"}
    assert given == {
        "rmt_positions",
        "rmt_prompt",
        "rmt_first_budget",
        "prefill_rate",
        "decode_rate",
        "network",
        "link",
    }
    assert figures["warnings"] == []
    warned, _, _ = plan(remit, folder, "--rmt-steps", 10, "--rmt-positions", 9)
    assert any("a rollout has up to 1,668 tokens" in line for line in warned["warnings"])
    assert any("--rmt-positions is 9, expected a multiple of --num-gpus (8)" in line for line in warned["warnings"])
    _, _, error = plan(remit, folder, "--decode-rate", 5, code=2)
    assert "--decode-rate is given without --rmt-steps" in error


@pytest.mark.usefixtures("starts_processes")
def test_a_plan_needs_no_weights_and_no_engine(folder: Path) -> None:
    script = (
        "import sys, pipelines.cli\n"
        f"try: pipelines.cli.main(['plan', '--base', {str(folder / 'base')!r}, '--reference', {str(folder / 'rl')!r}, "
        "'--tokens', '5B', '--seq-len', '64'])\n"
        "except SystemExit as done: print(done.code, sorted({'vllm', 'ray', 'plotly'} & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "0 []"
