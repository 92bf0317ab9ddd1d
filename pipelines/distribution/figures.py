"""remit distribution: how stored log-probs and their differences are distributed over the tokens of a folder.

In: a folder with the log-probs of two or more models in one context. Out: figures of each column, of differences between
columns and of the KL divergence from the reference, as one JSON object; tables.py prints it, page.py draws it. Parts are
verified as they are read, and one record batch is in memory at a time. N = tokens that training predicts and that have
log-probs of all columns. Nats.
"""

import math
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np

from pipelines.choose_rows import choose_rows
from pipelines.distribution.distribution import Distribution
from pipelines.distribution.divergence import divergences
from pipelines.distribution.settings import DistributionConfig
from shards.folder import ShardFolder
from shards.rows import Rows
from shards.schema import logprobs_column, topk_columns

EXACT = 1e-6  # a probability below is within the rounding of float32


def distribution_of_folder(
    folder: ShardFolder, config: DistributionConfig, progress: Callable[[int, int], None]
) -> dict[str, Any]:
    """The figures, as --json writes them. progress(rows, tokens): so far, after each piece."""
    folder.require_complete()
    manifest = folder.manifest
    names = chosen_columns(folder, config)
    context = folder.require_one_context(*names)
    pairs = [(config.reference, name) for name in names[1:]] + [
        (later, before) for before, later in pairwise(names[1:])
    ]
    with_top = [name for name in names if manifest.references[name].get("top_k")]
    compared = [name for name in names[1:] if name in with_top and config.reference in with_top]
    logprobs = {name: Distribution() for name in names}
    differences = {pair: Distribution() for pair in pairs}
    divergence = {name: (Distribution(), Distribution(), Distribution()) for name in compared}
    columns = ["input_ids", *map(logprobs_column, names)]
    columns += [column for name in [config.reference, *compared] if compared for column in topk_columns(name)]
    least = {name: _least(manifest.references[name], manifest.references[config.reference]) for name in compared}
    rows_read = rows_used = tokens = 0
    for rows in read(folder, config, columns):
        predicted_T = np.logical_and.reduce([rows.trained(context), *(rows.predicted(name) for name in names)])
        values = {name: rows.logprobs(name)[predicted_T] for name in names}
        for name, values_N in values.items():
            logprobs[name].add(values_N)
        for (one, other), distribution in differences.items():
            distribution.add(values[one].astype(np.float64) - values[other])
        for name, distributions in divergence.items():
            add_divergences(distributions, rows, predicted_T, config.reference, name, least[name])
        rows_read, rows_used = rows_read + len(rows), rows_used + int(rows.scored(*names).sum())
        tokens += int(rows.ends[-1])
        progress(rows_read, tokens)
    if not logprobs[names[0]].count:
        raise ValueError(
            f"{folder.path}: none of the {rows_read:,} rows that were read has a token to predict with log-probs of {', '.join(names)}; "
            "raise --rows, or name fewer --columns"
        )
    return {
        "sample": {
            "rows": rows_read, "rows_total": manifest.rows, "rows_quarantined": rows_read - rows_used, "tokens": tokens,
            "tokens_total": manifest.tokens, "predicted_tokens": logprobs[names[0]].count, "seed": config.seed,
        },
        "reference": config.reference,
        "columns": names,
        "context": context,
        "logprob_steps": {name: manifest.references[name].get("logprob_step", 0) for name in names},
        "manifest_sha256": manifest.checksum,
        "logprobs": {name: own.figures() for name, own in logprobs.items()},
        "differences": [
            {"of": one, "minus": other} | own.figures() for (one, other), own in differences.items()
        ],
        "kl": [_kl(config.reference, name, *own) for name, own in divergence.items() if own[0].count],
        "no_kl": [name for name in names[1:] if name not in divergence or not divergence[name][0].count],
    }  # fmt: skip


def chosen_columns(folder: ShardFolder, config: DistributionConfig) -> list[str]:
    """The reference and the others, in the order asked for; ValueError where one is missing or there is no other."""
    folder.require_reference(config.reference)
    others = [name for name in folder.manifest.references if name != config.reference]
    names = [config.reference, *(others if config.column_names is None else config.column_names)]
    for name in names:
        folder.require_scored(name)
    if len(names) < 2:
        raise ValueError(
            f"{folder.path}: has the log-probs of {config.reference!r} alone, expected those of another model beside them; "
            "add them with remit score --name base, for instance"
        )
    return names


def read(folder: ShardFolder, config: DistributionConfig, columns: list[str]) -> Iterator[Rows]:
    """The rows that --rows and --seed choose: record batches where that is all of them."""
    chosen = choose_rows(folder.manifest, config.rows, config.seed)
    if len(chosen) == folder.manifest.rows:
        return folder.batches(columns)
    return folder.rows(chosen.tolist(), columns)


def add_divergences(
    distributions: tuple[Distribution, Distribution, Distribution], rows: Rows, predicted_T: np.ndarray,
    reference: str, other: str, least: float,
) -> None:  # fmt: skip
    """Add the divergences of those places where both have their most probable tokens."""
    tops = [rows.topk(name) for name in (reference, other)]
    # below an entropy that the scorer was given none are stored
    there_N = np.flatnonzero(predicted_T & (tops[0][0][:, 0] >= 0) & (tops[1][0][:, 0] >= 0))
    top, other_top = ((ids[there_N], logprobs[there_N]) for ids, logprobs in tops)
    own = (rows.ids[there_N], rows.logprobs(reference)[there_N], rows.logprobs(other)[there_N])
    for found in divergences(*own, top, other_top, least):
        for distribution, values_P in zip(distributions, found, strict=True):
            distribution.add(values_P)


def _least(*references: dict[str, Any]) -> float:
    """Probability that is within the error of log-probs that were rounded as these were."""
    return max(EXACT, *(math.expm1(reference.get("logprob_step", 0) / 2) for reference in references))


def _kl(
    reference: str, other: str, forward: Distribution, backward: Distribution, known: Distribution
) -> dict[str, Any]:
    names = {"reference": reference, "other": other, "known_probability": known.mean}
    return names | {"forward": forward.figures(), "backward": backward.figures()}
