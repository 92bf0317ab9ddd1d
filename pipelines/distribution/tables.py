"""The tables of remit distribution: the JSON object of figures.py, for a terminal and for the page."""

from dataclasses import dataclass
from typing import Any

from pipelines.distribution.distribution import LIMIT, SHARES


@dataclass(frozen=True)
class Lines:
    """A table. note: what its figures mean."""

    title: str
    headers: list[str]
    lines: list[list[str]]
    note: str = ""


QUANTILES = [f"{share:.0%}" for share in SHARES]


def tables(figures: dict[str, Any]) -> list[Lines]:
    """Log-probs, differences and, where it is there, the divergence from the reference."""
    steps = figures["logprob_steps"].values()
    digits = 4 if min(steps) == 0 else 2
    found = [
        Lines(
            "Log-probs of the tokens, in nats",
            ["column", "mean", "std", *QUANTILES],
            [[name, *_cells(own, digits)] for name, own in figures["logprobs"].items()],
            "The mean is minus the loss.",
        ),
        Lines(
            "Differences of log-probs, in nats",
            ["difference", "mean", "std", *QUANTILES, "above 0", "mean size"],
            [
                [f"{own['of']} - {own['minus']}", *_cells(own, digits, "+"), f"{own['share_above_0']:.1%}",
                 f"{own['mean_absolute']:.4f}"]
                for own in figures["differences"]
            ],
            "Above 0 the first model is more confident of the corpus' token. Mean size: of the differences without sign.",
        ),
    ]  # fmt: skip
    if figures["kl"]:
        found.append(
            Lines(
                "KL divergence from the reference, at least, in nats",
                ["divergence", "places", "mean", *QUANTILES, "known"],
                [line for own in figures["kl"] for line in _of_kl(own)],
                "At least: between the probabilities of the tokens that both models have stored, the row's own and all others "
                "together. Known: the probability of the reference that this is about, without all others.",
            )
        )
    return found


def summary(figures: dict[str, Any]) -> list[str]:
    """What the figures are over, in sentences."""
    sample = figures["sample"]
    which = "all" if sample["rows"] == sample["rows_total"] else f"random, --seed {sample['seed']}"
    left_out = f", {sample['rows_quarantined']:,} of them quarantined and left out" * bool(sample["rows_quarantined"])
    lines = [
        f"rows: {sample['rows']:,} of {sample['rows_total']:,} ({which}){left_out}",
        f"tokens: {sample['tokens']:,} of {sample['tokens_total']:,}, {sample['predicted_tokens']:,} of them with log-probs of "
        f"{', '.join(figures['columns'])}; {figures['context']} context, reference {figures['reference']}",
    ]
    if figures["no_kl"]:
        lines.append(
            f"No KL divergence between {figures['reference']} and {', '.join(figures['no_kl'])}: it needs the most probable "
            "tokens of both (remit score --top-k 32)"
        )
    if any(max(abs(own["min"]), abs(own["max"])) > LIMIT for own in _all(figures)):
        lines.append(f"Quantiles beyond {LIMIT} nats are not told apart.")
    return lines


def _all(figures: dict[str, Any]) -> list[dict[str, Any]]:
    return [*figures["logprobs"].values(), *figures["differences"]]


def _of_kl(own: dict[str, Any]) -> list[list[str]]:
    one, other = own["reference"], own["other"]
    lines = []
    for name, found in ((f"KL({one} || {other})", own["forward"]), (f"KL({other} || {one})", own["backward"])):
        quantiles = [f"{value:.3f}" for value in found["quantiles"].values()]
        lines.append(
            [name, f"{found['count']:,}", f"{found['mean']:.4f}", *quantiles, f"{own['known_probability']:.1%}"]
        )
    return lines


def _cells(own: dict[str, Any], digits: int, sign: str = "") -> list[str]:
    quantiles = [f"{value + 0.0:{sign}.{digits}f}" for value in own["quantiles"].values()]  # no -0.00
    return [f"{own['mean']:{sign}.4f}", f"{own['std']:.4f}", *quantiles]
