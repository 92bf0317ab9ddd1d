"""GRPO from TRL: advantages, importance weights, clipping, KL and loss are its GRPOTrainer's; the loop is ours.

In: rollouts with the parts of their reward. Out: batches, and their loss. TRL's trainer is never asked to train: it gets
the rollouts in place of its own generation (rollout_func), and its compute_loss is called on the micro-batches.
"""

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from pipelines.rmt.model import count_positions_from_the_mask
from pipelines.rmt.rollouts import Rollout
from pipelines.rmt.settings import RmtConfig

Batch = dict[str, Any]
RATIO_MOST = 2.0
"""Weights of tokens that the engine found less probable than the model does are cut to this (truncated importance
sampling); those of tokens that it found more probable need no bound."""


@dataclass(frozen=True)
class Scored:
    """A rollout and its reward: outcome is that of --reward, length that of the budget."""

    rollout: Rollout
    outcome: float
    length: float


def outcome(completions: list[Any], outcome: list[float], **_: Any) -> list[float]:
    """TRL's reward function for what was computed already."""
    return outcome


def length(completions: list[Any], length: list[float], **_: Any) -> list[float]:
    """TRL's reward function for what was computed already."""
    return length


class Grpo:
    """TRL's GRPOTrainer around a model. model: a PreTrainedModel; called: what its forward goes through, the same or a
    module that is spread over processes; num_rollouts: of this process and step."""

    def __init__(
        self, config: RmtConfig, model: Any, called: nn.Module, tokenizer: Any, num_rollouts: int, dtype: torch.dtype
    ) -> None:
        import datasets

        # TRL imports vLLM wherever it is installed, which takes seconds and changes transformers' classes
        with patch("trl.import_utils.is_vllm_available", return_value=False):
            from trl import GRPOConfig, GRPOTrainer

        self.micro_batch_size = largest_divisor(num_rollouts, config.micro_batch_size)
        self._micro_batches = num_rollouts // self.micro_batch_size
        weight = config.length_weight if config.budget == "on" else 0.0
        parts: list[Any] = [outcome, length] if weight else [outcome]
        scratch = tempfile.TemporaryDirectory(prefix="remit-trl-")  # TRL makes it, and puts nothing in
        arguments = GRPOConfig(
            output_dir=scratch.name,
            per_device_train_batch_size=self.micro_batch_size,
            gradient_accumulation_steps=self._micro_batches,
            num_generations=config.num_generations,
            max_completion_length=config.most_thought + config.most_answer,
            temperature=config.temperature,
            epsilon=config.clip,
            beta=config.kl,
            loss_type=config.loss_type,
            reward_weights=[1 - weight, weight][: len(parts)],
            vllm_importance_sampling_correction=True,
            vllm_importance_sampling_mode="token_truncate",
            vllm_importance_sampling_clip_max=RATIO_MOST,
            gradient_checkpointing=False,
            bf16=dtype == torch.bfloat16,
            use_cpu=not torch.cuda.is_available(),
            seed=config.seed,
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
        )
        random = torch.get_rng_state()  # TRL seeds it, and a run that goes on has its own by then
        make: Any = GRPOTrainer
        self._trainer: Any = make(
            model,
            reward_funcs=parts,
            args=arguments,
            train_dataset=datasets.Dataset.from_list([{"prompt": ""}]),  # of which nothing is read
            processing_class=tokenizer,
            rollout_func=self._roll_out,
        )
        if self._trainer.ref_model is not None:  # TRL's own copy of the base, for the KL
            count_positions_from_the_mask(self._trainer.ref_model)
        torch.set_rng_state(random)
        scratch.cleanup()
        # The rollouts come from vLLM, so TRL is to weigh them by what the model says of them now: that covers both the
        # engine's rounding and weights that are some steps old. It is not to start an engine of its own, though.
        self._trainer.use_vllm = True
        nothing: Any = _NothingToSync()
        self._trainer.vllm_generation = nothing
        self._trainer._last_loaded_step = 0
        self._trainer.current_gradient_accumulation_steps = self._micro_batches
        self.called, self._trainer.model_wrapped = called, called
        self._rollouts: Sequence[Rollout] = ()
        self._tokens: list[float] = []  # of all processes, for each micro-batch whose loss was asked for

    def _roll_out(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [list(rollout.prompt_ids) for rollout in self._rollouts],
            "completion_ids": [list(rollout.completion_ids) for rollout in self._rollouts],
            "logprobs": [list(rollout.logprobs) for rollout in self._rollouts],
        }

    def batches(self, scored: Sequence[Scored]) -> list[Batch]:
        """Micro-batches with TRL's advantages; groups stand together in `scored`. All processes take part."""
        from trl.trainer.utils import split_tensor_dict

        self._rollouts = [entry.rollout for entry in scored]
        examples = [{"prompt": "", "outcome": entry.outcome, "length": entry.length} for entry in scored]
        whole = self._trainer._generate_and_score_completions(examples)
        self._rollouts = ()
        split: list[Batch] = split_tensor_dict(whole, self._micro_batches)
        return split

    def loss(self, batch: Batch) -> Tensor:
        """TRL's loss of a micro-batch; those of a step add up, and processes are averaged over."""
        value: Tensor = self._trainer.compute_loss(self.called, batch)
        counted: Any = self._trainer.accelerator.reduce(batch["completion_mask"].sum().float(), reduction="sum")
        self._tokens.append(counted.item())
        return value

    def metrics(self) -> dict[str, float]:
        """Means over the step of what TRL has noted, by our names; emptied. What TRL notes of a micro-batch is a mean over
        its tokens, and weighs as many."""
        noted, tokens = self._trainer._metrics["train"], self._tokens
        self._tokens = []
        found = {}
        for theirs, ours in (OF_STEP | OF_MICRO_BATCH).items():
            values = noted.get(theirs, [])
            weights = tokens if theirs in OF_MICRO_BATCH else [1.0] * len(values)
            pairs = [(value, weight) for value, weight in zip(values, weights, strict=False) if math.isfinite(value)]
            if total := sum(weight for _, weight in pairs):
                found[ours] = sum(value * weight for value, weight in pairs) / total
        noted.clear()
        return found


OF_STEP = {
    "reward": "reward",
    "reward_std": "reward_std",
    "frac_reward_zero_std": "groups_without_advantage",
    "sampling/sampling_logp_difference/mean": "engine_difference",
}
OF_MICRO_BATCH = {"entropy": "policy_entropy", "kl": "kl", "clip_ratio/region_mean": "ratio_clipped"}
"""TRL's metrics, noted once per step or once per micro-batch, and what ours call them."""


class _NothingToSync:
    def sync_weights(self) -> None:
        """The loop gives the engines their weights."""


def largest_divisor(number: int, most: int) -> int:
    """The largest divisor of `number` up to `most`."""
    return next(size for size in range(min(number, most), 0, -1) if number % size == 0)
