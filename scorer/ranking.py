"""Which rows remit select keeps: their scores, the ranking over the whole corpus, and the plan of what is written.

In: the stored log-probs of two references. Out: the numbers of the rows to keep, in corpus order, and a manifest.
N = rows of the input, K = rows kept.
"""

from dataclasses import replace
from typing import Any

import numpy as np

from shards.folder import ShardFolder
from shards.keep_ratio import keep_count
from shards.manifest import Manifest, PartPlan, part_name
from shards.part import REMEDY
from shards.schema import logprobs_column


class CorpusRows:
    """Where the corpus files of a folder begin and end, and how long its rows must be.

    ends: row after the last one of each file, int64 [files]; short: rows with fewer than seq_len tokens, which only
    the last row of a file can be; lacking: how many each of them lacks.
    """

    def __init__(self, manifest: Manifest) -> None:
        rows = np.array([file.rows for file in manifest.corpus])
        lacking = rows * manifest.seq_len - np.array([file.tokens for file in manifest.corpus])
        self.seq_len, self.ends = manifest.seq_len, np.cumsum(rows)
        self.short, self.lacking = self.ends[lacking > 0] - 1, lacking[lacking > 0]

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """Corpus file of each row."""
        return np.searchsorted(self.ends, rows, side="right")

    def lengths(self, first: int, end: int) -> np.ndarray:
        """Tokens of the rows first .. end - 1."""
        lengths = np.full(end - first, self.seq_len)
        here = slice(*np.searchsorted(self.short, [first, end]))
        lengths[self.short[here] - first] -= self.lacking[here]
        return lengths


def part_scores(shards: ShardFolder, corpus: CorpusRows, teacher: str, small: str, part: int) -> np.ndarray:
    """Score of each row of a part, float64 [rows]: mean over its predicted tokens of log p_teacher - log p_small.

    NaN where a row has no score: it has nothing to predict, or one of the two references quarantined it. The mean is
    taken of the differences, whose sum is exact for rounded log-probs, so rows that tie in truth tie here. ValueError
    for a part that is damaged, or whose rows are not those of the manifest, or not scored alike by both.
    """
    plan = shards.manifest.parts[part]
    context = shards.manifest.references[teacher]["context"]
    scores = np.full(plan.rows, np.nan)
    for rows in shards.batches([logprobs_column(teacher), logprobs_column(small)], [plan.name]):
        first, end = rows.numbers[0], rows.numbers[-1] + 1
        if not (
            np.array_equal(rows.source, corpus.source_of(rows.numbers))
            and np.array_equal(rows.lengths, corpus.lengths(first, end))
        ):
            raise ValueError(f"{rows.where()} and those after it are not the rows that the manifest plans; {REMEDY}")
        predicted = rows.trained(context)
        difference = rows.logprobs(teacher).astype(np.float64) - rows.logprobs(small)
        difference[~predicted] = 0
        starts = rows.ends - rows.lengths
        counts = np.add.reduceat(predicted.astype(np.int64), starts)
        scored = (counts > 0) & rows.scored(teacher, small)
        of_part = rows.first_row + np.flatnonzero(scored)
        scores[of_part] = np.add.reduceat(difference, starts)[scored] / counts[scored]
    return scores


def best_rows(scores: np.ndarray, ratio: float) -> tuple[np.ndarray, float]:
    """Rows with the highest scores, int64 [K] in corpus order, and the lowest score among them.

    scores: float64 [N], NaN for rows that cannot be kept; K is keep_count of the others. Among rows that tie with the
    lowest score the earlier ones are kept. ValueError where no row has a score.
    """
    values = scores[~np.isnan(scores)]
    if not len(values):
        raise ValueError(f"none of {len(scores):,} rows has a score, so there is nothing to choose from")
    count = keep_count(len(values), ratio)
    values.partition(len(values) - count)
    lowest = values[len(values) - count]
    kept = scores > lowest  # False for NaN
    ties = np.flatnonzero(scores == lowest)
    kept[ties[: count - np.count_nonzero(kept)]] = True
    return np.flatnonzero(kept), float(lowest) + 0.0  # -0.0 would be another text than 0.0


def plan_selection(manifest: Manifest, places: np.ndarray, selection: dict[str, Any]) -> Manifest:
    """The manifest of a folder that holds the rows `places`, int64 [K] ascending, of a folder with `manifest`."""
    size, before = manifest.rows_per_part, CorpusRows(manifest)
    position = np.searchsorted(places, before.short)  # of each short row among the kept ones, if it is one of them
    stays = places[np.minimum(position, len(places) - 1)] == before.short
    position, short, lacking = position[stays], before.short[stays], before.lacking[stays]

    rows_of_file = np.diff(np.searchsorted(places, before.ends), prepend=0)
    tokens_of_file = rows_of_file * manifest.seq_len
    np.subtract.at(tokens_of_file, before.source_of(short), lacking)
    corpus = tuple(
        # which of the tokens were put in front of pieces, or are unknown, was counted for the whole file
        replace(file, rows=int(rows), tokens=int(tokens), bos_tokens=None, unknown_tokens=None)
        for file, rows, tokens in zip(manifest.corpus, rows_of_file, tokens_of_file)
    )

    starts = np.arange(0, len(places), size)
    rows_of_part = np.minimum(size, len(places) - starts)
    tokens_of_part = rows_of_part * manifest.seq_len
    np.subtract.at(tokens_of_part, position // size, lacking)
    parts = tuple(
        PartPlan(part_name(index), int(rows), int(tokens))
        for index, (rows, tokens) in enumerate(zip(rows_of_part, tokens_of_part))
    )
    return replace(manifest, corpus=corpus, parts=parts, selections=(*manifest.selections, selection))


def describe(selection: dict[str, Any]) -> str:
    """What was kept, in words, of an entry of a manifest's selections."""
    unscored = selection["rows_unscored"]
    line = f"{selection['rows_kept']:,} of {selection['rows_read'] - unscored:,} rows"
    line += f" (lowest score kept {selection['lowest_score_kept']:.4f})"
    return line + (f", {unscored:,} without a score left out" if unscored else "")
