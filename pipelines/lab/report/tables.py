"""The report's tables and sentences, as plain text for Markdown and HTML alike."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from pipelines.lab.report.claims import (
    CONTRADICTED,
    MISSING,
    ONE_SEED,
    PREMISE,
    REPRODUCED,
    UNDECIDED,
    WORDS,
    Finding,
    Kind,
)  # fmt: skip
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
    for finding in findings:
        claim = finding.claim
        if claim.kind != kind:
            continue
        verdict = WORDS[kind].get(finding.verdict, finding.verdict)
        if finding.survives:
            verdict += " *"
        if claim.figure is not None and finding.estimate is not None and finding.estimate.low is not None:
            verdict += f"; {claim.figure:g} lies {_side(claim.figure, finding.estimate)} the interval"
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
            "contradicted: on the other; not decided: it holds both, which is no evidence of no difference. The paper's "
            "figures are means over ten tasks, for OLMo-1B; SmolLM3-3B; Youtu-LLM-2B.",
        ),
        "control": (
            "Controls that the paper does not have",
            "NTP-guided is ReMiT with the plain mid-trained model as the reference: one that has seen the corpus, but no "
            "reward. What it gains over NTP is not due to RL; only what ReMiT gains over it may be.",
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
    note += (
        "RL made of the NTP arm, on right solutions. These intervals hold what the seeds have in common too: arms are "
    )
    note += "compared by the paired differences below, not by whether intervals here overlap."
    return Table("After mid-training", note, ["arm", *(METRIC_NAMES[metric] for metric in metrics)], rows)


def _cell(results: Results, arm: str, stage: str, metric: str) -> str:
    values = scaled(metric, results.get(arm, stage, metric))
    return mean_text(estimate(values) if values else None, digits(metric))


def differences_table(results: Results) -> Table:
    """Each arm minus NTP after mid-training, on the same seeds."""
    metrics = [metric for metric in METRIC_NAMES if metric in results.metrics("mid")]
    rows = []
    for arm in results.arms("mid"):
        cells = []
        for metric in metrics if arm != "ntp" else ():
            values = scaled(metric, paired(results.get(arm, "mid", metric), results.get("ntp", "mid", metric)))
            cells.append(mean_text(estimate(values) if values else None, digits(metric), signed=True))
        if set(cells) - {ABSENT}:
            rows.append([arm_name(arm), *cells])
    note = (
        "Each arm minus NTP on the same seeds, mean ± half a 95 % interval of the differences. Of so many cells some "
    )
    note += "are beside zero by chance."
    return Table("Differences from NTP", note, ["arm", *(METRIC_NAMES[metric] for metric in metrics)], rows)


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


def summary(results: Results, findings: Sequence[Finding]) -> list[str]:
    """Sentences that lead the report; none says more than the tables do."""
    paper = [finding for finding in findings if finding.claim.kind == "paper"]
    num = len(results.seeds)
    lines = [
        f"{num} seed{'s' if num > 1 else ''} at size {results.size}. Of {len(paper)} claims of the paper as they are put "
        f"here, {_count(paper, REPRODUCED)} are reproduced, {_count(paper, CONTRADICTED)} contradicted, "
        f"{_count(paper, UNDECIDED) + _count(paper, ONE_SEED)} not decided, {_count(paper, MISSING)} not measured; "
        f"{_count(paper, PREMISE)} not applicable."
    ]
    if results.size != "full":
        lines.append(
            "This size shows that the parts work together. Its models learn next to nothing: read no number of it."
        )
    if num == 1:
        lines.append("One seed has no interval: its differences may be chance, and nothing is claimed from them.")
    else:
        tested = [finding for finding in findings if finding.p is not None and finding.claim.kind != "check"]
        kept = sum(finding.survives for finding in tested)
        lines.append(
            f"Each verdict stands alone: of {len(tested)} tests at 95 % about {0.05 * len(tested):.1f} would be decided by "
            f"chance if nothing had any effect. {kept} of them, marked with *, also stand when all are taken together "
            "(Holm's correction)."
        )
    if len(results.code) > 1:
        lines.append("Not all stages ran with the same code: see the set-up.")
    lines.append(control_sentence(findings))
    return [line for line in lines if line]


def _count(findings: Sequence[Finding], verdict: str) -> int:
    return sum(finding.verdict == verdict for finding in findings)


def control_sentence(findings: Sequence[Finding]) -> str:
    """What ReMiT's comparison with NTP and with the control say together."""
    verdicts = {finding.claim.text: finding.verdict for finding in findings}
    gain = verdicts.get("ReMiT is above NTP after mid-training", MISSING)
    control = next((v for text, v in verdicts.items() if text.startswith("The reference has to come from RL")), MISSING)
    if MISSING in (gain, control):
        return "The control NTP-guided was not compared: whether a gain is due to RL cannot be told."
    if control == REPRODUCED and gain == REPRODUCED:
        return "ReMiT is above the control NTP-guided: a plain later model as the reference does not explain all of it."
    if control == REPRODUCED:
        return (
            "ReMiT is above the control NTP-guided, but not shown to be above NTP: RL makes the better reference here, and no "
            "gain over plain training is shown."
        )
    if control == CONTRADICTED:
        return "ReMiT is below the control NTP-guided: here a plain later model is the better reference."
    if gain == REPRODUCED:
        return (
            "ReMiT is above NTP, but not shown to differ from the control NTP-guided: the gain may be that of any later "
            "model as the reference."
        )
    if gain == CONTRADICTED:
        return "ReMiT is below NTP here, so that the control has no gain to explain."
    return "ReMiT is shown to be above neither NTP nor the control NTP-guided."


LIMITS = (
    "These are models of less than a million parameters on one family of generated problems; the paper's have one to three "
    "billion and ten tasks. What holds here need not hold there, and the other way round.",
    "A seed changes everything at once: data, initial weights, order, sampling. The interval is over such repetitions of "
    "the whole experiment. It supposes about normal differences, which a handful of seeds cannot show.",
    "The reference of ReMiT, KD and of the KL descends from the NTP arm of the same seed, by SFT, DPO and RL. What the two have in "
    "common by chance makes NTP look nearer to it.",
    "The problems are few in kind: the easy ones have some hundred different held-out computations, told in different words.",
    "An effect smaller than half the interval cannot be seen here. \"Not decided\" is not \"no effect\".",
    "All arms share one learning rate, one number of steps and one corpus (MiniPLM trains on a part of it); none was tuned "
    "alone. An arm that would do better with settings of its own is not done justice.",
)  # fmt: skip


def make_tables(results: Results, findings: Sequence[Finding]) -> list[Table]:
    """In the order of the report; a table without rows is left out."""
    tables = [claims_table(results, findings, kind) for kind in ("paper", "control", "check")]
    tables += [means_table(results), differences_table(results), post_training_table(results), setup_table(results)]
    return [table for table in tables if table.rows]
