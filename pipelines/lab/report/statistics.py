"""Means over seeds with 95 % intervals from Student's t distribution. Pure functions of numbers.

The interval is for the mean over seeds, each seed one observation; of paired values it is that of their differences.
It supposes differences that are about normal, which a handful of seeds cannot show.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
from scipy import optimize, stats

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


def estimate(values: Sequence[float]) -> Estimate:
    """Mean and interval; ValueError for no values, or values that are no numbers."""
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values {list(values)!r}, expected finite numbers, at least one")
    mean = fmean(values)
    if len(values) == 1 or math.isclose(min(values), max(values), rel_tol=1e-12, abs_tol=1e-15):
        return Estimate(mean, None, None, len(values))
    low, high = stats.t.interval(CONFIDENCE, len(values) - 1, loc=mean, scale=stdev(values) / math.sqrt(len(values)))
    return Estimate(mean, float(low), float(high), len(values))


def probability(values: Sequence[float], null: float = 0.0) -> float | None:
    """Two-sided p of a t-test that the mean is `null`; None where `estimate` gives no interval."""
    if estimate(values).low is None:
        return None
    return float(stats.ttest_1samp(values, null).pvalue)


def power(difference: float, spread: float, num: int) -> float:
    """Probability that the interval over `num` seeds excludes zero, if the true mean is `difference` and single seeds spread
    around it with a standard deviation of `spread`. To about 1e-4: an average over the estimate of that deviation, each of
    4,096 equally probable ones, since scipy's noncentral t distribution has no values for few seeds."""
    chances = (np.arange(4096) + 0.5) / 4096
    limits = stats.t.ppf(0.5 + CONFIDENCE / 2, num - 1) * np.sqrt(stats.chi2.ppf(chances, num - 1) / (num - 1))
    centre = difference * math.sqrt(num) / spread
    return float(np.mean(stats.norm.sf(limits - centre) + stats.norm.cdf(-limits - centre)))


def detectable(spread: float, num: int, probability: float = 0.8) -> float:
    """The difference whose `power` is `probability`."""
    upper = 1.0
    while power(upper, 1.0, num) < probability:
        upper *= 2
    return spread * float(optimize.brentq(lambda unit: power(unit, 1.0, num) - probability, 0.0, upper))


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
