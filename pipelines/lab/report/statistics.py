"""Means over seeds with 95 % intervals from Student's t distribution. Pure functions of numbers.

The interval is for the mean over seeds, each seed one observation; of paired values it is that of their differences.
It supposes differences that are about normal, which a handful of seeds cannot show.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """mean: over `num_seeds`. low, high: ends of the interval, None with one seed, or where all values are equal (which
    says that they were measured too coarsely, or are copies, not that they are certain)."""

    mean: float
    low: float | None
    high: float | None
    num_seeds: int

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def within(t: float, freedom: int) -> float:
    """Probability that |T| <= t under Student's t with `freedom` (1, 2, ...) degrees of freedom.

    The finite sums for whole degrees of freedom, Abramowitz and Stegun 26.7.3 and 26.7.4.
    """
    if freedom < 1:
        raise ValueError(f"{freedom} degrees of freedom, expected at least 1")
    angle = math.atan(abs(t) / math.sqrt(freedom))
    cosine, sine = math.cos(angle), math.sin(angle)
    odd = freedom % 2 == 1
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for power in range(1 if odd else 0, freedom - 1, 2):
        total += term
        term *= cosine**2 * (power + 1) / (power + 2)
    return 2 / math.pi * (angle + sine * total) if odd else sine * total


def quantile(share: float, freedom: int) -> float:
    """The t for which `within(t, freedom)` is `share`, by bisection."""
    low, high = 0.0, 1.0
    while within(high, freedom) < share:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if within(middle, freedom) < share else (low, middle)
    return (low + high) / 2


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval; ValueError for no values, or values that are no numbers."""
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values {list(values)!r}, expected finite numbers, at least one")
    mean = fmean(values)
    if len(values) == 1 or math.isclose(min(values), max(values), rel_tol=1e-12, abs_tol=1e-15):
        return Estimate(mean, None, None, len(values))
    half = quantile(CONFIDENCE, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Estimate(mean, mean - half, mean + half, len(values))


def probability(values: Sequence[float], null: float = 0.0) -> float | None:
    """Two-sided p of a t-test that the mean is `null`; None where `estimate` gives no interval."""
    if estimate(values).low is None:
        return None
    t = (fmean(values) - null) / (stdev(values) / math.sqrt(len(values)))
    return 1 - within(t, len(values) - 1)


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours minus theirs, by seed, of the seeds that have both."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def holm(probabilities: Sequence[float | None], level: float = 1 - CONFIDENCE) -> list[bool]:
    """Which of the tests still reject when all of them together may be wrong once with probability `level`.

    The step-down procedure of Holm; None never rejects and does not count.
    """
    ranked = sorted((p, index) for index, p in enumerate(probabilities) if p is not None)
    rejects = [False] * len(probabilities)
    for place, (p, index) in enumerate(ranked):
        if p > level / (len(ranked) - place):
            break
        rejects[index] = True
    return rejects
