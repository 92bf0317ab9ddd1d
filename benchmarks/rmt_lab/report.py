"""The tables of the comparison, as Markdown.

    python -m benchmarks.rmt_lab.report LAB [LAB ...]

In: LAB/results.parquet of one or several folders of make lab-rmt. Out: LAB/report.md in the first.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.lab.claims import VERDICTS, Finding, Kind, estimate, is_counted, judge_all, paired
from benchmarks.lab.report import markdown_table
from benchmarks.lab.results import Results, read
from benchmarks.lab.tables import ABSENT, Table, claims_table, setup_table
from benchmarks.rmt_lab.claims import CLAIMS
from benchmarks.rmt_lab.graph import RMT_ARMS, SLOW
from shards.store import LocalStore

ARM_NAMES = {
    "base": "pre-trained", "rmt": "RMT", "rpt": "RPT", "no-budget": "RMT without budget",
    "no-curriculum": "RMT without curriculum", "no-ntp": "RMT without NTP", SLOW: "RMT, slow budget", "ntp": "NTP, equal compute",
    "remit": "ReMiT, equal compute", "ntp-steps": "NTP, equal steps", "remit-steps": "ReMiT, equal steps",
}  # fmt: skip
METRICS = {
    "compute": "compute / RMT's", "steps": "steps", "bare_easy": "easy", "bare_medium": "medium", "bare_hard": "hard",
    "bare_all": "mean", "thought_easy": "easy, thought", "thought_medium": "medium, thought", "thought_hard": "hard, thought",
    "thought_all": "mean, thought", "greedy_all": "problems solved", "loss_solutions": "loss, solutions",
}  # fmt: skip
PAPER = (
    "Found here: the mean over the seeds of the paired difference in next-token accuracy (the mean of the tiers, or the "
    "quantity that the row names), with its 95 % interval. Reproduced: the whole interval lies on the claimed side. "
    "Contradicted: the whole interval lies on the other side. Not decided: the interval includes the value between the two, "
    "which is not evidence that there is no difference. * marks verdicts that also hold after Holm's correction. A ratio is a "
    "geometric mean. The paper's figures are for R1-Distill-Qwen-14B; Qwen3-14B."
)
TITLES: dict[Kind, tuple[str, str]] = {
    "paper": ("RMT's claims", PAPER),
    "control": (
        "Controls that the paper does not have",
        "Equal compute: NTP and ReMiT train for as many steps as cost what RMT has cost, scoring, warm-up and rollouts included.",
    ),
    "check": (
        "Can the experiment test the claims?",
        "Where one of these does not hold, the claims that rest on it have not been tested.",
    ),
}
LIMITS = [
    "The models have well below a million parameters and think a dozen tokens; the papers' have 14 billion and think hundreds. "
    "A thought of such a model carries no reasoning. What holds here need not hold there, and what fails here may hold.",
    "The base learns the format of a thought by supervised steps that the paper does not need. They count as compute.",
    "Compute is counted in forwards of one token: 1 to score, prefill or decode it, 3 to train on it, 4 where TRL asks for its "
    "log-prob again. Time would favour NTP more: decoding is slower per token than training.",
    "RMT's arms but the slow one have equal steps, and the compute that the table shows, not the same. Rows differ between the arms of remit rmt and "
    "those of remit train, which visit all rows alike.",
    "NTP and ReMiT have the rate of the warm-up with a cosine; the reinforcement steps have a fifth of it, constant, since larger ones "
    "ruin the base. No arm's rate was tuned for this comparison.",
    "A seed changes everything at once: data, initial weights, order, sampling. An effect smaller than half the interval cannot "
    'be seen here. "Not decided" does not mean "no effect".',
]


def arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm)


def cell(metric: str, values: dict[int, float], signed: bool = False) -> str:
    """`12.3 ± 0.4`, half the interval; shares in per cent; the mean alone where there is no interval."""
    if not values:
        return ABSENT
    is_share = metric.startswith(("bare", "thought", "greedy"))
    found = estimate([100 * value if is_share else value for value in values.values()])
    places = 0 if metric == "steps" else 1 if is_share else 2 if metric == "compute" else 3
    half = "" if found.half_width is None else f" ± {found.half_width:.{places}f}"
    return f"{found.mean:{'+' if signed else ''}.{places}f}{half}"


def models_table(results: Results, stage: str, title: str) -> Table:
    """Arms by metrics after a stage."""
    models = [*([("base", "pretrained")] if stage == "mid" else []), *((arm, stage) for arm in ordered(results, stage))]
    metrics = [name for name in METRICS if any(results.get(arm, where, name) for arm, where in models)]
    rows = []
    for arm, where in models:
        values = {name: results.get(arm, where, name) for name in metrics}
        if "compute" in values:
            of_rmt = results.get("rmt", "mid", "compute")
            values["compute"] = {
                seed: value / of_rmt[seed] for seed, value in values["compute"].items() if seed in of_rmt
            }
        rows.append([arm_name(arm), *(cell(name, values[name]) for name in metrics)])
    note = (
        "Means over the seeds ± half a 95 % interval. Next-token accuracy is in per cent of held-out positions of each tier, without a "
        "thought and with one; loss in nats per token. The intervals include what differs between seeds for all arms alike: the "
        "paired differences compare arms."
    )
    return Table(title, note, ["arm", *(METRICS[name] for name in metrics)], rows)


def ordered(results: Results, stage: str) -> list[str]:
    there = results.arms(stage)
    return [arm for arm in ARM_NAMES if arm in there]


def differences_table(results: Results, other: str) -> Table:
    """Each arm minus `other` on the same seeds, without a thought."""
    metrics = [
        name for name in METRICS if name.startswith(("bare", "greedy", "loss")) and results.get(other, "mid", name)
    ]
    rows = [
        [arm_name(arm), *(cell(name, paired(results.get(arm, "mid", name), results.get(other, "mid", name)), True) for name in metrics)]
        for arm in ordered(results, "mid")
        if arm != other and metrics
    ]  # fmt: skip
    note = (
        "Each arm minus the other on the same seeds: mean ± half a 95 % interval, not corrected for the number of cells. All "
        "predictions are without a thought."
    )
    return Table(f"Differences from {arm_name(other)}", note, ["arm", *(METRICS[name] for name in metrics)], rows)


def lengths_table(results: Results, title: str, arm: str, others: Sequence[str] = (), points: int = 8) -> Table:
    """Tokens of thought of `arm` and others over the steps of the reinforcement, beside the budget of `arm`."""
    own = arm_name(arm)
    series = [(f"budget of {own}", results.curve(arm, "mid", "budget"))]
    series += [(arm_name(name), results.curve(name, "mid", "thought_tokens")) for name in (arm, *others)]
    series += [(f"{own}: share closed", results.curve(arm, "mid", "closed")), (f"{own}: reward's match", results.curve(arm, "mid", "outcome"))]  # fmt: skip
    steps = sorted({step for _, curves in series for curve in curves.values() for step, _ in curve})
    length = max(1, -(-len(steps) // points))
    groups = [steps[start : start + length] for start in range(0, len(steps), length)]
    rows = []
    for name, curves in series:
        cells = []
        for group in groups:
            found = [value for curve in curves.values() for step, value in curve if step in group]
            cells.append(f"{sum(found) / len(found):.{2 if ':' in name else 1}f}" if found else ABSENT)
        if set(cells) - {ABSENT}:
            rows.append([name, *cells])
    note = "Means over the seeds and over the reinforcement steps up to the one that heads the column."
    return Table(title, note, ["", *(f"to {group[-1]}" for group in groups)], rows)


def make_tables(results: Results, findings: Sequence[Finding]) -> list[Table]:
    tables = []
    for kind, (title, note) in TITLES.items():
        tables.append(replace(claims_table(results, findings, kind), title=title, note=note))
    tables += [
        models_table(results, "mid", "After mid-training"),
        differences_table(results, "ntp"),
        lengths_table(results, "Tokens of thought", "rmt", [arm for arm in RMT_ARMS if arm != "rmt"]),
        lengths_table(results, "Tokens of thought, slow budget", SLOW),
        models_table(results, "sft", "After SFT too"),
        setup_table(results),
    ]
    return [table for table in tables if table.rows]


def lead(results: Results, findings: Sequence[Finding]) -> list[str]:
    """What is counted, and what a reader must know before any number."""
    verdicts = Counter(finding.verdict for finding in findings if finding.claim.kind == "paper")
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdicts[verdict])
    num, tested = len(results.seeds), [finding for finding in findings if is_counted(finding)]
    lines = [
        f"{num} seed{'s' if num > 1 else ''} at size {results.size}. The {verdicts.total()} claims of the paper: {counts}."
    ]
    if tested:
        survivors = sum(finding.survives for finding in tested)
        lines.append(f"Tests that stay significant after Holm's correction: {survivors} of {len(tested)}.")
    if num == 1:
        lines.append("One seed has no interval: its differences may be chance, and nothing is claimed from them.")
    if len(results.code) > 1:
        lines.append("Not all stages ran with the same code: see the set-up.")
    return lines


def to_markdown(results: Results) -> str:
    findings = judge_all(results, CLAIMS)
    parts = ["# Reinforcement mid-training at equal compute", *lead(results, findings)]
    for table in make_tables(results, findings):
        parts += [f"## {table.title}", table.note, markdown_table(table)]
    parts += ["## What this does not show", "\n".join(f"- {line}" for line in LIMITS)]
    return "\n\n".join(parts) + "\n"


def write(folders: Sequence[Path]) -> Path:
    """Write report.md of all seeds into the first folder."""
    LocalStore(folders[0]).replace("report.md", to_markdown(read(folders)).encode())
    return folders[0] / "report.md"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rmt_lab.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("labs", type=Path, nargs="+", metavar="LAB", help="folder of make lab-rmt; several are joined")
    config = parser.parse_args(arguments)
    try:
        print(f"-> {write(config.labs)}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")


if __name__ == "__main__":
    main()
