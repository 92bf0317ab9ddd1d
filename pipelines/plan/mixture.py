"""What a mixture of folders makes of a plan: the corpus is all of them, and each source is drawn from by its weight."""

import math
from dataclasses import asdict, replace
from typing import Any

from pipelines.plan.layout import Job
from pipelines.plan.settings import PlanConfig
from pipelines.terminal import counted
from trainer.mixed_shards import MANY_EPOCHS, MixedShards, drawn, most_steps
from trainer.mixture import given_mixture

ROUNDING = 1e-12  # of floats, so that a whole number of steps is not taken for a little more


def with_folders(config: PlanConfig) -> tuple[PlanConfig, MixedShards]:
    """The folders that are given, and the settings with their rows: tokens and seq_len of the corpus, and how often a run
    goes through it."""
    mixed = MixedShards.open(given_mixture(config.shards, config.mix))
    mixed.require_alike(None)
    tokens = sum(folder.manifest.tokens for folder in mixed.folders)
    passes = config.num_tokens / tokens
    return replace(
        config, shards=(), mix=None, tokens=str(tokens), epochs=passes, seq_len=mixed.first.manifest.seq_len
    ), mixed  # fmt: skip


def tokens_of_steps(mixed: MixedShards, global_batch_size: int, num_steps: int) -> float:
    """Tokens that so many steps train on: in each stage the global batch x the mean tokens per row by its shares."""
    starts = [stage.after_step for stage in mixed.mixture.stages]
    total = 0.0
    for start, end, row_tokens in zip(starts, [*starts[1:], num_steps], _row_tokens(mixed)):
        total += max(0, min(end, num_steps) - start) * global_batch_size * row_tokens
    return total


def steps_of_tokens(mixed: MixedShards, global_batch_size: int, tokens: float) -> int:
    """The fewest steps, at least 1, that train on so many tokens; the other way round from tokens_of_steps."""
    starts, before = [stage.after_step for stage in mixed.mixture.stages], 0.0
    steps = 1
    for start, end, row_tokens in zip(starts, [*starts[1:], math.inf], _row_tokens(mixed)):
        of_step = global_batch_size * row_tokens
        steps = start + math.ceil((tokens - before) / of_step * (1 - ROUNDING))
        if steps <= end:
            break
        before += (end - start) * of_step
    return max(1, steps)


def _row_tokens(mixed: MixedShards) -> list[float]:
    """Mean tokens per row of the mixture in each stage."""
    means = [folder.manifest.tokens / folder.manifest.rows for folder in mixed.folders]
    shares = [mixed.shares([stage.weights[name] for name in mixed.names]) for stage in mixed.mixture.stages]
    return [sum(share * mean for share, mean in zip(of_stage, means)) for of_stage in shares]


def mixture_job(job: Job, mixed: MixedShards) -> Job:
    """A run over the corpus of `job` as the mixture draws from it: its rows may be shorter than seq_len."""
    steps = steps_of_tokens(mixed, job.global_batch_size, round(job.tokens * job.epochs))
    row_tokens = tokens_of_steps(mixed, job.global_batch_size, steps) / (steps * job.global_batch_size)
    return replace(job, steps=steps, row_tokens=row_tokens)


def add_mixture(figures: dict[str, Any], mixed: MixedShards) -> None:
    """Put what the run takes of each source into the figures of a plan, with a warning where that is too much."""
    batch, steps = figures["job"]["global_batch_size"], figures["job"]["steps"]
    order = mixed.order(0, batch)
    of_run = drawn(mixed, order, steps * batch)
    figures["mixture"] = {
        "steps": steps,
        "tokens": round(figures["job"]["tokens"] * figures["job"]["epochs"]),
        "sources": {
            of.name: asdict(of) | {"tokens_of_folder": folder.manifest.tokens}
            for of, folder in zip(of_run, mixed.folders)
        },
    }
    allowed, name = most_steps(mixed, order, batch)
    if steps > allowed:
        most = math.floor(tokens_of_steps(mixed, batch, int(allowed)))
        figures["warnings"].append(
            f"{name} would be repeated more than its max_epochs: remit train allows {counted(int(allowed), 'step')} of "
            f"{counted(batch, 'row')}, --tokens {most} at most"
        )
    figures["warnings"] += [
        f"{of.name} is repeated {of.epochs:.1f} times; more than {MANY_EPOCHS} epochs are rarely worth it"
        for of in of_run
        if of.epochs > MANY_EPOCHS
    ]
