"""What a step reports of its rollouts: rewards, lengths of thoughts, and the share that was right, by tier."""

from collections.abc import Sequence
from statistics import fmean, pstdev
from typing import Any

from pipelines.rmt.grpo import Scored
from pipelines.rmt.positions import Position


def rollout_figures(
    scored: Sequence[Sequence[Scored]], positions: Sequence[Position], names: Sequence[str], budget: int | None
) -> dict[str, Any]:
    """Figures over all rollouts of a step. names: of the tiers; budget: tokens of thought asked for, None without one."""
    flat = [entry for group in scored for entry in group]
    thoughts = [entry.rollout.completion.thought_tokens for entry in flat]
    tiers: dict[str, Any] = {}
    for number, name in enumerate(names):
        groups = [group for group, position in zip(scored, positions, strict=True) if position.tier == number]
        if groups:
            outcomes = [entry.outcome for group in groups for entry in group]
            lengths = [entry.rollout.completion.thought_tokens for group in groups for entry in group]
            tiers[name] = {"positions": len(groups), "outcome": fmean(outcomes), "thought_tokens": fmean(lengths)}
    return {
        "budget": budget,
        "outcome": fmean(entry.outcome for entry in flat),
        "length_reward": fmean(entry.length for entry in flat),
        "thought_tokens": fmean(thoughts),
        "thought_tokens_std": pstdev(thoughts),
        "closed": fmean(entry.rollout.completion.closed for entry in flat),
        "tiers": tiers,
        "rollouts": len(flat),
        "prompt_tokens": sum(len(entry.rollout.prompt_ids) for entry in flat),
        "rollout_tokens": sum(len(entry.rollout.completion_ids) for entry in flat),
    }
