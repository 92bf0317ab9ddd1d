"""Bases with experts: none trains without a word about its balancing loss, which is transformers' own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from annotated import rows_of_step, run
from conftest import VOCABULARY
from oracles import load
from test_distributed import assert_same, finish, launch, metrics_of

from trainer.batch import Row, collate
from trainer.experts import Balancing, check_experts, has_experts, num_experts, router_loss
from trainer.loss_model import LossModel
from trainer.model import load_base
from trainer.objectives.ntp import NTP
from trainer.statistics import StepStatistics

CPU = torch.device("cpu")
Remit = Callable[..., tuple[int, str, str]]

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
}
BALANCED: dict[str, dict] = {
    "Mixtral": {"num_local_experts": 4},
    "Olmoe": {"num_experts": 4},
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1},
    "Qwen3Moe": {"num_experts": 4, "decoder_sparse_step": 1},
    "FlexOlmo": {"num_experts": 4},
    "GptOss": {"num_local_experts": 4},
    "Ernie4_5_Moe": {"moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 0, "moe_num_shared_experts": 1},
    "MiniMaxM2": {"num_local_experts": 4, "rotary_dim": 32},
}
UNBALANCED: dict[str, dict] = {
    "DeepseekV3": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 32,
        "qk_nope_head_dim": 32,
        "v_head_dim": 32,
    },
    "Glm4Moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
}


def make(folder: Path, family: str, **changes: object) -> Path:
    torch.manual_seed(3)
    settings = SIZES | (BALANCED | UNBALANCED)[family] | changes
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**settings))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


def make_rows(lengths: list[int]) -> list[Row]:
    generator = torch.Generator().manual_seed(11)
    rows = []
    for length in lengths:
        ids = torch.randint(1, VOCABULARY, (length,), generator=generator).int().numpy()
        predicted = torch.arange(length).bool().numpy()
        rows.append(Row("row", 0, ids, torch.tensor([length - 2, 2]).int().numpy(), predicted, {}))
    return rows


def reference_loss(model: transformers.PreTrainedModel, rows: list[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross entropy and aux_loss of one micro-batch by transformers' own forward with an attention mask."""
    width = max(len(row.input_ids) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, : len(row.input_ids)] = torch.from_numpy(row.input_ids).long()
        mask[index, : len(row.input_ids)] = 1
    output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    logprobs = output.logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return -(logprobs * mask[:, 1:]).sum(), output.aux_loss


@pytest.mark.parametrize("coefficient", [0.0, 0.7])
@pytest.mark.parametrize("family", BALANCED)
def test_loss_and_gradients_are_transformers_own(tmp_path: Path, family: str, coefficient: float) -> None:
    """Two micro-batches of rows of unequal lengths, weighted by their tokens; padding does not count."""
    folder = make(tmp_path, family)
    batches = [make_rows([21, 9, 14]), make_rows([5])]
    tokens = sum(len(row.input_ids) for rows in batches for row in rows)
    predicted = tokens - 4
    base = load_base(folder, "float32", CPU)
    loss_of = router_loss(base.model)
    assert loss_of is not None
    statistics = StepStatistics()
    balancing = Balancing(loss_of, coefficient, tokens)
    for rows in batches:
        LossModel(base)(collate(rows, "packed", CPU), NTP, predicted, 1, statistics, balancing).backward()
    model = load(folder)
    expected = torch.zeros(())
    mean_aux = torch.zeros(())
    for rows in batches:
        loss, aux = reference_loss(model, rows)
        share = sum(len(row.input_ids) for row in rows) / tokens
        expected = expected + loss / predicted + coefficient * share * aux
        mean_aux = mean_aux + share * aux
    expected.backward()
    assert statistics.router_loss.item() == pytest.approx(mean_aux.item(), rel=1e-5)
    wanted = dict(model.named_parameters())
    for name, parameter in base.model.named_parameters():
        other = wanted[name].grad
        if parameter.grad is None:
            assert other is None or not other.any(), name
        else:
            torch.testing.assert_close(parameter.grad, other, atol=2e-5, rtol=2e-3, msg=name)


@pytest.mark.parametrize("how", ["checkpointing", "compile", "both", "bfloat16", "document"])
@pytest.mark.usefixtures("starts_processes")
def test_the_same_however_the_body_runs(tmp_path: Path, how: str) -> None:
    folder = make(tmp_path, "Qwen3Moe")
    rows = make_rows([21, 9])

    def gradients(dtype: str, context: str = "packed", checkpointing: bool = False, compiled: bool = False) -> tuple:
        base = load_base(folder, dtype, CPU)
        loss_of = router_loss(base.model)
        assert loss_of is not None
        base.prepare(checkpointing, "on" if compiled else "off")
        values = []
        for _ in range(2):  # compiled layers run from the second time on
            base.model.zero_grad()
            statistics = StepStatistics()
            batch = collate(rows, context, CPU)
            LossModel(base)(batch, NTP, 1, 1, statistics, Balancing(loss_of, 100.0, 30)).backward()
            values.append(statistics.router_loss.item())
        router = next(p.grad for name, p in base.model.named_parameters() if name.endswith("mlp.gate.weight"))
        return values, router

    context = "document" if how == "document" else "packed"
    plain, router = gradients("float32", context)
    dtype = "bfloat16" if how == "bfloat16" else "float32"
    other, other_router = gradients(dtype, context, how in ("checkpointing", "both"), how in ("compile", "both"))
    tolerance = 0.05 if how == "bfloat16" else 1e-4
    assert plain[0] == plain[1]
    assert other == pytest.approx(plain, rel=tolerance)
    assert (other_router - router).norm() <= tolerance * router.norm()
    assert router.norm() > 0


def test_a_micro_batch_without_rows_adds_nothing(tmp_path: Path) -> None:
    base = load_base(make(tmp_path, "Mixtral"), "float32", CPU)
    loss_of = router_loss(base.model)
    assert loss_of is not None
    statistics = StepStatistics()
    LossModel(base)(collate([], "packed", CPU), NTP, 1, 1, statistics, Balancing(loss_of, 1.0, 30)).backward()
    assert statistics.router_loss == 0
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in base.model.parameters())


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("mixtral"), "Mixtral", router_jitter_noise=0.1)


def test_a_run_is_the_definition(tmp_path: Path, small: Path, mixtral: Path, remit: Remit) -> None:
    """Loss, balancing loss and gradient norm of a step against transformers; recorded, and part of the run's identity."""
    settings = {"objective": "ntp", "global_batch_size": 7, "micro_batch_size": 3, "router_aux_loss": 0.5, "seed": 4}
    [step] = run(tmp_path / "run", small, mixtral, **settings)
    model = load(mixtral)
    rows = [
        Row("row", 0, torch.tensor(row["input_ids"]).int().numpy(), None, None, {})  # type: ignore[arg-type]
        for row in rows_of_step(small, 0, 7, 4)
    ]
    tokens = sum(len(row.input_ids) for row in rows)
    total = aux_mean = torch.zeros(())
    for start in (0, 3, 6):
        loss, aux = reference_loss(model, rows[start : start + 3])
        share = sum(len(row.input_ids) for row in rows[start : start + 3]) / tokens
        total, aux_mean = total + loss / (tokens - 7), aux_mean + share * aux
    (total + 0.5 * aux_mean).backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
    assert step["loss"] == pytest.approx(total.item(), rel=1e-5)
    assert step["router_aux_loss"] == pytest.approx(aux_mean.item(), rel=1e-5)
    assert step["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["router_aux_loss"] == 0.5
    exported = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert exported["router_jitter_noise"] == 0.1  # off while training, back in the export
    line = ("train", "--shards", small, "--model", mixtral, "--out", tmp_path / "run", "--objective", "ntp")
    line += ("--global-batch-size", 7, "--micro-batch-size", 3, "--seed", 4, "--dtype", "float32", "--max-steps", 1)
    code, _, err = remit(*line, "--router-aux-loss", 0.1)
    assert code == 1
    assert "--router-aux-loss is 0.5 there, 0.1 asked for now" in err


@pytest.mark.parametrize("scope", ["micro", "global"])
def test_other_objectives_have_it_too(tmp_path: Path, annotated: dict[str, Path], mixtral: Path, scope: str) -> None:
    settings = {"objective": "rho1", "scope": scope, "router_aux_loss": 0.5}
    [with_it] = run(tmp_path / "with", annotated["packed"], mixtral, **settings)
    [without] = run(tmp_path / "without", annotated["packed"], mixtral, **(settings | {"router_aux_loss": 0.0}))
    assert with_it["loss"] == pytest.approx(without["loss"], rel=1e-6)
    assert with_it["router_aux_loss"] == pytest.approx(without["router_aux_loss"], rel=1e-6)
    assert abs(with_it["grad_norm"] - without["grad_norm"]) > 1e-6


@pytest.mark.parametrize("sharding", ["replicate", "full"])
@pytest.mark.usefixtures("starts_processes")
def test_two_processes(tmp_path: Path, annotated: dict[str, Path], mixtral: Path, sharding: str) -> None:
    shards = annotated["packed"]
    options = {"router_aux_loss": 0.5, "max_steps": 5, "global_batch_size": 6, "micro_batch_size": 1}
    one = run(tmp_path / "one", shards, mixtral, **options)
    arguments = ("--router-aux-loss", 0.5, "--sharding", sharding, "--global-batch-size", 6, "--micro-batch-size", 1)
    finish(launch(tmp_path / "two", shards, mixtral, 2, *arguments))
    two = metrics_of(tmp_path / "two")
    assert_same(two, one, 1e-4)
    for a, b in zip(two, one):
        assert a["router_aux_loss"] == pytest.approx(b["router_aux_loss"], rel=1e-4)


@pytest.mark.parametrize("family", [*BALANCED, *UNBALANCED])
def test_experts_are_not_trained_without_a_word(tmp_path: Path, family: str) -> None:
    folder = make(tmp_path, family)
    with pytest.raises(ValueError, match=rf"{family}ForCausalLM routes tokens to .*--router-aux-loss"):
        check_experts(folder, None)
    check_experts(folder, 0.0)
    if family in BALANCED:
        check_experts(folder, 0.001)
    else:
        with pytest.raises(ValueError, match=r"no balancing loss in transformers .*expected 0: the router trains"):
            check_experts(folder, 0.001)


@pytest.mark.parametrize("workers", [0, 1])
def test_refused_before_ray_or_a_model(
    tmp_path: Path, small: Path, mixtral: Path, remit: Remit, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    monkeypatch.setattr("pipelines.ray_train.ray_cluster", never)
    line = ("train", "--shards", small, "--model", mixtral, "--out", tmp_path / "run", "--objective", "ntp")
    code, _, err = remit(*line, "--ray-workers", workers)
    assert code == 1
    assert "MixtralForCausalLM routes tokens to 4 experts, and --router-aux-loss is not given" in err
    assert "0.001 in its config" in err


def test_a_dense_base_has_no_balancing_loss(tmp_path: Path, models: dict[str, Path]) -> None:
    check_experts(models["base"], None)
    check_experts(models["base"], 0.0)
    with pytest.raises(ValueError, match=r"--router-aux-loss is 0\.1, but Olmo2ForCausalLM .* has no experts"):
        check_experts(models["base"], 0.1)


def test_a_config_without_a_causal_language_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llava"}')
    with pytest.raises(ValueError, match=r"LlavaConfig has no causal language model in transformers"):
        check_experts(tmp_path, None)


def test_a_note_where_the_config_asks_for_it(tmp_path: Path, small: Path, mixtral: Path, remit: Remit) -> None:
    line = ("train", "--shards", small, "--model", mixtral, "--out", tmp_path / "run", "--objective", "ntp")
    code, _, err = remit(*line, "--max-steps", 1, "--global-batch-size", 2, "--router-aux-loss", 0)
    assert code == 0, err
    assert "train without their balancing loss (--router-aux-loss 0); the coefficient in its config is 0.001" in err


@pytest.mark.usefixtures("starts_processes")
def test_experts_of_every_family_are_seen_and_dense_ones_are_not() -> None:
    """All causal language models that transformers can build from a default config, without weights."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    known = {
        "mixtral",
        "olmoe",
        "qwen2_moe",
        "qwen3_moe",
        "deepseek_v3",
        "glm4_moe",
        "gpt_oss",
        "llama4_text",
        "jetmoe",
    }
    known |= {"granitemoe", "jamba", "longcat_flash", "ernie4_5_moe", "qwen3_next", "phimoe", "aria_text", "nemotron_h"}
    seen, asked = set(), set()
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            config = CONFIG_MAPPING[name]()
            with torch.device("meta"):
                model = transformers.AutoModelForCausalLM.from_config(config)
        except Exception:
            continue
        asked.add(name)
        if has_experts(model, config.to_dict()):
            seen.add(name)
    assert known <= seen
    dense = {"llama", "olmo2", "smollm3", "qwen3", "youtu", "gemma3_text", "gpt2", "phi3", "mamba2", "gemma4_text"}
    assert dense <= asked - seen
    assert all("moe" not in name for name in asked - seen)


def test_counts_in_configs() -> None:
    assert num_experts({"ffn_config": {"moe_num_experts": 16}}) == 16
    assert num_experts({"text_config": {"n_routed_experts": 64, "n_shared_experts": 2}}) == 64
    assert num_experts({"moe_num_experts": [64, 32]}) == 64
    for dense in ({"num_experts": None}, {"num_local_experts": 0}, {"num_experts": 1}, {"num_shared_experts": 2}, {}):
        assert num_experts(dense) == 0
