"""Which positions a step reasons about: tiers of difficulty, their distribution over the steps, and the draw.

A tier is a range of the stored entropy. Tier 0 is below the first threshold, tier k at or above the k-th. All here is a
function of the settings, the seed and the step alone, so every process draws the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RISES_FROM, RISES_TO = 0.3, 0.7  # shares of the steps between which the distribution changes (RMT)
POLICY, FORMAT, HELD_OUT = 0, 1, 2  # streams of random numbers: what is drawn for one says nothing about the others


@dataclass(frozen=True)
class Draw:
    """One position: the `ordinal`-th of its tier, in the order of the corpus."""

    tier: int
    ordinal: int


def tier_of(entropies: np.ndarray, thresholds: Sequence[float]) -> np.ndarray:
    """Tier of each position, int64 as `entropies`: how many of the ascending `thresholds` its entropy reaches."""
    return np.searchsorted(np.asarray(thresholds, dtype=np.float64), entropies, side="right")


def distribution_at(step: int, num_steps: int, first: Sequence[float], last: Sequence[float]) -> np.ndarray:
    """Probability of each tier in step 1..num_steps, float64: `first` until 30 % of the steps, from there a line to
    `last`, which it has from 70 % on."""
    share = (step / num_steps - RISES_FROM) / (RISES_TO - RISES_FROM)
    mixed = min(1.0, max(0.0, share))
    return (1 - mixed) * np.asarray(first, dtype=np.float64) + mixed * np.asarray(last, dtype=np.float64)


def draw(
    seed: int, step: int, distribution: np.ndarray, counts: Sequence[int], size: int, stream: int = POLICY
) -> list[Draw]:
    """`size` different positions: a tier by `distribution`, then a position of it, all of them equally probable.

    counts: positions of each tier, at least `size` where it can be drawn at all: see require_enough.
    """
    random = np.random.default_rng([seed, step, stream])
    tiers = random.choice(len(distribution), size=size, p=distribution / distribution.sum())
    drawn: dict[Draw, None] = {}  # in the order of the draw
    for tier in tiers.tolist():
        while True:  # the same position again: another one of the same tier, so that the tiers keep their shares
            position = Draw(tier, int(random.integers(counts[tier])))
            if position not in drawn:
                break
        drawn[position] = None
    return list(drawn)


def require_enough(
    counts: Sequence[int], distributions: Sequence[np.ndarray], size: int, names: Sequence[str], where: str
) -> None:
    """ValueError where a tier that can be drawn has fewer than `size` positions, as many as a step may ask it for."""
    for tier, count in enumerate(counts):
        if any(distribution[tier] > 0 for distribution in distributions) and count < size:
            found = ", ".join(f"{name} {number:,}" for name, number in zip(names, counts, strict=True))
            raise ValueError(
                f"{where}: has {count:,} positions of the tier {names[tier]!r} ({found}), expected at least {size:,}, "
                "as many as a step may ask it for; change --thresholds, take fewer --positions-per-step, or give the tier "
                "probability 0"
            )
