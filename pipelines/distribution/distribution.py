"""The distribution of many numbers that arrive in pieces: moments, quantiles and a histogram, in memory that does not grow.

N = numbers of a piece. Nats.
"""

import math
from typing import Any

import numpy as np

STEP = 1 / 64
"""Nats, of the bins: what log-probs are rounded to, so that quantiles of rounded ones are exact."""
LIMIT = 64
"""Nats: what is beyond stands in the last bin on its side. A log-prob of -64 is a probability of 1.6e-28."""
SHARES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
CENTRES = np.arange(-LIMIT * 64, LIMIT * 64 + 1) * STEP
MOST_BARS = 128  # of the histogram that is kept
LEAST_IN_A_BAR = 30  # numbers, on average: fewer make a curve of noise
IN_THE_TAILS = 5e-4  # of the numbers, on each side, that the histogram need not show


class Distribution:
    """Numbers so far: how many, mean, spread, extremes, and how many are nearest to each multiple of STEP."""

    def __init__(self) -> None:
        self.counts = np.zeros(len(CENTRES), dtype=np.int64)
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.above, self.absolute = 0, 0.0
        self.low, self.high = math.inf, -math.inf

    def add(self, values_N: np.ndarray) -> None:
        """Add finite numbers. Means are merged by their differences (Chan et al. 1983), which keeps their digits."""
        if not len(values_N):
            return
        values_N = values_N.astype(np.float64)
        count, mean = len(values_N), float(values_N.mean())
        total, difference = self.count + count, mean - self.mean
        self.squares += float(((values_N - mean) ** 2).sum()) + difference**2 * self.count * count / total
        self.mean += difference * count / total
        self.count = total
        self.above += int((values_N > 0).sum())
        self.absolute += float(np.abs(values_N).sum())
        self.low, self.high = min(self.low, float(values_N.min())), max(self.high, float(values_N.max()))
        places_N = np.rint(np.clip(values_N, -LIMIT, LIMIT) / STEP).astype(np.int64) + LIMIT * 64
        self.counts += np.bincount(places_N, minlength=len(self.counts))

    def quantile(self, share: float) -> float:
        """The smallest multiple of STEP at or below which this share of the numbers lies; of one that has all, the number."""
        place = int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(share * self.count - 1e-9))))
        return float(np.clip(CENTRES[place], self.low, self.high))

    def figures(self) -> dict[str, Any]:
        """As JSON: what the tables and the plots show."""
        return {
            "count": self.count,
            "mean": self.mean,
            "std": math.sqrt(self.squares / self.count),
            "mean_absolute": self.absolute / self.count,
            "share_above_0": self.above / self.count,
            "min": self.low,
            "max": self.high,
            "quantiles": {str(share): self.quantile(share) for share in SHARES},
            "histogram": self.histogram(),
        }

    def histogram(self) -> dict[str, Any]:
        """Shares of the numbers in bins of `width` nats, that begin at `left` and each next to the other.

        Of as many bins as show all but the tails; those are in `below` and `above`.
        """
        first, last = (self._place(share) for share in (IN_THE_TAILS, 1 - IN_THE_TAILS))
        num_bars = min(MOST_BARS, max(8, self.count // LEAST_IN_A_BAR))
        size = 2 ** max(0, math.ceil(math.log2((last - first + 1) / num_bars)))
        first -= first % size  # 0 is where a bin begins, whatever the numbers are
        num_bins = (last - first) // size + 1
        inside = self.counts[first : first + num_bins * size]
        inside = np.pad(inside, (0, num_bins * size - len(inside)))
        shares = inside.reshape(num_bins, size).sum(axis=1) / self.count
        return {
            "left": float(CENTRES[first] - STEP / 2),
            "width": size * STEP,
            "shares": shares.tolist(),
            "below": float(self.counts[:first].sum() / self.count),
            "above": float(self.counts[first + num_bins * size :].sum() / self.count),
        }

    def _place(self, share: float) -> int:
        return int(np.searchsorted(np.cumsum(self.counts), max(1, math.ceil(share * self.count - 1e-9))))
