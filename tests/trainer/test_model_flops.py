"""Model FLOPs of a step: against what torch counts in real forwards and backwards, and by hand; peaks by the names of cards."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from annotated import run
from prometheus_client.parser import text_string_to_metric_families
from torch.utils.flop_counter import FlopCounterMode

from pipelines.plan.hardware import GPUS
from trainer.batch import Row
from trainer.gpu_peaks import PEAKS, bfloat16_peak
from trainer.model_flops import ModelFlops, count_model_flops, pairs

VOCABULARY = 211
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 128, "tie_word_embeddings": False,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": None,
}  # fmt: skip
KINDS: dict[str, tuple[str, dict]] = {
    "grouped queries": ("Llama", {}),
    "tied head": ("Qwen3", {"tie_word_embeddings": True}),
    "wide heads": ("Qwen3", {"head_dim": 32, "num_key_value_heads": 1}),
    "biases": ("Qwen2", {}),
    "experts": ("Qwen3Moe", {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 48}),
    "experts and dense layers": (
        "Qwen3Moe",
        {"num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 32, "mlp_only_layers": [1]},
    ),
    "a shared expert": (
        "Qwen2Moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 80,
        },
    ),
}


def make_config(kind: str) -> transformers.PretrainedConfig:
    family, changes = KINDS[kind]
    return getattr(transformers, f"{family}Config")(**(SIZES | changes))


def make_row(length: int, docs: list[int], predicted: int | None = None) -> Row:
    marks = np.arange(length) > 0
    if predicted is not None:
        marks = np.arange(length) >= length - predicted
    return Row("row", 0, np.ones(length, dtype=np.int32), np.array(docs, dtype=np.int32), marks, {})


@pytest.mark.parametrize("kind", KINDS)
def test_products_are_those_that_torch_counts(kind: str) -> None:
    """Forward and backward of the class itself, its own loop over experts and eager attention, which computes both halves."""
    config = make_config(kind)
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager"
    )
    rows, seq_len = 2, 24
    ids = torch.randint(1, VOCABULARY, (rows, seq_len))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    counts = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    attention = sum(flops for name, flops in counts.items() if "bmm" in name)  # scores and their products with values
    products = sum(flops for name, flops in counts.items() if "bmm" not in name)
    found = count_model_flops(config)
    row = make_row(seq_len, [seq_len], seq_len)  # every position has logits there
    no_attention = ModelFlops(found.layers, found.head, {})
    # the angles of rotary embeddings are a product by torch's count: a few hundred, in bmm and forward only
    assert no_attention.of_step([row] * rows, "packed") == products
    whole = 3 * rows * seq_len**2 * sum(found.attention.values())
    assert attention == pytest.approx(whole, rel=0.01)


def test_a_dense_model_is_six_times_its_weights() -> None:
    """6 N, N without the input embedding and what does not multiply, and twelve times the width for each pair, by hand."""
    layer = 64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 112
    found = count_model_flops(make_config("grouped queries"))
    n = 3 * layer + VOCABULARY * 64
    rows = [make_row(10, [4, 6]), make_row(1, [1]), make_row(7, [7], 0)]
    weights = 6 * (n * 18 - VOCABULARY * 64 * 9)  # of 18 tokens nine are predicted
    assert found.of_step(rows, "packed") == weights + 3 * 12 * 64 * (55 + 1 + 28)
    assert found.of_step(rows, "document") == weights + 3 * 12 * 64 * (10 + 21 + 1 + 28)
    assert found.of_step([], "packed") == 0


def test_windows_and_latent_attention() -> None:
    """Gemma's local layers look back no further than their window; of latent attention keys and values have two widths."""
    gemma = transformers.Gemma3TextConfig(
        **(SIZES | {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]})
    )
    assert count_model_flops(gemma).attention == {4: 2 * 2 * 4 * 32, None: 2 * 4 * 32}
    latent = transformers.DeepseekV3Config(
        **{
            **SIZES, "head_dim": 8, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
            "num_experts_per_tok": 2, "moe_intermediate_size": 48, "kv_lora_rank": 32, "q_lora_rank": 48,
            "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 20,
        }
    )  # fmt: skip
    assert count_model_flops(latent).attention == {None: 3 * 2 * 4 * (24 + 20)}


@pytest.mark.parametrize("window", [None, 1, 3, 50])
def test_pairs_one_by_one(window: int | None) -> None:
    lengths = np.array([1.0, 2, 3, 4, 17])
    every = [sum(min(position + 1, window or 99) for position in range(int(length))) for length in lengths]
    assert pairs(lengths, window).tolist() == every


def test_counting_leaves_the_random_state_and_the_config_alone() -> None:
    config = make_config("experts")
    before, text = torch.get_rng_state(), config.to_json_string()
    attention, experts = config._attn_implementation, config._experts_implementation
    count_model_flops(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert (config.to_json_string(), config._attn_implementation, config._experts_implementation) == (
        text, attention, experts,
    )  # fmt: skip


def test_what_cannot_be_counted_says_so() -> None:
    with pytest.raises(ValueError, match="the model FLOPs of T5Config cannot be counted"):
        count_model_flops(transformers.T5Config())


@pytest.mark.parametrize(
    ("name", "teraflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989), ("NVIDIA H100 PCIe", 756), ("NVIDIA H100 NVL", 835), ("NVIDIA H200", 989),
        ("NVIDIA H200 NVL", 835), ("NVIDIA A100-SXM4-80GB", 312), ("NVIDIA A100 80GB PCIe", 312), ("NVIDIA B200", 2250),
        ("NVIDIA GB200", 2500), ("NVIDIA GH200 480GB", 989), ("NVIDIA L40S", 362), ("NVIDIA L40", 181), ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165.2), ("NVIDIA GeForce RTX 4090 D", None), ("NVIDIA A10G", None), ("NVIDIA A800-SXM4-80GB", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("NVIDIA H100 64GB HBM2", None), ("NVIDIA H20", None), ("AMD Instinct MI300X", None),
        ("", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name: str, teraflops: float | None) -> None:
    assert bfloat16_peak(name) == (None if teraflops is None else 1e12 * teraflops)


def test_plans_have_the_same_peaks() -> None:
    names = {
        "h200": "H200", "h100": "H100 80GB HBM3", "a100": "A100-SXM4-80GB", "b200": "B200", "l40s": "L40S",
        "rtx4090": "GeForce RTX 4090",
    }  # fmt: skip
    assert names.keys() == GPUS.keys() - {"cpu"}
    for gpu, name in names.items():
        assert bfloat16_peak(f"NVIDIA {name}") == pytest.approx(1e12 * GPUS[gpu].bfloat16, rel=0.002)
    assert all(peak.source for peak in PEAKS)


def test_a_run_writes_them_and_invents_no_peak(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], remit: Callable[..., tuple[int, str, str]]
) -> None:
    settings: dict = {
        "max_steps": 2,
        "global_batch_size": 5,
        "micro_batch_size": 2,
        "prometheus": tmp_path / "remit.prom",
    }
    lines = run(tmp_path / "out", annotated["packed"], models["base"], **settings)
    config = transformers.AutoConfig.from_pretrained(models["base"])
    found = count_model_flops(config)
    for line in lines:
        assert "mfu" not in line
        least = 3 * (found.layers + found.head * line["predicted_tokens"] / (line["tokens"] / line["step"]))
        assert line["model_flops_per_token"] > least * 0.9
    families = {f.name: f for f in text_string_to_metric_families((tmp_path / "remit.prom").read_text())}
    rate = lines[-1]["model_flops_per_token"] * lines[-1]["tokens_per_second"] / 1e12
    assert families["remit_train_teraflops_per_second"].samples[0].value == pytest.approx(rate)
    code, _, error = remit("report", "--run", tmp_path / "out", "--out", tmp_path / "page.html")
    assert code == 0, error
    page = (tmp_path / "page.html").read_text()
    assert "model FLOPs, mean" in page
    assert "share of the bfloat16 peak, mean" not in page  # no run has it


def test_a_known_card_has_its_share(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU with a peak of 1 TFLOP/s: the share of it is what the two other figures give."""
    monkeypatch.setattr("trainer.setup.peak_of_all", lambda world, dtype: 1e12)
    lines = run(tmp_path / "out", annotated["packed"], models["base"], max_steps=2)
    for line in lines:
        rate = line["model_flops_per_token"] * line["tokens_per_second"]
        assert line["mfu"] == pytest.approx(rate / 1e12)
        assert math.isfinite(line["mfu"])
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "out" / "tensorboard"))
    events.Reload()
    assert [event.value for event in events.Scalars("train/mfu")] == pytest.approx([line["mfu"] for line in lines])
    assert len(events.Scalars("train/teraflops_per_second")) == 2
    assert json.loads((tmp_path / "out/run.json").read_text()).keys().isdisjoint({"float8", "float8_emulated"})
