"""Where the most probable tokens are kept: only where the reference's entropy is at most a threshold.

The threshold is given in nats, or as a quantile of the corpus. A quantile is estimated before anything is planned: an engine
scores rows from all over the folder, and what it finds is frozen in the manifest. A step's own quantile moves around that of
the corpus, so a margin is added to the share.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from scorer.config import ScoreConfig
from scorer.rowcheck import round_nats
from shards.folder import ShardFolder

SAMPLE_SHARE, LEAST_TOKENS, MOST_TOKENS, MOST_PARTS = 1 / 20, 1 << 14, 1 << 18, 16


@dataclass(frozen=True)
class Sample:
    """Rows from all over a folder. prompts: int [tokens]; row_of: of each prompt its place among the sampled rows."""

    prompts: list[np.ndarray]
    row_of: list[int]


def sample_rows(shards: ShardFolder, context: str, num_embeddings: int) -> Sample:
    """At most MOST_PARTS parts, evenly spaced, of each the same number of rows, evenly spaced: a twentieth of the tokens, but
    LEAST_TOKENS to MOST_TOKENS. Nothing of it is random, so that the same command finds the same threshold."""
    manifest = shards.manifest
    tokens = min(MOST_TOKENS, max(LEAST_TOKENS, int(manifest.tokens * SAMPLE_SHARE)))
    parts = np.unique(np.linspace(0, len(manifest.parts) - 1, MOST_PARTS).round().astype(int))
    each = max(1, math.ceil(tokens * manifest.rows / manifest.tokens / len(parts)))
    numbers = [
        int(part) * manifest.rows_per_part + int(row)
        for part in parts
        for row in np.unique(np.linspace(0, manifest.parts[part].rows - 1, each).round().astype(int))
    ]
    prompts, row_of = [], []
    for place, row in enumerate(shards.rows(np.array(numbers), ["input_ids"])):
        for start, end, _ in row.spans(context):
            prompt = row.ids[start:end]
            if prompt.min() >= 0 and prompt.max() < num_embeddings:
                prompts.append(prompt)
                row_of.append(place)
    return Sample(prompts, row_of)


def threshold_of(
    sample: Sample, entropies: list[np.ndarray], quantile: float, margin: float, step: float
) -> dict[str, Any]:
    """What the manifest records: the threshold, and of what it was estimated.

    entropies: float32 [tokens - 1] of each prompt. share_error: standard error of the share of the corpus at or below the
    threshold, with rows as what is independent.
    """
    if not sample.prompts:
        raise ValueError(
            "the sample has no row that the reference can score (ids beyond its embedding, or rows of one token), so no quantile can "
            "be estimated; give a threshold in nats, or see that tokenizer and reference belong together"
        )
    values = [round_nats(np.maximum(one, np.float32(0)), step).astype(np.float64) for one in entropies]
    all_ = np.concatenate(values)
    if not np.isfinite(all_).all():
        bad = int((~np.isfinite(all_)).sum())
        raise ValueError(
            f"{bad:,} of the sample's {len(all_):,} entropies are not finite, so no quantile can be estimated; leave such rows out, or "
            "give a threshold in nats"
        )
    rank = min(len(all_) - 1, math.ceil((quantile + margin) * len(all_)))
    threshold = float(np.partition(all_, rank)[rank])
    below, total = np.zeros(max(sample.row_of) + 1), np.zeros(max(sample.row_of) + 1)
    for row, own in zip(sample.row_of, values):
        below[row] += (own <= threshold).sum()
        total[row] += len(own)
    share = below.sum() / total.sum()
    error = float(np.sqrt(np.square(below - share * total).sum()) / total.sum())
    return {
        "top_k_below_entropy": threshold,
        "top_k_quantile": {
            "quantile": quantile, "margin": margin, "rows": int((total > 0).sum()), "tokens": len(all_),
            "share": round(float(share), 6), "share_error": round(error, 6),
        },
    }  # fmt: skip


def kept_entry(config: ScoreConfig, recorded: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of the reference's provenance that --top-k-below-entropy decides; recorded: what the folder has, if any.

    Without "top_k_below_entropy" where a quantile is asked for that is not estimated yet.
    """
    below = config.below_entropy
    if below is None:
        return {}
    if below.quantile is None:
        return {"top_k_below_entropy": below.threshold}
    asked = {"quantile": below.quantile, "margin": below.margin}
    frozen = recorded.get("top_k_quantile") or {}
    if {name: frozen.get(name) for name in asked} == asked:
        return {name: recorded[name] for name in ("top_k_below_entropy", "top_k_quantile")}
    return {"top_k_quantile": asked}
