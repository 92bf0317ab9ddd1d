"""The tables of remit weights: the JSON object of pipelines/weights/figures.py, for a terminal."""

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from pipelines.terminal import print_table
from pipelines.token_text import token_label

PERCENT, NUMBER = ".1%", ".3f"
COLUMNS = {  # of a line of the epsilons, in the order of the table
    "clipped_low": ("clipped low", PERCENT), "clipped_high": ("clipped high", PERCENT),
    "in_between": ("in between", PERCENT), "effective_share": ("effective", PERCENT),
    "weight_mean": ("mean w", NUMBER), "weight_std": ("std w", NUMBER),
}  # fmt: skip


def show(figures: dict[str, Any], console: Console) -> None:
    """The tables, for 80 columns."""
    sample, excess, vocabulary = figures["sample"], figures["excess_loss"], figures["vocabulary"]
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
        [epsilon, *(_text(line[name], format_) for name, (_, format_) in COLUMNS.items())]
        for epsilon, line in figures["epsilons"].items()
    ]
    headers = ["epsilon", *(header for header, _ in COLUMNS.values())]
    print_table(console, headers, lines, "Tokens by --epsilon; effective: (sum w)^2 / sum w^2, of all", left=0)
    if sources := figures.get("sources"):
        lines = [
            [name, f"{own['predicted_tokens']:,}", _text(own["excess_loss_mean"], "+.3f"),
             *(_text(own[column], format_) for column, (_, format_) in COLUMNS.items() if column != "in_between")]
            for name, own in sources.items()
        ]  # fmt: skip
        headers = ["source", "tokens", "excess loss", *(of[0] for name, of in COLUMNS.items() if name != "in_between")]
        print_table(console, headers, lines, f"Sources, at epsilon {vocabulary['epsilon']}", width=16)
    digits = math.ceil(-math.log10(excess["step"]))
    headers = [*(f"{float(share):.0%}" for share in excess["quantiles"]), "mean"]
    cells = [*(f"{value:+.{digits}f}" for value in excess["quantiles"].values()), f"{excess['mean']:+.3f}"]
    print_table(console, headers, [cells], f"Quantiles of the excess loss, {base} - {reference}, in nats", left=0)
    for direction in ("up", "down"):
        lines = [
            [
                token_label(entry["token"]),
                f"{entry['count']:,}",
                _text(entry["weight_mean"], NUMBER),
                f"{entry['excess_loss_mean']:+.3f}",
            ]
            for entry in vocabulary[direction]
        ]
        title = f"Most {direction}-weighted of {vocabulary['tokens']:,} tokens that occur at least "
        title += f"{vocabulary['min_count']:,} times, at epsilon {vocabulary['epsilon']}"
        print_table(console, ["token", "count", "mean weight", "mean excess loss"], lines, title, width=24)


def _text(value: float | None, format_: str) -> str:
    return "-" if value is None else f"{value:{format_}}"
