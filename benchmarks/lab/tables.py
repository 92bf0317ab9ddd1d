"""The report's tables and sentences, as plain text for Markdown and HTML alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.lab.report.claims import REPRODUCED, WORDS, Finding, Kind
from pipelines.lab.report.data import Results
from pipelines.lab.report.statistics import Estimate, estimate, paired

ABSENT = "–"
STAGES = ("pretrained", "mid", "sft", "dpo", "rl")
STAGE_NAMES = {"pretrained": "pre-training", "mid": "mid-training", "sft": "SFT", "dpo": "DPO", "rl": "RL"}
ARM_NAMES = {
    "base": "pre-trained", "ntp": "NTP", "remit": "ReMiT", "remit2": "ReMiT²", "ntp-guided": "NTP-guided",
    "sft-guided": "SFT-guided", "rho1": "RHO-1", "miniplm": "MiniPLM", "kd": "KD", "no-clip": "ReMiT, no clip",
    "remit-rl10": "ReMiT, 10 % of RL", "ntp-rl10": "NTP, 10 % of RL",
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
        "as of ReMiT, but a tenth of the RL steps, with the learning rate falling to 0 over those",
    ),
    "no-clip": ("the same without the clip", "as of ReMiT"),
    "rho1": (
        "next-token loss of the 80 % of tokens whose excess loss is largest",
        "the base after right solutions alone",
    ),
    "miniplm": ("next-token loss, on the 80 % of rows that MiniPLM chooses", "as of ReMiT; small model: the base"),
    "kd": ("half next-token loss, half forward KL from the 16 most probable tokens of the reference", "as of ReMiT"),
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


def digits(metric: str) -> int:
    return 1 if metric.startswith(("greedy", "sampled")) else 4


def mean_text(found: Estimate | None, places: int, signed: bool = False) -> str:
    """`12.3 ± 0.4`, half the interval; without one the mean alone."""
    if found is None:
        return ABSENT
    sign = "+" if signed else ""
    half = found.half_width
    return f"{found.mean:{sign}.{places}f}" + ("" if half is None else f" ± {half:.{places}f}")


def found_text(finding: Finding) -> str:
    """The mean of a claim's quantity and its interval, in its unit."""
    found = finding.estimate
    if found is None:
        return ABSENT
    unit = finding.claim.unit
    if unit == "ratio":
        ends = "" if found.low is None else f" ({math.exp(found.low):.2f} to {math.exp(found.high or 0):.2f})"
        return f"× {math.exp(found.mean):.2f}{ends}"
    places = 4 if unit == "nats" else 1
    ends = "" if found.low is None else f" ({found.low:+.{places}f} to {found.high:+.{places}f})"
    return f"{found.mean:+.{places}f}{ends} {unit}"


def claims_table(results: Results, findings: Sequence[Finding], kind: Kind) -> Table:
    rows = []
    unshown = {finding.claim.text for finding in findings if finding.verdict != REPRODUCED}
    for finding in findings:
        claim = finding.claim
        if claim.kind != kind:
            continue
        verdict = WORDS[kind].get(finding.verdict, finding.verdict)
        if finding.survives:
            verdict += " *"
        if claim.figure is not None and finding.estimate is not None and finding.estimate.low is not None:
            verdict += f"; {claim.figure:g} lies {_side(claim.figure, finding.estimate)} the interval"
        if claim.rests_on and claim.rests_on in unshown and finding.estimate is not None:
            verdict += "; supposes what is not shown"
        num = len(finding.values)
        row = [f"{claim.text}; {claim.note}" if claim.note else claim.text]
        row += [claim.paper] if kind == "paper" else []
        missing = sorted(set(results.seeds) - set(finding.values))
        without = f"; not of seed{'s' if len(missing) > 1 else ''} {', '.join(map(str, missing))}" if missing else ""
        row += [found_text(finding), f"{finding.agree} of {num}{without}" if num else ABSENT, verdict]
        rows.append(row)
    titles: dict[Kind, tuple[str, str]] = {
        "paper": (
            "The paper's claims",
            "Found here: mean over the seeds of the paired difference in greedy accuracy on the held-out problems (other "
            "quantities where it says so), and its 95 % interval. reproduced: the interval lies on the claimed side; "
            "contradicted: on the other; not decided: it holds the value between them, which is no evidence of no "
            "difference. A ratio is the geometric mean. The paper's figures are means over ten tasks, for OLMo-1B; SmolLM3-3B; "
            "Youtu-LLM-2B.",
        ),
        "control": (
            "Controls that the paper does not have",
            "NTP-guided is ReMiT with the plain mid-trained model as the reference: one that has seen the corpus, but no "
            "post-training. What it gains over NTP is not due to post-training. What ReMiT gains over it may come from SFT, DPO "
            "or RL: SFT-guided, above, tells what is left for DPO and RL.",
        ),
        "check": (
            "Is the experiment fit to tell?",
            "Where these do not hold, the claims above have not been put to a test: a reference that knows no more than "
            "the base has nothing to guide with.",
        ),
    }
    columns = ["claim", *(["paper"] if kind == "paper" else []), "found here", "seeds on that side", "verdict"]
    return Table(*titles[kind], columns, rows)


def _side(figure: float, found: Estimate) -> str:
    """Where a ratio lies, against the interval of its logarithm."""
    value = math.log(figure)
    if found.low is not None and found.high is not None and found.low <= value <= found.high:
        return "inside"
    return "above" if value > found.mean else "below"


def means_table(results: Results) -> Table:
    """Arms by metrics after mid-training."""
    metrics = [metric for metric in METRIC_NAMES if metric in results.metrics("mid")]
    rows = []
    for arm, stage in [("base", "pretrained"), *((arm, "mid") for arm in results.arms("mid"))]:
        cells = [_cell(results, arm, stage, metric) for metric in metrics]
        if set(cells) != {ABSENT}:
            rows.append([arm_name(arm), *cells])
    note = (
        "Means over the seeds ± half a 95 % interval. Loss and KL in nats per token; the KL is from the reference that "
    )
    note += "RL made of the NTP arm, on right solutions. These intervals hold what differs between seeds for all arms alike: arms "
    note += "are compared by the paired differences below, not by whether intervals here overlap."
    return Table("After mid-training", note, ["arm", *(METRIC_NAMES[metric] for metric in metrics)], rows)


def _cell(results: Results, arm: str, stage: str, metric: str) -> str:
    values = scaled(metric, results.get(arm, stage, metric))
    return mean_text(estimate(values) if values else None, digits(metric))


def differences_table(results: Results, other: str) -> Table:
    """Each arm minus `other` after mid-training, on the same seeds."""
    metrics = [metric for metric in METRIC_NAMES if metric in results.metrics("mid")]
    rows = []
    for arm in results.arms("mid"):
        cells = []
        for metric in metrics if arm != other else ():
            values = scaled(metric, paired(results.get(arm, "mid", metric), results.get(other, "mid", metric)))
            cells.append(mean_text(estimate(values) if values else None, digits(metric), signed=True))
        if set(cells) - {ABSENT}:
            rows.append([arm_name(arm), *cells])
    note = (
        f"Each arm minus {arm_name(other)} on the same seeds, mean ± half a 95 % interval of the differences, not corrected for "
        "how many there are: of so many cells some are beside zero by chance. The verdicts above are of greedy accuracy, as fixed "
        "before; sampled accuracy and the loss also count how far an arm has unlearned the wrong steps of the corpus."
    )
    return Table(
        f"Differences from {arm_name(other)}", note, ["arm", *(METRIC_NAMES[metric] for metric in metrics)], rows
    )


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
    note = "All arms but MiniPLM train on the same rows in the same order, all with as many steps and the same learning rate."
    return Table("The arms", note, ["arm", "loss of a token", "reference"], rows)


def post_training_table(results: Results) -> Table:
    """Arms that go through post-training: accuracy at each stage."""
    metrics = [metric for metric in ("greedy_all", "sampled_all") if metric in results.metrics("rl")]
    arms = [arm for arm in results.arms("mid") if any((arm, "rl", metric) in results.values for metric in metrics)]
    stages = [stage for stage in STAGES if stage != "pretrained"]
    rows = [
        [arm_name(arm), METRIC_NAMES[metric], *(_cell(results, arm, stage, metric) for stage in stages)]
        for metric in metrics
        for arm in arms
    ]
    columns = ["arm", "accuracy", *(f"after {STAGE_NAMES[stage]}" for stage in stages)]
    return Table("Through post-training", "Means over the seeds ± half a 95 % interval.", columns, rows)


def setup_table(results: Results) -> Table:
    rows = [["size", results.size], ["seeds", ", ".join(map(str, results.seeds))]]
    hours = sum(results.seconds.values()) / 3600
    if hours:
        rows.append(["time of all stages together", f"{hours:.1f} hours, summed over stages"])
    rows += [[name.replace("_", " "), _setting(value)] for name, value in results.recipe.items()]
    rows += [[f"version of {name}", ", ".join(versions)] for name, versions in results.versions.items()]
    if results.code:
        rows.append(["code, sha256", ", ".join(code[:12] for code in results.code)])
    return Table("Set-up", "The same for all seeds and arms.", ["", ""], rows)


def _setting(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def make_tables(results: Results, findings: Sequence[Finding]) -> list[Table]:
    """In the order of the report; a table without rows is left out."""
    tables = [claims_table(results, findings, kind) for kind in ("paper", "control", "check")]
    tables += [means_table(results), *(differences_table(results, other) for other in ("ntp", "remit"))]
    tables += [post_training_table(results), seeds_table(results), arms_table(results), setup_table(results)]
    return [table for table in tables if table.rows]
