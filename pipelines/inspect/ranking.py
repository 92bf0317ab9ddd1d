"""The tokens that ReMiT weights most and least, for the page of remit inspect.

In: the folder where it has the base's log-probs of all rows, else the rows shown. Out: two short tables.
"""

from typing import Any

import numpy as np

from pipelines.choose_rows import choose_rows
from pipelines.inspect.token_deltas import Base, TokenFigures, token_figures
from pipelines.token_ranking import TokenRanking
from pipelines.token_text import TokenText, token_label
from shards.folder import ShardFolder
from shards.schema import logprobs_column

SAMPLE_ROWS = 2_000  # that the tokens of the folder are ranked over
TOP = 15


def ranking_for_page(
    folder: ShardFolder,
    text: TokenText,
    reference: str,
    base: Base,
    epsilon: float,
    shown: list[tuple[np.ndarray, TokenFigures]],
) -> dict[str, Any] | None:
    """up, down: entries for the template; what they are means over; least: occurrences. None where there are no weights.

    shown: ids, int [T], and figures of the rows on the page.
    """
    if base.name is None:
        return None
    manifest = folder.manifest
    ranking = TokenRanking(manifest.tokenizer["vocab_size"])
    if base.column is None or folder.missing_parts():
        why = "the folder has no stored log-probs of this base" if base.column is None else "the folder is not complete"
        rows, least, what = iter(shown), 1, f"of the rows on this page, because {why}"
    else:
        chosen = choose_rows(manifest, SAMPLE_ROWS, 0).tolist()
        least = 20 if manifest.tokens / manifest.rows * len(chosen) >= 100_000 else 2
        which = "all rows" if len(chosen) == manifest.rows else f"{len(chosen):,} random rows of {manifest.rows:,}"
        columns = ["input_ids", "doc_lengths", logprobs_column(reference), logprobs_column(base.column)]
        found = folder.rows(chosen, columns)
        rows = ((row.ids, token_figures(row, reference, base, epsilon)) for row in found)
        what = f"of the folder ({which})"
    for ids_T, figures in rows:
        both_T = np.isfinite(figures.weight_T)
        ranking.add(ids_T[both_T], figures.weight_T[both_T], figures.delta_T[both_T])
    most = ranking.most(TOP, least)
    return {"what": what, "least": least} | {name: _entries(text, most[name]) for name in ("up", "down")}


def _entries(text: TokenText, entries: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "token": token_label(string),
            "count": f"{entry['count']:,}",
            "weight": "-" if entry["weight_mean"] is None else f"{entry['weight_mean']:.3f}",
            "delta": f"{entry['excess_loss_mean']:+.3f}",
        }
        for entry, string in zip(entries, text.strings([entry["id"] for entry in entries]))
    ]
