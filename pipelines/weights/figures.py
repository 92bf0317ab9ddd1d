"""remit weights: what ReMiT would do to a corpus, from two stored columns, without a model.

In: a folder with the log-probs of a reference and of the base. Out: per epsilon how many tokens are clipped and what
the weights are, the tokens of the vocabulary that gain and lose most, quantiles of the excess loss; as one JSON object,
which pipelines/weights/tables.py prints. N = predicted tokens of a row. Losses in nats.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from pipelines.choose_rows import choose_rows
from pipelines.token_ranking import TokenRanking
from pipelines.token_text import token_strings
from pipelines.weights.settings import WeightsConfig
from shards.folder import ShardFolder
from shards.rows import Rows
from shards.schema import logprobs_column
from trainer.mixed_shards import MixedShards
from trainer.objectives.objective import Tokens
from trainer.objectives.remit import make
from trainer.objectives.settings import ObjectiveSettings
from trainer.statistics import Sources, StepStatistics

QUANTILE_STEP = 1 / 64
"""Nats, of the histogram in trainer/statistics.py."""
RANKED_AT_ONCE = 256
"""Rows: an addition to the ranking takes as long as the vocabulary is large."""


def weights_of_corpus(
    mixed: MixedShards, config: WeightsConfig, progress: Callable[[int, int], None]
) -> dict[str, Any]:  # fmt: skip
    """The figures, as --json writes them. progress(rows, tokens) is told how far it is after each row.

    Weights are those of a first training step with this base: the same function, row by row, in float32.
    """
    for name in (config.reference, config.base):
        mixed.require_alike(name if all(name in folder.manifest.references for folder in mixed.folders) else None)
    contexts = [_context(folder, config) for folder in mixed.folders]
    objectives = {
        epsilon: make(ObjectiveSettings(epsilon=epsilon, centring=config.centring, weight_map=config.weight_map))
        for epsilon in (*config.epsilon_values, config.show_epsilon)
    }
    group = range(len(mixed.folders))
    statistics = {epsilon: StepStatistics(group=group) for epsilon in objectives}
    manifest = mixed.first.manifest
    ranking = TokenRanking(max(folder.manifest.tokenizer["vocab_size"] for folder in mixed.folders))
    to_rank: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    chosen = choose_rows_of(mixed, config)
    total = sum(map(len, chosen))
    done = used = tokens = 0
    for source, row in rows_of(mixed, chosen, [logprobs_column(name) for name in (config.reference, config.base)]):
        done += 1
        if row.scored(config.reference, config.base)[0]:
            used, tokens = used + 1, tokens + len(row.ids)
            ids_N, seen = _seen(row, contexts[source], config)
            if len(ids_N):  # else nothing precedes any of its tokens
                for epsilon, objective in objectives.items():
                    assert objective.weigh is not None
                    weighted = objective.weigh(seen)
                    statistics[epsilon].add_weights(source, seen.losses_N, weighted)
                    if epsilon == config.show_epsilon:
                        assert weighted.delta_N is not None
                        to_rank.append((ids_N, weighted.weights_N.numpy(), weighted.delta_N.numpy()))
        if to_rank and (len(to_rank) == RANKED_AT_ONCE or done == total):
            ranking.add(*map(np.concatenate, zip(*to_rank)))
            to_rank.clear()
        progress(done, tokens)
    if not ranking.count_V.any():
        where = ", ".join(str(folder.path) for folder in mixed.folders)
        raise ValueError(
            f"{where}: none of the {done:,} rows that were read has a token with log-probs of both; raise --rows"
        )
    steps = [manifest.references[name].get("logprob_step", 0) for name in (config.reference, config.base)]
    sources = Sources.of_mixture({name: folder.manifest.corpus for name, folder in zip(mixed.names, mixed.folders)})
    metrics = {epsilon: statistics[epsilon].metrics(sources) for epsilon in objectives}
    some = metrics[config.show_epsilon]
    figures = {
        "sample": {
            "rows": done,
            "rows_total": sum(folder.manifest.rows for folder in mixed.folders),
            "rows_quarantined": done - used,
            "tokens": tokens,
            "tokens_total": sum(folder.manifest.tokens for folder in mixed.folders),
            "predicted_tokens": some["predicted_tokens"],
            "seed": config.seed,
        },
        "reference": config.reference,
        "base": config.base,
        "base_logprob_step": steps[1],
        "context": contexts[0],
        "centring": config.centring,
        "weight_map": config.weight_map,
        "manifest_sha256": manifest.checksum,
        "epsilons": {str(epsilon): _figures(metrics[epsilon]) for epsilon in config.epsilon_values},
        "excess_loss": {
            "mean": some["delta_mean"],
            "quantiles": some["delta_quantiles"],
            "step": max(*steps, QUANTILE_STEP),  # the quantiles are no finer
        },
        "vocabulary": _vocabulary(mixed.first, config, ranking),
    }
    if mixed.mixture.is_mixed:
        figures["manifest_sha256"] = {name: of.manifest.checksum for name, of in zip(mixed.names, mixed.folders)}
        figures["sources"] = {
            name: {"predicted_tokens": own["predicted_tokens"], "excess_loss_mean": own["delta_mean"], **_figures(own)}
            for name, own in some["sources"].items()
        }
    return figures


def choose_rows_of(mixed: MixedShards, config: WeightsConfig) -> list[list[int]]:
    """The rows to read of each folder: of a mixture by its first shares, as many as the smallest source has enough for."""
    if not mixed.mixture.is_mixed:
        return [choose_rows(mixed.first.manifest, config.rows, config.seed).tolist()]
    if not config.rows:
        raise ValueError("--rows is 0, which reads all; a mixture is sampled by its weights, expected a number of rows")
    shares = mixed.shares(mixed.mixture.stages[0].weights.values())
    there = [folder.manifest.rows for folder in mixed.folders]
    total = min(config.rows, *(int(rows / share) for rows, share in zip(there, shares) if share))
    wanted = [min(rows, round(total * share)) for rows, share in zip(there, shares)]
    return [
        choose_rows(folder.manifest, count, config.seed).tolist() if count else []
        for folder, count in zip(mixed.folders, wanted)
    ]


def rows_of(mixed: MixedShards, chosen: list[list[int]], columns: list[str]) -> Iterator[tuple[int, Rows]]:
    """These rows of each folder, each with the number of its folder."""
    for source, (folder, rows) in enumerate(zip(mixed.folders, chosen)):
        for row in folder.rows(rows, columns):
            yield source, row


def _context(folder: ShardFolder, config: WeightsConfig) -> str:
    """That of both columns; ValueError where they cannot be compared."""
    references = folder.manifest.references
    if config.base not in references:  # the folder's own message would name --reference
        raise ValueError(
            f"{folder.path}: has no log-probs of a base named {config.base!r} (it has: {', '.join(references) or 'none'}); add "
            f"them with remit score --model BASE --name {config.base}, or choose another --base"
        )
    return folder.require_one_context(config.reference, config.base)


def _seen(row: Rows, context: str, config: WeightsConfig) -> tuple[np.ndarray, Tokens]:
    """Ids of the predicted tokens of a row, int64 [N], and what the objective sees of them."""
    predicted = row.trained(context)
    document_N = torch.from_numpy(np.repeat(np.arange(len(row.doc_lengths)), row.doc_lengths)[predicted])
    losses_N = torch.from_numpy(-row.logprobs(config.base)[predicted])
    stored = {"logprobs": torch.from_numpy(row.logprobs(config.reference)[predicted])}
    seen = Tokens(losses_N, torch.zeros_like(document_N), document_N, stored)
    return row.ids[predicted].astype(np.int64), seen


def _figures(metrics: dict[str, Any]) -> dict[str, float | None]:
    """A line of the table from the figures of a training step; None where a weight went beyond float32."""
    low, high, mean = metrics["clipped_low"], metrics["clipped_high"], metrics["weight_mean"]
    weights = (metrics["effective_tokens"] / metrics["predicted_tokens"], mean, metrics["weight_std"])
    names = ("effective_share", "weight_mean", "weight_std")
    return {"clipped_low": low, "clipped_high": high, "in_between": max(0.0, 1 - low - high)} | {
        name: value if math.isfinite(mean) else None for name, value in zip(names, weights)
    }


def _vocabulary(folder: ShardFolder, config: WeightsConfig, ranking: TokenRanking) -> dict[str, Any]:
    """The tokens with the largest and the smallest mean weight among those that occur often enough."""
    most = ranking.most(config.top, config.min_count)
    for direction in ("up", "down"):
        strings = token_strings(folder, [entry["id"] for entry in most[direction]])
        most[direction] = [
            {"id": entry["id"], "token": string} | entry for entry, string in zip(most[direction], strings)
        ]
    return {"epsilon": str(config.show_epsilon), "min_count": config.min_count, **most}
