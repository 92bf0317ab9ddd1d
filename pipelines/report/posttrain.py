"""Runs of remit sft, dpo and rl in remit report: TRL's figures under names that say what they are of, and their panels.

The loss of one stage is not that of another, so each has a name of its own; a step, its tokens, learning rate and gradient
norm are those of any run.
"""

from typing import Any

from pipelines.report.panels import Panel

STAGES = {"sft": "Supervised fine-tuning", "dpo": "Preferences (DPO)", "rl": "Reinforcement learning"}
_OF_ANY = {"num_tokens": "tokens", "learning_rate": "lr", "grad_norm": "grad_norm"}
_OF_STAGE = {
    "sft": {"loss": "sft_loss", "mean_token_accuracy": "token_accuracy"},
    "dpo": {
        "loss": "dpo_loss", "rewards/accuracies": "pair_accuracy", "rewards/margins": "margin",
        "rewards/chosen": "chosen_reward", "rewards/rejected": "rejected_reward",
    },
    "rl": {
        "reward": "reward", "reward_std": "reward_std", "rewards/answer_reward/mean": "correct_rate",
        "correct_rate": "correct_rate", "completions/mean_length": "completion_length",
        "completions/clipped_ratio": "cut_completions", "entropy": "policy_entropy", "kl": "policy_kl",
    },
}  # fmt: skip
PANELS = {
    "sft": (
        Panel("SFT loss", "nats per token", ("sft_loss",), ".4f", note="over completions and their end tokens."),
        Panel("Tokens that the model would have chosen", "share of tokens", ("token_accuracy",), ".2%"),
    ),
    "dpo": (
        Panel("DPO loss", "nats per pair", ("dpo_loss",), ".4f", note="ln 2 = 0.693 where the model begins."),
        Panel("Pairs in the right order", "share of pairs", ("pair_accuracy",), ".2%"),
        Panel("Margin", "nats", ("margin",), note="of the implicit rewards: chosen minus rejected, times beta."),
        Panel("Implicit rewards", "nats", ("chosen_reward", "rejected_reward"),
              note="of the chosen (solid) and the rejected completions (dotted)."),
    ),
    "rl": (
        Panel("Reward", "per completion", ("reward",), ".4f"),
        Panel("Correct rate", "share of completions", ("correct_rate",), ".2%",
              note="completions whose answer is right: --reward answer, or what a reward logs as correct_rate."),
        Panel("Length of the completions", "tokens", ("completion_length",), ".1f"),
        Panel("Completions that were cut off", "share of completions", ("cut_completions",), ".2%",
              note="at --max-completion-length."),
        Panel("Spread of the reward", "per prompt", ("reward_std",), ".4f",
              note="standard deviation; where it is 0 nothing is learned."),
        Panel("Entropy of the policy", "nats per token", ("policy_entropy",), ".4f"),
        Panel("KL divergence from the start", "nats per token", ("policy_kl",), ".4f", note="with --beta."),
    ),
}  # fmt: skip


def stage_of(settings: dict[str, Any]) -> str | None:
    """sft, dpo or rl; None for a run of remit train."""
    stage = settings.get("stage")
    return stage if stage in STAGES else None


def log_every(settings: dict[str, Any]) -> int:
    """Steps of a line of metrics.jsonl."""
    every = settings.get("log_every") if stage_of(settings) else 1
    return every if isinstance(every, int) and every > 0 else 1


def renamed(line: dict[str, Any], stage: str) -> dict[str, Any]:
    """The figures of a line of TRL's under our names; those without a panel are left out."""
    names = _OF_ANY | _OF_STAGE[stage]
    return {"step": line["step"], **{names[name]: value for name, value in line.items() if name in names}}
