"""The tables of remit weights: the JSON object of pipelines/plan/weights.py, for a terminal."""

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from pipelines.plan.tables import print_table


def show(figures: dict[str, Any], console: Console) -> None:
    """The tables, for 80 columns."""
    from pipelines.token_text import token_label

    sample, vocabulary = figures["sample"], figures["vocabulary"]
    reference, base, step = figures["reference"], figures["base"], figures["base_logprob_step"]
    which = "all" if sample["rows"] == sample["rows_total"] else f"random, --seed {sample['seed']}"
    left_out = f", {sample['rows_quarantined']:,} of them quarantined and left out" * bool(sample["rows_quarantined"])
    rounded = f", rounded to {step:g} nat" if step else ""
    console.print(
        Text(
            f"rows: {sample['rows']:,} of {sample['rows_total']:,} ({which}){left_out}\n"
            f"tokens: {sample['tokens']:,} of {sample['tokens_total']:,}, {sample['predicted_tokens']:,} of them predicted\n"
            f"weights: reference {reference}, base {base}, {figures['context']} context, centring {figures['centring']}, "
            f"map {figures['weight_map']}\n"
            f"The log-probs of {base} were stored before training{rounded}: these are the weights of the first step, "
            "and change as the base learns."
        )
    )
    lines = [
        [epsilon, *(_share(line[name]) for name in ("clipped_low", "clipped_high", "in_between", "effective_share"))]
        + [_number(line[name]) for name in ("weight_mean", "weight_std")]
        for epsilon, line in figures["epsilons"].items()
    ]
    headers = ["epsilon", "clipped low", "clipped high", "in between", "effective", "mean w", "std w"]
    print_table(console, "Tokens by --epsilon; effective: (sum w)^2 / sum w^2, of all", headers, lines, left=0)
    excess = figures["excess_loss"]
    digits = math.ceil(-math.log10(figures["excess_loss"]["step"]))
    headers = [*(f"{float(share):.0%}" for share in excess["quantiles"]), "mean"]
    cells = [f"{value:+.{digits}f}" for value in excess["quantiles"].values()] + [f"{excess['mean']:+.3f}"]
    print_table(console, f"Quantiles of the excess loss, {base} - {reference}, in nats", headers, [cells], left=0)
    for direction in ("up", "down"):
        strings = [token_label(entry["token"]) for entry in vocabulary[direction]]
        lines = [
            [string, f"{count:,}", _number(weight), f"{delta:+.3f}"]
            for string, (_, _, count, weight, delta) in zip(
                strings, (entry.values() for entry in vocabulary[direction])
            )
        ]
        title = f"Most {direction}-weighted of {vocabulary['tokens']:,} tokens that occur at least "
        title += f"{vocabulary['min_count']:,} times, at epsilon {vocabulary['epsilon']}"
        print_table(console, title, ["token", "count", "mean weight", "mean excess loss"], lines, width=24)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
