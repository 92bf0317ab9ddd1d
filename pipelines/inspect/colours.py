"""Colours of the page of remit inspect: by delta, by weight, or by log-prob of the reference, in steps from none to full.

T = tokens of a row. Nats.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np

STEPS = 20  # of a colour, from none to full
SHARE_IN_SCALE = 0.99  # of |delta| on the page; beyond, a colour is full
LEAST_SCALE = 1 / 64  # nat; log-probs are rounded to such steps, and smaller differences mean nothing
LOW = 8  # nat: a token with probability below exp(-8) has the full colour where there is no base
COLOURS = {"delta": ("down", "up"), "weight": ("down", "up"), "reference": ("low", "low")}  # below and above the middle


def scale(deltas: list[np.ndarray]) -> float:
    """The |delta| from which on a colour is full: above nearly all of the page's, so that each page uses all colours."""
    sizes = np.abs(np.concatenate(deltas))
    sizes = sizes[np.isfinite(sizes)]
    return max(LEAST_SCALE, float(np.quantile(sizes, SHARE_IN_SCALE))) if len(sizes) else LEAST_SCALE


def steps(by: str, values_T: np.ndarray, full: float) -> np.ndarray:
    """int [T], from -STEPS to STEPS: how much of a colour the values get; `full` from the middle on it is full."""
    middle = 1.0 if by == "weight" else 0.0
    shares_T = np.nan_to_num((values_T.astype(np.float64) - middle) / full, posinf=1, neginf=-1)
    return np.rint(STEPS * np.clip(shares_T, -1, 1)).astype(int)


def colour_class(by: str, step: int) -> str:
    return f"{by[0]}{step}" if step else ""


def colour_rules() -> Iterator[str]:
    """The style of each class of a colour: mixed from the paper's and one other."""
    for by, (below, above) in COLOURS.items():
        for step in range(-STEPS, STEPS + 1):
            if step:
                share, colour = 100 * abs(step) / STEPS, above if step > 0 else below
                mix = f"color-mix(in srgb, var(--{colour}) {share:g}%, var(--paper))"
                yield f"[data-by={by}] .{colour_class(by, step)} {{ background-color: {mix}; }}"


def legends(reference: str, base: str | None, full: dict[str, float]) -> list[dict[str, Any]]:
    """A bar of colours with numbers below it, for each of the ways to colour."""
    if base is None:
        ticks = [f"{tick}" for tick in np.linspace(-LOW, 0, 5, dtype=int)]
        ends = (f"improbable to {reference}", "certain", f"full colour from -{LOW} nat on")
        return [_legend("reference", range(-STEPS, 1), [f"{ticks[0]} nat", *ticks[1:]], *ends)]
    delta, weight = full["delta"], full["weight"]
    ticks = [f"{delta * share:+.2g}" if share else "0" for share in (-1, -0.5, 0, 0.5, 1)]
    scale = f"full colour from ±{delta:.2g} nat on, the 99th percentile of |delta| on this page"
    if delta == LEAST_SCALE:
        scale = f"full colour from ±{delta:.2g} nat on, the step that log-probs are rounded to"
    ends = (f"{base} more confident", f"{reference} more confident", scale)
    weight_ticks = [f"{1 + weight * share:.4g}" for share in (-1, -0.5, 0, 0.5, 1)]
    weight_ends = ("weight below 1", "weight above 1", f"full colour from 1 ± {weight:g} on")
    both = range(-STEPS, STEPS + 1)
    return [
        _legend("delta", both, [*ticks[:-1], f"{ticks[-1]} nat"], *ends),
        _legend("weight", both, weight_ticks, *weight_ends),
    ]


def _legend(by: str, steps: range, ticks: list[str], left: str, right: str, scale: str) -> dict[str, Any]:
    classes = [colour_class(by, step) for step in steps]
    return {"by": by, "steps": classes, "ticks": ticks, "left": left, "right": right, "scale": scale}
