"""The losses of a step, each with its backward pass: L_RL over rollouts, L_NTP over all other tokens, the warm-up's.

In: a ready run and the positions of a step. Out: gradients, added up in the model, and figures for the metrics. All
processes take part, each with its share of the positions and rows.
"""

import contextlib
from collections.abc import Sequence
from time import perf_counter
from typing import Any

import torch

from pipelines.rmt.answers import information_gain
from pipelines.rmt.budget import length_reward
from pipelines.rmt.evaluation import thought_limit
from pipelines.rmt.figures import rollout_figures
from pipelines.rmt.grpo import Scored
from pipelines.rmt.model import target_logprobs
from pipelines.rmt.policy import Policy
from pipelines.rmt.positions import Position
from pipelines.rmt.prompts import Prompter
from pipelines.rmt.rollouts import Rollout, Shape, outcome, sample_rollouts
from pipelines.rmt.setup import Run, distribution, tier_names
from pipelines.rmt.warmup import format_budgets, format_rows
from trainer.batch import Row, collate
from trainer.batches import GlobalBatch
from trainer.distributed import World, accumulate_only
from trainer.objectives.ntp import NTP
from trainer.session import Session
from trainer.statistics import StepStatistics


def learn_policy(
    run: Run, session: Session, policy: Policy, step: int, positions: Sequence[Position]
) -> tuple[float, dict[str, Any]]:
    """Gradients of L_RL; its value and the figures of the rollouts. All processes take part."""
    config, world = run.config, session.world
    policy.sync_seconds = 0.0
    if policy.takes_weights(step):
        policy.give_weights()
    budget = policy.budget(step)
    prompts = [run.prompter.prompt(position.prefix_ids, budget) for position in positions]
    shape = Shape(
        config.num_generations, thought_limit(config, run.prompter, budget), config.answer, config.max_answer,
        config.temperature,
    )  # fmt: skip
    began = perf_counter()
    seed = (config.seed * 1_000_003 + step) % (1 << 32)
    groups = sample_rollouts(policy.sample, prompts, shape, run.token_bytes, seed)
    sampled = perf_counter() - began
    scored = score(run, world, positions, groups, budget)
    own = [entry for group in scored[world.rank :: world.size] for entry in group]
    total = 0.0
    batches = policy.grpo.batches(own)
    for index, batch in enumerate(batches):
        with exchanged(run, index == len(batches) - 1 and not config.ntp_weight):
            loss = policy.grpo.loss(batch)
            loss.backward()
        total += loss.item()
    rl_loss = world.sum(torch.tensor(total)).item() / world.size
    probabilities = distribution(config, run.index.counts, step - config.format_steps)
    figures = rollout_figures(scored, positions, tier_names(config), budget)
    figures |= {"tier_probabilities": dict(zip(tier_names(config), probabilities.tolist(), strict=True))}
    figures |= {"rollout_seconds": sampled, "sync_seconds": policy.sync_seconds, **policy.grpo.metrics()}
    return rl_loss, figures


def score(
    run: Run, world: World, positions: Sequence[Position], groups: Sequence[Sequence[Rollout]], budget: int | None
) -> list[list[Scored]]:
    """The rewards of all rollouts, on all processes; what the model has to be asked for each asks for its share."""
    config = run.config
    if config.reward == "gain":
        own = list(zip(positions, groups, strict=True))[world.rank :: world.size]
        sequences = [
            [*rollout.prompt_ids, *closed(rollout, run.prompter), position.target]
            for position, group in own
            for rollout in group
        ]
        logprobs = world.gather(torch.tensor(target_logprobs(run.base, sequences, config.micro_batch_size)))
        by_rank = logprobs.view(world.size, -1, config.num_generations)
        found = [by_rank[number % world.size, number // world.size].tolist() for number in range(len(positions))]
        outcomes = [
            [information_gain(logprob, position.baseline) for logprob in group]
            for position, group in zip(positions, found, strict=True)
        ]
    else:
        outcomes = [
            [outcome(rollout, position, config.answer, run.token_bytes) for rollout in group]
            for position, group in zip(positions, groups, strict=True)
        ]
    return [
        [
            Scored(rollout, value, length_part(rollout, budget, config.length_most))
            for rollout, value in zip(group, values, strict=True)
        ]
        for group, values in zip(groups, outcomes, strict=True)
    ]


def closed(rollout: Rollout, prompter: Prompter) -> list[int]:
    """The completion, with a closing tag where the thought was cut off or ended by an end token, which is left out."""
    ids = list(rollout.completion_ids)
    if rollout.completion.closed:
        return ids
    while ids and ids[-1] in prompter.end_ids:
        ids.pop()
    return [*ids, *prompter.close_ids]


def length_part(rollout: Rollout, budget: int | None, most: float) -> float:
    """The length's reward; a thought that does not end keeps to no budget."""
    if budget is None or not rollout.completion.closed:
        return 0.0
    return length_reward(rollout.completion.thought_tokens, budget, most)


def learn_format(
    run: Run, session: Session, policy: Policy, step: int, positions: Sequence[Position]
) -> tuple[float, dict[str, Any]]:
    """Gradients of the next-token loss of the warm-up's rows; its value and figures. All processes take part."""
    config, world = run.config, session.world
    began = perf_counter()
    several = [position for position in positions for _ in range(config.num_generations)]  # as much as in other steps
    budgets = format_budgets(config, step, len(several))
    rows = format_rows(
        policy.sample, several, budgets, run.prompter, config.budget == "on", config.temperature,
        (config.seed * 1_000_003 + step) % (1 << 32),
    )  # fmt: skip
    sampled = perf_counter() - began
    predicted = sum(int(row.predicted.sum()) for row in rows)
    statistics = StepStatistics(world.device, run.sources.group, NTP.figures)
    batches = GlobalBatch(rows[world.rank :: world.size], len(rows), 0.0).micro_batches(
        config.micro_batch_size, world.size
    )
    for batch in batches:
        with exchanged(run, is_last=False):  # those of the other positions come after
            run.called(collate(batch, "packed", world.device), NTP, predicted, world.size, statistics).backward()
    world.sum(statistics.table)
    prompt_tokens = sum(len(row.input_ids) for row in rows) - predicted
    figures = {"budget": None, "prompt_tokens": prompt_tokens, "rollout_tokens": predicted, "rollout_seconds": sampled}
    return statistics.sums["loss"] / predicted, figures


def learn_others(
    run: Run, session: Session, rows: Sequence[Row], weight: float, statistics: StepStatistics
) -> dict[str, Any]:
    """Gradients of weight * L_NTP over the rows, of which the step's positions are not predicted; its figures."""
    config, world = run.config, session.world
    predicted = sum(int(row.predicted.sum()) for row in rows)
    batches = GlobalBatch(list(rows[world.rank :: world.size]), len(rows), 0.0)
    micro_batches = batches.micro_batches(config.micro_batch_size, world.size)
    for index, batch in enumerate(micro_batches):
        with exchanged(run, index == len(micro_batches) - 1):
            scale = world.size * weight  # DDP averages over the processes, which the factor makes a sum
            run.called(run.collate(batch), NTP, max(1, predicted), scale, statistics).backward()
    world.sum(statistics.table)
    if not predicted:
        return {"loss": 0.0}
    figures = statistics.metrics(run.sources)
    wanted = ("predicted_tokens", "ntp_loss")
    sources = {name: {key: values[key] for key in wanted} for name, values in figures["sources"].items()}
    return {"loss": figures["ntp_loss"], "predicted_tokens": figures["predicted_tokens"], "sources": sources}


def exchanged(run: Run, is_last: bool) -> Any:
    """Context of a backward pass: the processes exchange their gradients in the last one of a step."""
    return contextlib.nullcontext() if is_last else accumulate_only(run.called)
