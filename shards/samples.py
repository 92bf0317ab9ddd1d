"""Tokens drawn from a reference's distribution at each place: how they are drawn, and what an entry can be.

N = places that have an entry, S = draws of an entry, V = vocabulary. The draws are systematic: with u uniform in 0..1, the i-th
is the token at (i + u) / S of the distribution's cumulative sum, ids in ascending order. A token of probability p is drawn S p
times in expectation, and never off by a whole time: fewer surprises than independent draws, and as unbiased.
"""

import numpy as np


def draw(probabilities_NV: np.ndarray, uniform_N: np.ndarray, draws: int) -> np.ndarray:
    """Ids, int32 [N, S], ascending. probabilities_NV: sums of about 1."""
    cumulative_NV = np.cumsum(probabilities_NV, axis=1, dtype=np.float64)
    points_NS = (np.arange(draws) + uniform_N[:, None]) / draws * cumulative_NV[:, -1:]
    found = [np.searchsorted(sums, points, side="right") for sums, points in zip(cumulative_NV, points_NS)]
    return np.minimum(np.array(found).reshape(-1, draws), probabilities_NV.shape[1] - 1).astype(np.int32)


def fault_of_samples(sample_ids_NS: np.ndarray, vocab_size: int) -> str | None:
    """Why these cannot be draws from a distribution over `vocab_size` tokens; None if they can."""
    if sample_ids_NS.min(initial=0) < 0 or sample_ids_NS.max(initial=0) >= vocab_size:
        return f"an id is not in 0..{vocab_size - 1}"
    if (sample_ids_NS[:, 1:] < sample_ids_NS[:, :-1]).any():
        return "ids do not ascend in an entry"
    return None


def excess(sample_ids_NS: np.ndarray, ids_N: np.ndarray, probabilities_N: np.ndarray) -> np.ndarray:
    """By how much the share of the draws that are ids_N is further from their probability than draws can be (1 / S), [N]."""
    share_N = (sample_ids_NS == ids_N[:, None]).mean(axis=1)
    return np.maximum(0.0, np.abs(share_N - probabilities_N) - 1 / sample_ids_NS.shape[1])
