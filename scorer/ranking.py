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
from shards.rows import Rows
from shards.schema import logprobs_column


class CorpusRows:
    """Where the corpus files of a folder begin and end, and how long its rows are.

    ends: row after the last one of each file, int64 [files]. Where documents are laid end to end, only the last row of a
    file can have fewer than seq_len tokens, so the manifest tells the lengths; else they are those that `part_scores` saw.
    """

    def __init__(self, manifest: Manifest) -> None:
        rows = np.array([file.rows for file in manifest.corpus])
        lacking = rows * manifest.seq_len - np.array([file.tokens for file in manifest.corpus])
        self.ends, self.seq_len = np.cumsum(rows), manifest.seq_len
        self._short, self._lacking = self.ends[lacking > 0] - 1, lacking[lacking > 0]
        self._seen_N = np.zeros(int(rows.sum()), dtype=np.int64) if manifest.packing else None

    def source_of(self, rows: np.ndarray) -> np.ndarray:
        """Corpus file of each row."""
        return np.searchsorted(self.ends, rows, side="right")

    def lengths(self, rows: np.ndarray) -> np.ndarray:
        """Tokens of each of the rows, int64 ascending."""
        if self._seen_N is not None:
            return self._seen_N[rows]
        lengths = np.full(len(rows), self.seq_len)
        position = np.minimum(np.searchsorted(rows, self._short), max(0, len(rows) - 1))
        here = rows[position] == self._short if len(rows) else np.zeros(0, dtype=bool)
        lengths[position[here]] -= self._lacking[here]
        return lengths

    def agree(self, rows: Rows) -> bool:
        """Whether rows that were read are of the corpus files and the lengths that they must have, as far as that is known."""
        if not np.array_equal(rows.source, self.source_of(rows.numbers)):
            return False
        if self._seen_N is not None:
            self._seen_N[rows.numbers] = rows.lengths
        return np.array_equal(rows.lengths, self.lengths(rows.numbers))


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
        if not corpus.agree(rows):
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


def plan_selection(manifest: Manifest, before: CorpusRows, places: np.ndarray, selection: dict[str, Any]) -> Manifest:
    """The manifest of a folder that holds the rows `places`, int64 [K] ascending, of a folder with `manifest`."""
    size, lengths = manifest.rows_per_part, before.lengths(places)
    source = before.source_of(places)
    rows_of_file = np.bincount(source, minlength=len(manifest.corpus))
    tokens_of_file = np.zeros(len(manifest.corpus), dtype=np.int64)
    np.add.at(tokens_of_file, source, lengths)
    corpus = tuple(
        # which of the tokens were put in front of pieces, are unknown or to be predicted was counted for the whole file
        replace(file, rows=int(rows), tokens=int(tokens), bos_tokens=None, unknown_tokens=None, predicted_tokens=None)
        for file, rows, tokens in zip(manifest.corpus, rows_of_file, tokens_of_file)
    )
    parts = tuple(
        PartPlan(part_name(index), len(lengths[first : first + size]), int(lengths[first : first + size].sum()))
        for index, first in enumerate(range(0, len(places), size))
    )
    return replace(manifest, corpus=corpus, parts=parts, selections=(*manifest.selections, selection))


def describe(selection: dict[str, Any]) -> str:
    """What was kept, in words, of an entry of a manifest's selections."""
    unscored = selection["rows_unscored"]
    line = f"{selection['rows_kept']:,} of {selection['rows_read'] - unscored:,} rows"
    line += f" (lowest score kept {selection['lowest_score_kept']:.4f})"
    return line + (f", {unscored:,} without a score left out" if unscored else "")
