"""The gradients of the two losses: L_NTP against float64 and zero on C, L_RL against float64 and against TRL's own training."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args, get_type_hints
from unittest.mock import patch

import numpy as np
import pytest
import torch
import transformers
from built_once import BuiltOnce
from oracles import load
from rmt_shards import THRESHOLDS, with_entropy
from torch import nn

from pipelines.rmt.answers import Completion
from pipelines.rmt.curriculum import Draw
from pipelines.rmt.grpo import Grpo, Scored
from pipelines.rmt.losses import learn_others
from pipelines.rmt.model import RmtModel, target_logprobs
from pipelines.rmt.positions import PositionReader, rows_without
from pipelines.rmt.rollouts import Rollout
from pipelines.rmt.settings import RmtConfig
from pipelines.rmt.tier_index import count_tiers
from shards import ShardFolder
from trainer.batch import collate
from trainer.distributed import World
from trainer.head import objective_loss
from trainer.mixed_shards import MixedShards
from trainer.model import load_base
from trainer.objectives.ntp import NTP
from trainer.statistics import StepStatistics
from trainer.trainable import load_trainable

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def reader(built_once: BuiltOnce, small: Path) -> PositionReader:
    folder = ShardFolder(built_once("rmt-entropy", lambda out: with_entropy(small, out)))
    index = count_tiers(folder, "rl", THRESHOLDS)
    return PositionReader(folder, index, "rl", THRESHOLDS, "packed", 10**6)


@pytest.fixture
def drawn(reader: PositionReader) -> list:
    places = ((1, 3), (2, 40), (2, 41), (3, 0), (3, 1), (3, 60), (1, 17))
    return [reader.position(Draw(tier, ordinal)) for tier, ordinal in places]


def config(out: Path, **settings: Any) -> RmtConfig:
    defaults: dict[str, Any] = {"shards": "s", "model": "m", "first_budget": 8, "num_generations": 4}
    return RmtConfig(**(defaults | {"out": out, "positions_per_step": 3, "micro_batch_size": 2} | settings))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def assert_close(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], tolerance: float) -> None:
    assert ours.keys() == theirs.keys()
    largest = max(float(value.abs().max()) for value in theirs.values())
    assert largest > 1e-3
    for name, value in theirs.items():
        assert float((ours[name] - value).abs().max()) < tolerance * largest, name


def test_ntp_learns_all_but_the_positions_of_the_step(
    tmp_path: Path, models: dict[str, Path], reader: PositionReader, drawn: list
) -> None:
    base = load_base(models["base"], "float32", CPU)
    run = SimpleNamespace(
        config=config(tmp_path), called=RmtModel(base), sources=SimpleNamespace(names=["all"], group=[0] * 1000),
        collate=lambda rows: collate(rows, "packed", CPU),
    )  # fmt: skip
    rows = rows_without(drawn, reader)
    session: Any = SimpleNamespace(world=World(CPU))
    learn_others(run, session, rows, 0.25, StepStatistics(CPU))  # type: ignore[arg-type]

    oracle, total, count = load(models["base"]).double(), 0.0, 0
    places = {(position.row, position.place) for position in drawn}
    for number in sorted({position.row for position in drawn}):
        ids = torch.tensor([reader.row(number).ids.tolist()])
        logprobs = oracle(input_ids=ids).logits[0].log_softmax(-1)
        for place in range(1, ids.shape[1]):
            if (number, place) not in places:
                total, count = total - logprobs[place - 1, ids[0, place]], count + 1
    (0.25 * total / count).backward()
    assert_close(gradients(base.model), gradients(oracle), 1e-5)


def test_the_gradient_at_a_position_of_the_step_is_zero_and_elsewhere_the_trainers(
    models: dict[str, Path], reader: PositionReader, drawn: list
) -> None:
    head = load(models["base"]).get_output_embeddings().weight.detach()
    numbers = sorted({position.row for position in drawn})
    batches = [
        collate(rows, "packed", CPU)
        for rows in (rows_without(drawn, reader), [reader.training_row(number) for number in numbers])
    ]
    torch.manual_seed(0)
    hidden = torch.randn(*batches[0].input_ids_BT.shape, head.shape[1])
    grads = []
    for batch in batches:
        leaf = hidden.clone().requires_grad_()
        objective_loss(leaf, head, batch, NTP, 100.0).backward()
        grads.append(leaf.grad)
    ours, trainers = grads
    chosen = torch.zeros(ours.shape[:2], dtype=torch.bool)
    for position in drawn:
        chosen[numbers.index(position.row), position.place - 1] = True  # predicted from the state before
    assert ours[chosen].abs().max() == 0
    assert trainers[chosen].abs().sum(-1).min() > 0
    assert torch.equal(ours[~chosen], trainers[~chosen])


def test_attention_in_document_context_still_takes_masks(
    tmp_path: Path, models: dict[str, Path], annotated: dict[str, Path]
) -> None:
    """TRL pads prompts on the left and says so in a mask; attention over documents would not look at it."""
    shards = annotated["document"]
    shared = config(tmp_path, shards=str(shards), model=models["base"], reference="rl", dtype="float32").train_config()
    session: Any = SimpleNamespace(world=World(CPU), note=lambda line: None)
    base = load_trainable(shared, session, MixedShards.open(shared.mixture), "document", takes_masks=True)
    called, oracle = RmtModel(base), load(models["base"])
    ids = torch.randint(1, 500, (1, 9), generator=torch.Generator().manual_seed(1))
    padded, mask = nn.functional.pad(ids, (5, 0)), nn.functional.pad(torch.ones_like(ids), (5, 0))
    with torch.no_grad():
        got = called(input_ids=padded, attention_mask=mask).logits[:, 5:]
        want = oracle(input_ids=ids).logits
    assert float((got - want).abs().max()) < 1e-4


def rollouts(model: Path, off_policy: float = 0.0) -> list[Scored]:
    """Three groups of four, of unequal lengths, with the model's own log-probs at temperature 0.7, moved by off_policy."""
    random, oracle = np.random.default_rng(4), load(model)
    found = []
    for group in range(3):
        prompt = random.integers(1, 500, size=3 + 2 * group).tolist()
        for _ in range(4):
            completion = random.integers(1, 500, size=int(random.integers(1, 7))).tolist()
            with torch.no_grad():
                logits = oracle(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.7
            own = [
                float(logits.log_softmax(-1)[len(prompt) - 1 + place, index]) for place, index in enumerate(completion)
            ]
            moved = tuple(value + off_policy * float(random.normal()) for value in own)
            read = Completion(len(completion), True, ())
            scored = Scored(
                Rollout(tuple(prompt), tuple(completion), moved, read), float(random.random()), float(random.random())
            )
            found.append(scored)
    return found


def ours(
    model: Path, tokenizer_folder: Path, scored: list[Scored], out: Path, **settings: Any
) -> dict[str, torch.Tensor]:
    base = load_base(model, "float32", CPU)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    settings = {"temperature": 0.7, "length_weight": 0.3, **settings}
    grpo = Grpo(config(out, **settings), base.model, RmtModel(base), tokenizer, len(scored), torch.float32)
    batches = grpo.batches(scored)
    assert len(batches) == 12 // settings.get("micro_batch_size", 2)
    for batch in batches:
        grpo.loss(batch).backward()
    assert grpo.metrics()["reward"] == pytest.approx(np.mean([0.7 * s.outcome + 0.3 * s.length for s in scored]))
    return gradients(base.model)


def learned_positions(folder: Path, family: str) -> Path:
    """A model whose positions are embeddings, large enough that a shift of them shows."""
    sizes = {"vocab_size": 521, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "tie_word_embeddings": True}
    torch.manual_seed(0)
    if family == "OPT":
        settings = transformers.OPTConfig(
            **sizes, max_position_embeddings=64, hidden_size=64, word_embed_proj_dim=64, ffn_dim=96,
            num_hidden_layers=2, num_attention_heads=2, dropout=0.0,
        )  # fmt: skip
        model = transformers.OPTForCausalLM(settings)
    else:
        settings = transformers.GPT2Config(**sizes, n_positions=64, n_embd=64, n_layer=2, n_head=2)
        model = transformers.GPT2LMHeadModel(settings)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["GPT2", "OPT"])
def test_rl_of_a_model_with_learned_positions_against_float64(
    tmp_path: Path, tokenizer_folder: Path, family: str
) -> None:
    """Prompts of unequal lengths are padded on the left; tokens are counted from the first of each prompt all the same."""
    model = learned_positions(tmp_path / "model", family)
    scored = rollouts(model)
    # one micro-batch with prompts of all lengths
    found = ours(model, tokenizer_folder, scored, tmp_path / "out", micro_batch_size=12)
    assert_close(found, oracle_gradients(model, scored), 2e-4)


def test_the_kl_of_a_model_with_learned_positions_is_zero_before_the_first_step(
    tmp_path: Path, tokenizer_folder: Path
) -> None:
    """The base from which the model has not moved yet counts its positions as the model does."""
    model = learned_positions(tmp_path / "model", "GPT2")
    base = load_base(model, "float32", CPU)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    settings = config(tmp_path / "out", micro_batch_size=12, kl=0.5)
    grpo = Grpo(settings, base.model, RmtModel(base), tokenizer, 12, torch.float32)
    (batch,) = grpo.batches(rollouts(model))
    grpo.loss(batch)
    assert abs(grpo.metrics()["kl"]) < 1e-6


def test_the_entropy_of_the_policy_is_a_mean_over_tokens(
    tmp_path: Path, models: dict[str, Path], tokenizer_folder: Path
) -> None:
    """In float64, and whatever the micro-batch: rollouts have unequal lengths."""
    scored, oracle, entropies = rollouts(models["base"]), load(models["base"]).double(), []
    for each in scored:
        prompt, completion = list(each.rollout.prompt_ids), list(each.rollout.completion_ids)
        with torch.no_grad():
            logprobs = (oracle(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.7).log_softmax(-1)
        entropies += (-(logprobs.exp() * logprobs).sum(-1))[len(prompt) - 1 : -1].tolist()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    for size in (1, 2, 12):
        base = load_base(models["base"], "float32", CPU)
        settings = config(tmp_path / "out", micro_batch_size=size, temperature=0.7)
        grpo = Grpo(settings, base.model, RmtModel(base), tokenizer, 12, torch.float32)
        for _ in range(2):  # of each step by itself
            for batch in grpo.batches(scored):
                grpo.loss(batch)
            assert grpo.metrics()["policy_entropy"] == pytest.approx(np.mean(entropies), abs=1e-5)


@pytest.mark.parametrize("loss_type", get_args(get_type_hints(RmtConfig)["loss_type"]))
def test_the_gradient_does_not_depend_on_the_micro_batch(
    tmp_path: Path, models: dict[str, Path], tokenizer_folder: Path, loss_type: str
) -> None:
    scored = rollouts(models["base"])
    found = [
        ours(models["base"], tokenizer_folder, scored, tmp_path, loss_type=loss_type, micro_batch_size=size)
        for size in (2, 12)
    ]
    assert_close(*found, 1e-5)


@pytest.mark.parametrize("off_policy", [0.0, 0.8])
def test_rl_against_float64(tmp_path: Path, models: dict[str, Path], tokenizer_folder: Path, off_policy: float) -> None:
    scored = rollouts(models["base"], off_policy)
    found = ours(models["base"], tokenizer_folder, scored, tmp_path)
    assert_close(found, oracle_gradients(models["base"], scored), 2e-4)


def oracle_gradients(model: Path, scored: list[Scored]) -> dict[str, torch.Tensor]:
    """Advantage (r - mean) / (std + 1e-4) of the group, mean over a rollout's tokens, then over rollouts; tokens that the
    engine found less probable than the model weigh up to twice as much. Each rollout by itself, in float64."""
    oracle, total = load(model).double(), 0.0
    for first in range(0, 12, 4):
        group = scored[first : first + 4]
        rewards = np.array([0.7 * each.outcome + 0.3 * each.length for each in group])
        advantages = (rewards - rewards.mean()) / (rewards.std(ddof=1) + 1e-4)
        for each, advantage in zip(group, advantages, strict=True):
            prompt, completion = list(each.rollout.prompt_ids), list(each.rollout.completion_ids)
            logits = oracle(input_ids=torch.tensor([prompt + completion])).logits[0] / 0.7
            logprobs = logits.log_softmax(-1)
            for place, index in enumerate(completion):
                logprob = logprobs[len(prompt) - 1 + place, index]
                weight = min(2.0, float(torch.exp(logprob.detach() - each.rollout.logprobs[place])))
                total = total - advantage * weight * logprob / len(completion) / 12
    total.backward()  # type: ignore[union-attr]
    return gradients(oracle)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo"])
def test_rl_against_trls_own_step(
    tmp_path: Path, models: dict[str, Path], tokenizer_folder: Path, loss_type: str
) -> None:
    """TRL trains one step on the same rollouts; what its optimizer would get is what ours gets."""
    import datasets

    with patch("trl.import_utils.is_vllm_available", return_value=False):
        from trl import GRPOConfig, GRPOTrainer

    scored = rollouts(models["base"])
    theirs: dict[str, torch.Tensor] = {}

    class Watch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
            theirs.update(gradients(model))

    def given(prompts: list, trainer: Any) -> dict[str, Any]:
        fields = ("prompt_ids", "completion_ids", "logprobs")
        return {field: [list(getattr(each.rollout, field)) for each in scored] for field in fields}

    arguments = GRPOConfig(
        output_dir=str(tmp_path / "theirs"), per_device_train_batch_size=2, gradient_accumulation_steps=6,
        num_generations=4, max_steps=1, temperature=0.7, loss_type=loss_type, max_completion_length=17,
        max_grad_norm=1e9, shuffle_dataset=False, gradient_checkpointing=False, use_cpu=True, bf16=False,
        report_to="none", disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    trainer = GRPOTrainer(
        load(models["base"]),
        reward_funcs=lambda completions, **_: [0.7 * each.outcome + 0.3 * each.length for each in scored],
        args=arguments,
        train_dataset=datasets.Dataset.from_list([{"prompt": text} for text in "abc"]),
        processing_class=transformers.AutoTokenizer.from_pretrained(tokenizer_folder),
        rollout_func=given,
        callbacks=[Watch()],
    )
    trainer.train()
    assert_close(ours(models["base"], tokenizer_folder, scored, tmp_path, loss_type=loss_type), theirs, 2e-5)


def test_the_log_prob_of_a_token_after_its_thought(models: dict[str, Path]) -> None:
    base, oracle = load_base(models["base"], "float32", CPU), load(models["base"]).double()
    random = np.random.default_rng(0)
    sequences = [random.integers(1, 500, size=size).tolist() for size in (2, 9, 5, 17, 3)]
    for sequence, found in zip(sequences, target_logprobs(base, sequences, 2), strict=True):
        logprobs = oracle(input_ids=torch.tensor([sequence])).logits[0].log_softmax(-1)
        assert found == pytest.approx(logprobs[-2, sequence[-1]].item(), abs=1e-5)
