"""What a mixture of folders makes of a plan: the corpus is all of them, and each source is drawn from by its weight."""

from dataclasses import asdict, replace
from typing import Any

from pipelines.plan.settings import PlanConfig
from trainer.mixed_shards import MANY_EPOCHS, MixedShards, drawn, most_steps
from trainer.mixture import given_mixture


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


def add_mixture(figures: dict[str, Any], mixed: MixedShards) -> None:
    """Put what the run takes of each source into the figures of a plan, with a warning where that is too much."""
    job = figures["job"]
    batch, seq_len = job["global_batch_size"], job["seq_len"]
    order = mixed.order(0, batch)
    # rows may be shorter than seq_len, and a stage changes what they are on average
    steps = job["steps"]
    trained = round(job["tokens"] * job["epochs"])
    for _ in range(8):
        tokens = sum(of.tokens for of in drawn(mixed, order, steps * batch))
        steps = max(1, round(steps * trained / max(1, tokens)))
    of_run = drawn(mixed, order, steps * batch)
    figures["mixture"] = {
        "steps": steps,
        "sources": {
            of.name: asdict(of) | {"tokens_of_folder": folder.manifest.tokens}
            for of, folder in zip(of_run, mixed.folders)
        },
    }
    allowed, name = most_steps(mixed, order, batch)
    if steps > allowed:
        figures["warnings"].append(
            f"{name} would be repeated more than its max_epochs: remit train allows {allowed:,.0f} steps of {batch} rows, "
            f"{allowed * batch * seq_len / 1e9:.4g}B tokens at most"
        )
    figures["warnings"] += [
        f"{of.name} is repeated {of.epochs:.1f} times; more than {MANY_EPOCHS} epochs are rarely worth it"
        for of in of_run
        if of.epochs > MANY_EPOCHS
    ]
