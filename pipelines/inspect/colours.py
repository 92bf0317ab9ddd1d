"""Colours of the page of remit inspect: by delta, by weight, by log-prob of the reference or by its entropy, in steps from
none to full.

T = tokens of a row. Nats.
"""

from collections.abc import Iterator

import numpy as np

STEPS = 20  # of a colour, from none to full
SHARE_IN_SCALE = 0.99  # of |delta| on the page; beyond, a colour is full
LEAST_SCALE = 1 / 64  # nat; log-probs are rounded to such steps, and smaller differences mean nothing
LOW = 8  # nat: a token with probability below exp(-8) has the full colour where there is no base
COLOURS = {  # below and above the middle
    "delta": ("down", "up"), "weight": ("down", "up"), "reference": ("low", "low"), "entropy": ("open", "open"),
}  # fmt: skip


def scale(values: list[np.ndarray]) -> float:
    """The |value| from which on a colour is full: above nearly all of the page's, so that each page uses all colours."""
    sizes = np.abs(np.concatenate(values))
    sizes = sizes[np.isfinite(sizes)]
    return max(LEAST_SCALE, float(np.quantile(sizes, SHARE_IN_SCALE))) if len(sizes) else LEAST_SCALE


def classes(by: str, values_T: np.ndarray, full: float) -> list[str]:
    """The class of each token: d-20 to d20 for delta, nothing for no colour; `full` from the middle on it is full."""
    middle = 1.0 if by == "weight" else 0.0
    shares_T = np.nan_to_num((values_T.astype(np.float64) - middle) / full, posinf=1, neginf=-1)
    steps = np.rint(STEPS * np.clip(shares_T, -1, 1)).astype(int).tolist()
    return [f"{by[0]}{step}" if step else "" for step in steps]


def colour_rules() -> Iterator[str]:
    """The style of each class: mixed from the paper's colour and one other."""
    for by, (below, above) in COLOURS.items():
        for step in (*range(-STEPS, 0), *range(1, STEPS + 1)):
            mix = (
                f"color-mix(in srgb, var(--{above if step > 0 else below}) {100 * abs(step) / STEPS:g}%, var(--paper))"
            )
            yield f"[data-by={by}] .{by[0]}{step} {{ background-color: {mix}; }}"


def legends(reference: str, base: str | None, full: dict[str, float]) -> list[tuple[str, list[str], str, str, str]]:
    """For each of the ways to colour its name, numbers below the bar of colours, what its ends mean, and its scale.

    full: of each way that the page has, where a colour is full.
    """
    entropy = []
    if "entropy" in full:
        ticks = [f"{full['entropy'] * share:.2g}" for share in (0, 0.25, 0.5, 0.75, 1)]
        why = f"full colour from {full['entropy']:.2g} nat on, the 99th percentile of the entropy on this page"
        entropy = [("entropy", [*ticks[:-1], f"{ticks[-1]} nat"], f"{reference} is sure", "undecided", why)]
    if base is None:
        ticks = [f"-{LOW} nat", *(f"{tick}" for tick in np.linspace(-LOW, 0, 5, dtype=int)[1:])]
        scale = f"full colour from -{LOW} nat on"
        return [("reference", ticks, f"improbable to {reference}", "certain", scale), *entropy]
    delta, weight = full["delta"], full["weight"]
    shares = (-1, -0.5, 0, 0.5, 1)
    ticks = [f"{delta * share:+.2g}" if share else "0" for share in shares]
    why = "the 99th percentile of |delta| on this page"
    if delta == LEAST_SCALE:
        why = "the step that log-probs are rounded to"
    ends = (f"{base} more confident", f"{reference} more confident")
    return [
        ("delta", [*ticks[:-1], f"{ticks[-1]} nat"], *ends, f"full colour from ±{delta:.2g} nat on, {why}"),
        ("weight", [f"{1 + weight * share:.4g}" for share in shares], "weight below 1", "weight above 1",
         f"full colour from 1 ± {weight:g} on"),
        *entropy,
    ]  # fmt: skip
