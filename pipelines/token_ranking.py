"""Which tokens of the vocabulary ReMiT weights most and least, on average over the places where they occur.

In: ids, weights and excess losses of predicted tokens, a few rows at a time. Out: the tokens with the largest and the
smallest mean weight. N = predicted tokens, V = ids of the tokenizer, K = some of those. Losses in nats.
"""

import math
from typing import Any

import numpy as np


class TokenRanking:
    """Occurrences of each token of a vocabulary, and sums over them of weights and excess losses."""

    def __init__(self, vocab_size: int) -> None:
        self.count_V = np.zeros(vocab_size)
        self.weight_V = np.zeros(vocab_size)
        self.excess_loss_V = np.zeros(vocab_size)

    def add(self, ids_N: np.ndarray, weights_N: np.ndarray, excess_losses_N: np.ndarray) -> None:
        ids_K, place_N = np.unique(ids_N, return_inverse=True)  # far fewer than V
        for sum_V, values in ((self.count_V, None), (self.weight_V, weights_N), (self.excess_loss_V, excess_losses_N)):
            sum_V[ids_K] += np.bincount(place_N, values)

    def most(self, top: int, min_count: int) -> dict[str, Any]:
        """tokens: how many occur at least min_count times; up, down: `top` of them with the largest, smallest mean weight.

        Each is id, count, weight_mean (None where a weight went beyond float32) and excess_loss_mean.
        """
        often_K = np.flatnonzero(self.count_V >= min_count)
        count_K = self.count_V[often_K]
        weight_K, excess_K = self.weight_V[often_K] / count_K, self.excess_loss_V[often_K] / count_K

        def entries(order: np.ndarray) -> list[dict[str, Any]]:
            return [
                {
                    "id": int(often_K[place]),
                    "count": int(count_K[place]),
                    "weight_mean": float(weight_K[place]) if math.isfinite(weight_K[place]) else None,
                    "excess_loss_mean": float(excess_K[place]),
                }
                for place in order[:top]
            ]

        # clipped weights tie, so the excess loss decides next
        up, down = np.lexsort((often_K, -excess_K, -weight_K)), np.lexsort((often_K, excess_K, weight_K))
        return {"tokens": len(often_K), "up": entries(up), "down": entries(down)}
