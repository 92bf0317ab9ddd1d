"""remit plan --weights: what ReMiT would do to a corpus, from two stored columns, without a model.

In: a folder with the log-probs of a reference and of the base. Out: per epsilon how many tokens are clipped and what
the weights are, the tokens of the vocabulary that gain and lose most, quantiles of the excess loss; as one JSON object
and as tables. N = predicted tokens of a row, V = ids of the tokenizer, K = those that occur often enough. Losses in nats.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.plan.rows import choose_context, choose_rows, read_batches
from pipelines.plan.settings import PlanConfig
from pipelines.token_ranking import TokenRanking
from pipelines.token_text import token_label, token_strings
from shards.folder import ShardFolder
from trainer.objectives.objective import Tokens
from trainer.objectives.remit import make
from trainer.objectives.settings import ObjectiveSettings
from trainer.statistics import Sources, StepStatistics


def plan_weights(folder: ShardFolder, config: PlanConfig, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """The figures, as --json writes them. progress(rows, tokens) is told how far it is after each record batch.

    Weights are those of a first training step with this base: the same function, row by row, in float32.
    """
    folder.require_complete()
    context = choose_context(folder, config.reference, config.base)
    objectives = {
        epsilon: make(ObjectiveSettings(epsilon=epsilon, centring=config.centring, weight_map=config.weight_map))
        for epsilon in (*config.epsilon_values, config.show_epsilon)
    }
    statistics = {epsilon: StepStatistics() for epsilon in objectives}
    manifest = folder.manifest
    ranking = TokenRanking(manifest.tokenizer["vocab_size"])
    chosen = choose_rows(manifest, config.rows, config.seed)
    done = used = tokens = 0
    for rows in read_batches(folder, context, config.reference, config.base, chosen):
        found = [(np.zeros(0, dtype=np.int64), np.zeros(0), np.zeros(0))]  # ids, weights, excess losses
        for row in rows:
            done += 1
            if row is None:
                continue
            used, tokens = used + 1, tokens + row.tokens
            if not len(row.ids_N):
                continue  # nothing precedes any of its tokens
            losses_N, document_N = torch.from_numpy(-row.base_N), torch.from_numpy(row.document_N)
            stored = {"logprobs": torch.from_numpy(row.reference_N)}
            seen = Tokens(losses_N, torch.zeros_like(document_N), document_N, stored)
            for epsilon, objective in objectives.items():
                assert objective.weigh is not None
                weighted = objective.weigh(seen)
                statistics[epsilon].add_weights(0, losses_N, weighted)
                if epsilon == config.show_epsilon:
                    assert weighted.delta_N is not None
                    found.append((row.ids_N, weighted.weights_N.numpy(), weighted.delta_N.numpy()))
        ranking.add(*map(np.concatenate, zip(*found)))
        progress(done, tokens)
    if not ranking.count_V.any():
        raise ValueError(
            f"{folder.path}: none of the {done:,} rows that were read has a token with log-probs of both; raise --rows"
        )
    metrics = {epsilon: statistics[epsilon].metrics(Sources(())) for epsilon in objectives}
    some = metrics[config.show_epsilon]
    return {
        "sample": {
            "rows": done,
            "rows_total": manifest.rows,
            "rows_quarantined": done - used,
            "tokens": tokens,
            "tokens_total": manifest.tokens,
            "predicted_tokens": some["predicted_tokens"],
            "seed": config.seed,
        },
        "reference": config.reference,
        "base": config.base,
        "base_logprob_step": manifest.references[config.base].get("logprob_step", 0),
        "context": context,
        "centring": config.centring,
        "weight_map": config.weight_map,
        "manifest_sha256": manifest.checksum,
        "epsilons": {str(epsilon): _figures(metrics[epsilon]) for epsilon in config.epsilon_values},
        "excess_loss": {"mean": some["delta_mean"], "quantiles": some["delta_quantiles"]},
        "vocabulary": _vocabulary(folder, config, ranking),
    }


def _figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """A line of the table from the figures of a training step; None where a weight went beyond float32."""
    low, high, mean = metrics["clipped_low"], metrics["clipped_high"], metrics["weight_mean"]
    weights = (metrics["effective_tokens"] / metrics["predicted_tokens"], mean, metrics["weight_std"])
    names = ("effective_share", "weight_mean", "weight_std")
    return {"clipped_low": low, "clipped_high": high, "in_between": max(0.0, 1 - low - high)} | {
        name: value if math.isfinite(mean) else None for name, value in zip(names, weights)
    }


def _vocabulary(folder: ShardFolder, config: PlanConfig, ranking: TokenRanking) -> dict[str, Any]:
    """The tokens with the largest and the smallest mean weight among those that occur often enough."""
    most = ranking.most(config.top, config.min_count)
    for direction in ("up", "down"):
        strings = token_strings(folder, [entry["id"] for entry in most[direction]])
        most[direction] = [
            {"id": entry["id"], "token": string} | entry for entry, string in zip(most[direction], strings)
        ]
    return {"epsilon": str(config.show_epsilon), "min_count": config.min_count, **most}


def show(figures: dict[str, Any], console: Console) -> None:
    """The tables, for 80 columns."""
    sample, vocabulary = figures["sample"], figures["vocabulary"]
    reference, base, step = figures["reference"], figures["base"], figures["base_logprob_step"]
    which = "all" if sample["rows"] == sample["rows_total"] else f"random, --seed {sample['seed']}"
    left_out = f", {sample['rows_quarantined']:,} of them quarantined and left out" * bool(sample["rows_quarantined"])
    rounded = f", rounded to {step:g} nat" if step else ""
    console.print(
        Text(
            f"rows: {sample['rows']:,} of {sample['rows_total']:,} ({which}){left_out}\n"
            f"tokens: {sample['tokens']:,} of {sample['tokens_total']:,}, {sample['predicted_tokens']:,} of them predicted\n"
            f"weights: reference {reference}, base {base}, {figures['context']} context, centring {figures['centring']}, "
            f"map {figures['weight_map']}\n"
            f"The log-probs of {base} were stored before training{rounded}: these are the weights of the first step, "
            "and change as the base learns."
        )
    )
    lines = [
        [epsilon, *(_share(line[name]) for name in ("clipped_low", "clipped_high", "in_between", "effective_share"))]
        + [_number(line[name]) for name in ("weight_mean", "weight_std")]
        for epsilon, line in figures["epsilons"].items()
    ]
    headers = ["epsilon", "clipped low", "clipped high", "in between", "effective", "mean w", "std w"]
    _table(console, "Tokens by --epsilon; effective: (sum w)^2 / sum w^2, of all", headers, lines)
    excess = figures["excess_loss"]
    headers = [*(f"{float(share):.0%}" for share in excess["quantiles"]), "mean"]
    values = [*excess["quantiles"].values(), excess["mean"]]
    title = f"Quantiles of the excess loss, {base} - {reference}, in nats"
    _table(console, title, headers, [[f"{value:+.2f}" for value in values]])
    for direction in ("up", "down"):
        strings = [token_label(entry["token"]) for entry in vocabulary[direction]]
        lines = [
            [string, f"{count:,}", _number(weight), f"{delta:+.3f}"]
            for string, (_, _, count, weight, delta) in zip(
                strings, (entry.values() for entry in vocabulary[direction])
            )
        ]
        title = f"Most {direction}-weighted of {vocabulary['tokens']:,} tokens that occur at least "
        title += f"{vocabulary['min_count']:,} times, at epsilon {vocabulary['epsilon']}"
        _table(console, title, ["token", "count", "mean weight", "mean excess loss"], lines, first="left")


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _table(console: Console, title: str, headers: list[str], lines: list[list[str]], first: str = "right") -> None:
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        table.add_column(header, justify="left" if index == 0 and first == "left" else "right", overflow="ellipsis")
        table.columns[-1].no_wrap, table.columns[-1].max_width = index == 0, 24
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console.print("", Text(title, style="bold"), table, sep="\n")
