"""Next-token accuracy by tier over held-out positions, with a thought and without one, as part of evaluation.jsonl."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.rmt.budget import budget_at
from pipelines.rmt.curriculum import HELD_OUT, Draw, draw
from pipelines.rmt.engine import Sampler, Sampling
from pipelines.rmt.positions import Position, PositionReader
from pipelines.rmt.prompts import Prompter
from pipelines.rmt.rollouts import Rollout, Shape, outcome, sample_rollouts
from pipelines.rmt.settings import TIERS, RmtConfig
from pipelines.rmt.tier_index import NO_LIMITS, Limits, count_tiers, entropy_column
from shards.folder import ShardFolder
from trainer.checks import check_fits
from trainer.model import Base
from trainer.tokenizer import check_tokenizer


def held_out_positions(config: RmtConfig, base: Base, limits: Limits = NO_LIMITS) -> list[Position]:
    """--eval-positions of each of the three tiers of --eval-shards, or as many as there are; the same in every run."""
    assert config.eval_shards is not None
    shards = ShardFolder(config.eval_shards)
    shards.require_complete()
    check_fits(base, Path(config.model), shards)
    check_tokenizer(Path(config.model), shards)
    return draw_held_out(
        shards, config.reference, config.thresholds, config.eval_positions, base.num_embeddings, limits
    )


def draw_held_out(
    shards: ShardFolder,
    reference: str,
    thresholds: Sequence[float],
    count: int,
    num_embeddings: int,
    limits: Limits = NO_LIMITS,
) -> list[Position]:
    """`count` positions of each tier from easy up, or as many as there are. num_embeddings: token ids are below it."""
    entropy_column(shards, reference)
    context = shards.require_reference(reference)["context"]
    index = count_tiers(shards, reference, thresholds, limits=limits)
    reader = PositionReader(shards, index, reference, thresholds, context, num_embeddings, limits=limits)
    found: list[Draw] = []
    for tier in range(1, len(TIERS)):
        only = [float(other == tier) for other in range(len(TIERS))]
        size = min(count, index.counts[tier])
        drawn = draw(0, 0, np.array(only), index.counts, size, HELD_OUT) if size else []
        found += sorted(drawn, key=lambda each: each.ordinal)
    return [reader.position(each) for each in found]


def measure_accuracy(
    config: RmtConfig,
    positions: Sequence[Position],
    step: int,
    sample: Sampler,
    prompter: Prompter,
    token_bytes: Sequence[bytes],
) -> dict[str, Any]:
    """{"tiers": {name: {positions, accuracy, accuracy_with_thought, closed, thought_tokens}}}; greedy, one each.

    step: 1..max_steps, whose budget is asked for. accuracy: the most probable token after the bare text is the true one.
    accuracy_with_thought: by the rule of --reward; with gain the most probable token after the thought counts.
    """
    budget = None
    if config.budget == "on":
        budget = budget_at(step, config.max_steps, config.first_budget, config.least_budget, config.budget_decay)
    answer = "token" if config.answer == "none" else config.answer
    bare = [list(position.prefix_ids[-prompter.max_prefix :]) for position in positions]
    direct = sample(bare, [Sampling(1, 1, 0.0)] * len(bare), 0)
    prompts = [prompter.prompt(position.prefix_ids, budget) for position in positions]
    shape = Shape(1, thought_limit(config, prompter, budget), answer, config.max_answer, 0.0)
    thinking = [group[0] for group in sample_rollouts(sample, prompts, shape, token_bytes, 0)]
    tiers: dict[str, Any] = {}
    for tier, name in enumerate(TIERS):
        own = [number for number, position in enumerate(positions) if position.tier == tier]
        if not own:
            continue
        mean: Callable[[list[float]], float] = lambda values: sum(values) / len(values)  # noqa: E731
        rollouts: list[Rollout] = [thinking[number] for number in own]
        tiers[name] = {
            "positions": len(own),
            "accuracy": mean([float(direct[number][0].token_ids[0] == positions[number].target) for number in own]),
            "accuracy_with_thought": mean(
                [outcome(thinking[number], positions[number], answer, token_bytes) for number in own]
            ),
            "closed": mean([float(rollout.completion.closed) for rollout in rollouts]),
            "thought_tokens": mean([float(rollout.completion.thought_tokens) for rollout in rollouts]),
        }
    return {"tiers": tiers}


def thought_limit(config: RmtConfig, prompter: Prompter, budget: int | None) -> int:
    """Tokens of a thought and its closing tag at most: where twice the budget is passed, no length earns anything."""
    return (config.most_thought if budget is None else 2 * budget) + len(prompter.close_ids)
