"""What the most probable tokens of two models at one place say of the KL divergence between them: at least so much.

Each model stores its own most probable tokens, so the probability of a token is known to both only where both have it.
The vocabulary falls into these tokens, the row's own, and all others together. The divergence between the probabilities
of such classes is never above that of the tokens (the log sum inequality), and comes near it as more is known.
N = places, K, L = most probable tokens of the one and the other, P = places that are handled at once. Nats.
"""

from collections.abc import Iterator

import numpy as np

COMPARISONS_AT_ONCE = 1 << 22  # of ids: P times K times L


def divergences(
    own_N: np.ndarray,
    logprobs_N: np.ndarray,
    others_N: np.ndarray,
    top: tuple[np.ndarray, np.ndarray],
    other_top: tuple[np.ndarray, np.ndarray],
    least: float,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For P places each: KL(one || other) and KL(other || one), at least, and the probability that is known, float64 [P].

    own_N: the row's tokens; logprobs_N, others_N: their log-probs under the two. top, other_top: ids [N, K] and log-probs.
    least: probabilities below it are within the error of the log-probs; the rest of the vocabulary has no less.
    known: to both, of the first model's probability.
    """
    size = max(1, COMPARISONS_AT_ONCE // (top[0].shape[1] * other_top[0].shape[1]))
    for first in range(0, len(own_N), size):
        at = slice(first, first + size)
        ids_PK, p_PK = top[0][at], np.exp(top[1][at].astype(np.float64))
        other_ids_PL, q_PL = other_top[0][at], np.exp(other_top[1][at].astype(np.float64))
        same_PKL = ids_PK[:, :, None] == other_ids_PL[:, None, :]
        both_PK = same_PKL.any(axis=2)
        p_PK = np.where(both_PK, p_PK, 0.0)
        q_PK = np.einsum("pkl,pl->pk", same_PKL, q_PL)
        # the row's own token is known to both, whether or not it is among the most probable
        apart_P = ~(both_PK & (ids_PK == own_N[at, None])).any(axis=1)
        p_P = np.where(apart_P, np.exp(logprobs_N[at].astype(np.float64)), 0.0)
        q_P = np.where(apart_P, np.exp(others_N[at].astype(np.float64)), 0.0)
        p_PC, q_PC = np.column_stack([p_PK, p_P]), np.column_stack([q_PK, q_P])
        known_P = p_PC.sum(axis=1)
        rest_P = np.maximum(1 - known_P, least), np.maximum(1 - q_PC.sum(axis=1), least)
        p_PC, q_PC = np.column_stack([p_PC, rest_P[0]]), np.column_stack([q_PC, rest_P[1]])
        yield _divergence(p_PC, q_PC), _divergence(q_PC, p_PC), np.minimum(known_P, 1.0)


def _divergence(p_PC: np.ndarray, q_PC: np.ndarray) -> np.ndarray:
    """Sum over the classes C of p log(p / q) - p + q, which is the KL divergence where both sum to 1, and never below 0
    where rounding has them sum to something near it."""
    there = p_PC > 0
    ratio_PC = np.ones_like(p_PC)
    np.divide(p_PC, q_PC, out=ratio_PC, where=there)
    return (p_PC * np.log(ratio_PC) - p_PC + q_PC).sum(axis=1)
