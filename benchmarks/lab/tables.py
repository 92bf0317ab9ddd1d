"""The tables of the laboratory's report, as plain text for Markdown and HTML alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.lab.claims import CONTRADICTED, REPRODUCED, Estimate, Finding, Kind, estimate, paired
from benchmarks.lab.results import Results

ABSENT = "–"
STAGES = ("pretrained", "mid", "sft", "dpo", "rl")
STAGE_NAMES = {"pretrained": "pre-training", "mid": "mid-training", "sft": "SFT", "dpo": "DPO", "rl": "RL"}
ARM_NAMES = {
    "base": "pre-trained", "ntp": "NTP", "remit": "ReMiT", "remit2": "ReMiT²", "ntp-guided": "NTP-guided",
    "sft-guided": "SFT-guided", "rho1": "RHO-1", "miniplm": "MiniPLM", "kd": "KD", "no-clip": "ReMiT, no clip",
    "remit-rl10": "ReMiT, 10 % of RL", "ntp-rl10": "NTP, 10 % of RL", "rkl": "reverse KL", "switch": "switch",
}  # fmt: skip
METRIC_NAMES = {
    "greedy_easy": "easy, %", "greedy_hard": "hard, %", "greedy_all": "both, %", "sampled_easy": "easy, sampled, %",
    "sampled_hard": "hard, sampled, %", "sampled_all": "both, sampled, %", "loss_solutions": "loss, solutions",
    "loss_stories": "loss, stories", "loss_notes": "loss, notes", "kl_reference": "KL to the reference",
}  # fmt: skip
ARMS = {
    "ntp": ("next-token loss", "none"),
    "remit": ("next-token loss, weighted by ReMiT with the clip at 0.2", "NTP after SFT, DPO and RL"),
    "remit2": ("the same", "ReMiT after SFT, DPO and RL"),
    "sft-guided": ("the same", "NTP after SFT"),
    "ntp-guided": ("the same", "NTP itself"),
    "remit-rl10": (
        "the same",
        "as for ReMiT, but with a tenth of the RL steps, over which the learning rate falls to 0",
    ),
    "no-clip": ("the same without the clip", "as for ReMiT"),
    "rho1": (
        "next-token loss of the 80 % of tokens whose excess loss is largest",
        "the base, trained further on right solutions alone",
    ),
    "miniplm": ("next-token loss, on the 80 % of rows that MiniPLM chooses", "as for ReMiT; small model: the base"),
    "kd": ("half next-token loss, half forward KL from the 16 most probable tokens of the reference", "as for ReMiT"),
    "rkl": ("half next-token loss, half reverse KL at temperature 2 to the same 16 tokens, times 4", "as for ReMiT"),
    "switch": (
        "reverse KL at temperature 2, times 4, where the reference's entropy is in the lowest fifth of the step; elsewhere "
        "next-token loss",
        "as for ReMiT; its 16 tokens are stored only where its entropy is low",
    ),
}


PUBLISHED = ("paper", "switch")
YES_NO = {REPRODUCED: "yes", CONTRADICTED: "no, the other way round"}

CLAIMS_TABLES: dict[Kind, tuple[str, str]] = {
    "paper": (
        "The paper's claims",
        "Found here: the mean over the seeds of the paired difference in greedy accuracy on held-out problems (or of the "
        "quantity that the row names), with its 95 % interval. Reproduced: the whole interval lies on the claimed side. "
        "Contradicted: the whole interval lies on the other side. Not decided: the interval includes the value between the "
        "two, which is not evidence that there is no difference. Each verdict is taken on its own; * marks those that "
        "also hold after Holm's correction for all tests together. A ratio is a geometric mean. The paper's figures are "
        "means over ten tasks, for OLMo-1B; SmolLM3-3B; Youtu-LLM-2B.",
    ),
    "control": (
        "Controls that the paper does not have",
        "NTP-guided is ReMiT with the plain mid-trained model as its reference: a model that has seen the corpus, but no "
        "post-training. What it gains over NTP is not due to post-training. What ReMiT gains over it may come from SFT, "
        "DPO or RL; the comparison with SFT-guided, above, shows what is left for DPO and RL.",
    ),
    "check": (
        "Can the experiment test the claims?",
        "Where one of these does not hold, the claims that rest on it have not been tested: a reference that knows no "
        "more than the base cannot guide it.",
    ),
    "switch": (
        "Switch distillation",
        "The method of arXiv 2609.01532 from stored columns, beside KD, reverse KL at every token, and ReMiT. The paper's "
        "figures are for a base of 1B and a teacher of 7B; its recall is measured on other tasks than what is lost here.",
    ),
}


@dataclass(frozen=True)
class Table:
    """rows: as many texts as there are columns."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]


def arm_name(arm: str) -> str:
    return ARM_NAMES.get(arm, arm)


def scaled(metric: str, values: dict[int, float]) -> list[float]:
    """Values by seed as a list; shares in per cent."""
    return [100 * value if metric.startswith(("greedy", "sampled")) else value for value in values.values()]


def cell(metric: str, values: dict[int, float], signed: bool = False) -> str:
    """`12.3 ± 0.4`, half the interval; the mean alone where there is no interval."""
    if not values:
        return ABSENT
    places = 1 if metric.startswith(("greedy", "sampled")) else 4
    found = estimate(scaled(metric, values))
    half = "" if found.half_width is None else f" ± {found.half_width:.{places}f}"
    return f"{found.mean:{'+' if signed else ''}.{places}f}{half}"


def found_text(finding: Finding) -> str:
    """The mean of a claim's quantity and its interval, in its unit."""
    found, unit = finding.estimate, finding.claim.unit
    if found is None:
        return ABSENT
    ends = [end for end in (found.low, found.high) if end is not None]
    if unit == "ratio":
        interval = " to ".join(f"{math.exp(end):.2f}" for end in ends)
        return f"× {math.exp(found.mean):.2f}" + (f" ({interval})" if ends else "")
    places = 4 if unit == "nats" else 1
    interval = " to ".join(f"{end:+.{places}f}" for end in ends)
    return f"{found.mean:+.{places}f}" + (f" ({interval})" if ends else "") + f" {unit}"


def claims_table(results: Results, findings: Sequence[Finding], kind: Kind) -> Table:
    rows = []
    unshown = {finding.claim.text for finding in findings if finding.verdict != REPRODUCED}
    for finding in findings:
        claim, found, num = finding.claim, finding.estimate, len(finding.values)
        if claim.kind != kind:
            continue
        verdict = finding.verdict if kind in PUBLISHED else YES_NO.get(finding.verdict, finding.verdict)
        if finding.survives:
            verdict += " *"
        if claim.figure is not None and found is not None and found.low is not None:
            verdict += f"; {claim.figure:g} lies {_side(math.log(claim.figure), found)} the interval"
        if claim.rests_on in unshown and found is not None:
            verdict += "; rests on what is not shown"
        missing = sorted(set(results.seeds) - set(finding.values))
        without = f"; without seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}" if missing else ""
        rows.append(
            [
                f"{claim.text}; {claim.note}" if claim.note else claim.text,
                *([claim.paper] if kind in PUBLISHED else []),
                found_text(finding),
                f"{finding.agree} of {num}{without}" if num else ABSENT,
                verdict,
            ]
        )
    paper = ["paper"] if kind in PUBLISHED else []
    return Table(*CLAIMS_TABLES[kind], ["claim", *paper, "found here", "seeds on the claimed side", "verdict"], rows)


def _side(value: float, found: Estimate) -> str:
    if found.low is not None and found.high is not None and found.low <= value <= found.high:
        return "inside"
    return "above" if value > found.mean else "below"


def means_table(results: Results) -> Table:
    """Arms by metrics after mid-training."""
    metrics = [metric for metric in METRIC_NAMES if metric in results.metrics("mid")]
    models = [("base", "pretrained"), *((arm, "mid") for arm in results.arms("mid"))]
    rows = [
        [arm_name(arm), *(cell(metric, results.get(arm, stage, metric)) for metric in metrics)] for arm, stage in models
    ]
    note = (
        "Means over the seeds ± half a 95 % interval. Loss and KL are in nats per token; the KL is from the reference, NTP "
        "after RL, on right solutions. Do not compare arms by whether these intervals overlap: they include what differs "
        "between seeds for all arms alike. The paired differences below compare arms."
    )
    return Table("After mid-training", note, ["arm", *(METRIC_NAMES[metric] for metric in metrics)], _not_empty(rows))


def differences_table(results: Results, other: str) -> Table:
    """Each arm minus `other` after mid-training, on the same seeds."""
    metrics = [metric for metric in METRIC_NAMES if metric in results.metrics("mid")]

    def differences(arm: str, metric: str) -> dict[int, float]:
        return paired(results.get(arm, "mid", metric), results.get(other, "mid", metric))

    rows = [
        [arm_name(arm), *(cell(metric, differences(arm, metric), signed=True) for metric in metrics)]
        for arm in results.arms("mid")
        if arm != other
    ]
    note = (
        f"Each arm minus {arm_name(other)} on the same seeds: mean ± half a 95 % interval of the differences. The intervals "
        "are not corrected for the number of cells: if no arm differed, about one cell in twenty would still exclude zero. "
        "The verdicts above use greedy accuracy, as fixed in advance; sampled accuracy and the loss also measure how far an "
        "arm has unlearned the wrong steps of the corpus."
    )
    columns = ["arm", *(METRIC_NAMES[metric] for metric in metrics)]
    return Table(f"Differences from {arm_name(other)}", note, columns, _not_empty(rows))


def _not_empty(rows: list[list[str]]) -> list[list[str]]:
    return [row for row in rows if set(row[1:]) - {ABSENT}]


def post_training_table(results: Results) -> Table:
    """Arms that go through post-training: accuracy at each stage."""
    metrics = [metric for metric in ("greedy_all", "sampled_all") if metric in results.metrics("rl")]
    arms = [arm for arm in results.arms("mid") if any(results.get(arm, "rl", metric) for metric in metrics)]
    rows = [
        [arm_name(arm), METRIC_NAMES[metric], *(cell(metric, results.get(arm, stage, metric)) for stage in STAGES[1:])]
        for metric in metrics
        for arm in arms
    ]
    columns = ["arm", "accuracy", *(f"after {STAGE_NAMES[stage]}" for stage in STAGES[1:])]
    return Table("Through post-training", "Means over the seeds ± half a 95 % interval.", columns, rows)


def seeds_table(results: Results) -> Table:
    """Greedy accuracy of each finished model, seed by seed."""
    rows = []
    for stage in STAGES:
        for arm in results.arms(stage):
            values = results.get(arm, stage, "greedy_all")
            cells = [f"{100 * values[seed]:.1f}" if seed in values else ABSENT for seed in results.seeds]
            if values:
                rows.append([arm_name(arm), STAGE_NAMES[stage], *cells])
    columns = ["arm", "after", *(f"seed {seed}" for seed in results.seeds)]
    return Table("Seed by seed", "Greedy accuracy over both levels, in per cent.", columns, rows)


def arms_table(results: Results) -> Table:
    rows = [[arm_name(arm), *ARMS[arm]] for arm in results.arms("mid") if arm in ARMS]
    note = (
        "All arms have the same number of steps and the same learning rate, and all but MiniPLM train on the same rows in "
        "the same order."
    )
    return Table("The arms", note, ["arm", "loss of a token", "reference"], rows)


def setup_table(results: Results) -> Table:
    rows = [["size", results.size], ["seeds", ", ".join(map(str, results.seeds))]]
    if hours := sum(results.seconds.values()) / 3600:
        rows.append(["time of all stages together", f"{hours:.1f} hours, summed over stages"])
    for name, value in results.recipe.items():
        rows.append([name.replace("_", " "), ", ".join(map(str, value)) if isinstance(value, list) else str(value)])
    rows += [[f"version of {name}", ", ".join(versions)] for name, versions in results.versions.items()]
    if results.code:
        rows.append(["code, sha256", ", ".join(code[:12] for code in results.code)])
    return Table("Set-up", "The same for all seeds and arms.", ["", ""], rows)


def make_tables(results: Results, findings: Sequence[Finding]) -> list[Table]:
    """In the order of the report; a table without rows is left out."""
    tables = [claims_table(results, findings, kind) for kind in CLAIMS_TABLES]
    tables += [means_table(results), *(differences_table(results, other) for other in ("ntp", "remit"))]
    tables += [post_training_table(results), seeds_table(results), arms_table(results), setup_table(results)]
    return [table for table in tables if table.rows]
