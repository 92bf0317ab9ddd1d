"""What the paper claims, as quantities that the laboratory measures, and what is found of each.

Every quantity is one number per seed and is positive, or above `null`, where the claim holds. The rule of the verdict
was fixed before any run: greedy accuracy over both levels, a paired 95 % interval over seeds, nothing else.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Literal

from scipy import stats

from benchmarks.lab.results import Results

ACCURACY = "greedy_all"
Values = dict[int, float]
Kind = Literal["paper", "control", "check", "switch"]
REPRODUCED, CONTRADICTED, UNDECIDED, MISSING = "reproduced", "contradicted", "not decided", "not measured"
PREMISE = "not tested, premise not shown"
COLLAPSED = 1e-3  # of the norm with the clip: a norm below that counts as this, so that zero has a logarithm
ONE_SEED = "not decided (one seed)"
VERDICTS = (REPRODUCED, CONTRADICTED, UNDECIDED, ONE_SEED, PREMISE, MISSING)
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its interval and the two-sided p of a t-test that the mean is the null.

    low, high, p are None with one seed, and where all values are equal: that says that they were measured too coarsely
    or are copies, not that they are certain. The interval supposes values that are about normal.
    """

    mean: float
    low: float | None = None
    high: float | None = None
    p: float | None = None

    @property
    def half_width(self) -> float | None:
        return None if self.low is None or self.high is None else (self.high - self.low) / 2


def estimate(values: Sequence[float], null: float = 0.0) -> Estimate:
    """ValueError for no values, or values that are not finite."""
    if not values or not all(math.isfinite(value) for value in values):
        raise ValueError(f"values {list(values)!r}, expected finite numbers, at least one")
    if len(values) == 1 or math.isclose(min(values), max(values), rel_tol=1e-12, abs_tol=1e-15):
        return Estimate(fmean(values))
    test = stats.ttest_1samp(values, null)
    low, high = test.confidence_interval(CONFIDENCE)
    return Estimate(fmean(values), float(low), float(high), float(test.pvalue))


def paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> dict[int, float]:
    """Ours minus theirs by seed, of the seeds that have both."""
    return {seed: ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())}


def holm(probabilities: Sequence[float | None], level: float = 1 - CONFIDENCE) -> list[bool]:
    """Which tests still reject when the chance of any wrong rejection among them is held at `level` (Holm's step-down
    procedure). None never rejects and does not count."""
    ranked = sorted((p, index) for index, p in enumerate(probabilities) if p is not None)
    rejects = [False] * len(probabilities)
    for place, (p, index) in enumerate(ranked):
        if p > level / (len(ranked) - place):
            break
        rejects[index] = True
    return rejects


@dataclass(frozen=True)
class Claim:
    """unit: of the quantity; "ratio": `values` gives its logarithm. null: what the interval has to exclude."""

    text: str
    paper: str
    values: Callable[[Results], Values]
    unit: Literal["points", "nats", "ratio"] = "points"
    null: float = 0.0
    kind: Kind = "paper"
    note: str = ""
    figure: float | None = None
    """The paper's, where it compares with the quantity."""
    premise: Callable[[Results], Values] | None = None
    """What the claim takes for granted: it is not tested unless the interval of this lies above zero."""
    rests_on: str = ""
    """Text of another claim or check without which this one says little; the table says where that is not shown."""


@dataclass(frozen=True)
class Finding:
    """agree: seeds whose value is on the claimed side. survives: Holm's correction over all that `is_counted`."""

    claim: Claim
    values: Values
    estimate: Estimate | None
    agree: int
    verdict: str
    survives: bool = False


def difference(ours: tuple[str, str], theirs: tuple[str, str], metric: str = ACCURACY) -> Callable[[Results], Values]:
    """A metric of one arm at a stage minus that of another, by seed; accuracies in percentage points."""
    scale = 100.0 if metric.startswith(("greedy", "sampled")) else 1.0

    def values(results: Results) -> Values:
        pairs = paired(results.get(*ours, metric), results.get(*theirs, metric))
        return {seed: scale * value for seed, value in pairs.items()}

    return values


def lost_lead(results: Results) -> Values:
    """KD's lead over ReMiT after mid-training minus that after SFT."""
    return paired(
        difference(("kd", "mid"), ("remit", "mid"))(results), difference(("kd", "sft"), ("remit", "sft"))(results)
    )


def first_step(curve: Sequence[tuple[int, float]], target: float, rising: bool) -> float | None:
    """Where the lines between the points first reach `target`; the first point where that one does, None for never."""
    sign = 1 if rising else -1
    for index, (step, value) in enumerate(curve):
        if sign * (value - target) >= 0:
            if index == 0:
                return float(step)
            before, old = curve[index - 1]
            return before + (step - before) * (target - old) / (value - old)
    return None


def tokens_saved(metric: str, rising: bool) -> Callable[[Results], Values]:
    """ln(steps of NTP / steps of ReMiT) until the worse of the two ends is first reached; each step has as many tokens.

    With ReMiT ahead that is the value that NTP ends with, as in the paper; with ReMiT behind it is ReMiT's own, which
    NTP reaches sooner. Both arms do reach it, so that none is cut off, and the rule is the same for both: exchanging
    them changes the sign alone. A seed in which one has it before its first step is left out.
    """

    def values(results: Results) -> Values:
        ntp, remit = results.curve("ntp", "mid", metric), results.curve("remit", "mid", metric)
        found = {}
        for seed in sorted(ntp.keys() & remit.keys()):
            ends = ntp[seed][-1][1], remit[seed][-1][1]
            target = min(ends) if rising else max(ends)
            theirs, ours = (first_step(curve[seed], target, rising) for curve in (ntp, remit))
            if theirs and ours:
                found[seed] = math.log(theirs / ours)
        return found

    return values


def collapsed_norm(results: Results) -> Values:
    """ln(gradient norm of ReMiT / that without the clip), of their means over the last quarter of the steps.

    A norm without the clip below a thousandth of the other, also one of zero, counts as a thousandth.
    """

    def ends(arm: str) -> Values:
        means = {}
        for seed, curve in results.curve(arm, "mid", "grad_norm").items():
            last = [value for step, value in curve if step > 0.75 * curve[-1][0]]
            means[seed] = sum(last) / len(last)
        return means

    clipped, without = ends("remit"), ends("no-clip")
    return {
        seed: -math.log(max(without[seed] / clipped[seed], COLLAPSED))
        for seed in sorted(clipped.keys() & without.keys())
        if clipped[seed] > 0
    }


RL_HELPS = "RL itself raises accuracy: above the model before it"
LENGTH_HELPS = "The full reference is above the one of 10 % of the steps"
MID, SFT, DPO, RL = ("mid", "sft", "dpo", "rl")
CLAIMS: tuple[Claim, ...] = (
    Claim("ReMiT is above NTP after mid-training", "27.56 and 22.35; 42.97 and 41.13; 38.58 and 36.80",
          difference(("remit", MID), ("ntp", MID))),
    Claim("ReMiT is above SFT-guided", "27.56 and 23.72; 38.58 and 35.37", difference(("remit", MID), ("sft-guided", MID)),
          rests_on=RL_HELPS),
    Claim("ReMiT is above RHO-1", "27.56 and 23.10; 42.97 and 39.80; 38.58 and 32.24",
          difference(("remit", MID), ("rho1", MID))),
    Claim("ReMiT is above MiniPLM", "27.56 and 22.41; 42.97 and 40.65; 38.58 and 36.69",
          difference(("remit", MID), ("miniplm", MID))),
    Claim("KD is above ReMiT right after mid-training", "29.78 and 27.56; 38.67 and 38.58",
          difference(("kd", MID), ("remit", MID))),
    Claim("KD's lead over ReMiT is smaller after SFT", "from 2.22 to 0.54", lost_lead,
          premise=difference(("kd", MID), ("remit", MID)), note="assumes that KD has a lead"),
    Claim("ReMiT is above KD after DPO", "30.87 and 29.37", difference(("remit", DPO), ("kd", DPO))),
    Claim("ReMiT is above KD after RL", "32.92 and 31.00", difference(("remit", RL), ("kd", RL))),
    Claim("ReMiT is above NTP after SFT", "30.02 and 27.45", difference(("remit", SFT), ("ntp", SFT))),
    Claim("ReMiT is above NTP after DPO", "30.87 and 29.43", difference(("remit", DPO), ("ntp", DPO))),
    Claim("ReMiT is above NTP after RL", "32.92 and 29.57", difference(("remit", RL), ("ntp", RL))),
    Claim("ReMiT² is above ReMiT", "above (shown in a figure)", difference(("remit2", MID), ("remit", MID)),
          rests_on="ReMiT is above NTP after RL", note="assumes that its reference, the ReMiT arm after RL, is the better one"),
    Claim("A reference of 10 % of the RL steps is above NTP", "above (shown in a figure)",
          difference(("remit-rl10", MID), ("ntp", MID)), rests_on=LENGTH_HELPS,
          note="says something about RL only if that reference is weaker than the full one"),
    Claim("The full reference is above the one of 10 %", "above (shown in a figure)",
          difference(("remit", MID), ("remit-rl10", MID)), rests_on=LENGTH_HELPS),
    Claim("Without the clip the gradient norm collapses", "collapses (shown in a figure)", collapsed_norm, "ratio", math.log(2),
          note="taken to mean that in the last quarter of the steps the norm with the clip is more than twice the norm without; "
          "contradicted means that a ratio of 2 is excluded"),
    Claim("ReMiT needs fewer tokens to the accuracy of NTP", "about 6 times fewer", tokens_saved(ACCURACY, True), "ratio",
          figure=6.0, note="steps of NTP / steps of ReMiT until the lower of the two final accuracies is first reached; "
          "the ratio is above 1 where ReMiT ends ahead, so this is not a second, independent test"),
    Claim("KD is nearer to the reference than ReMiT", "KD low, ReMiT moderate",
          difference(("remit", MID), ("kd", MID), "kl_reference"), "nats",
          note="true by construction, since the loss of KD contains this divergence"),
    Claim("ReMiT is nearer to the reference than NTP", "KD low, ReMiT moderate",
          difference(("ntp", MID), ("remit", MID), "kl_reference"), "nats",
          note="the reference was trained from the very NTP model that it is compared with, which favours NTP"),
    Claim("A post-trained reference is better than a plain one: ReMiT is above NTP-guided", "not in the paper",
          difference(("remit", MID), ("ntp-guided", MID)), kind="control"),
    Claim("Any later model helps: NTP-guided is above NTP", "not in the paper",
          difference(("ntp-guided", MID), ("ntp", MID)), kind="control"),
    Claim("ReMiT needs fewer tokens to the loss of NTP on right solutions", "not in the paper",
          tokens_saved("loss_solutions", False), "ratio", kind="control", note="measured as for accuracy, above"),
    Claim("Mid-training raises accuracy: NTP above the pre-trained model", "",
          difference(("ntp", MID), ("base", "pretrained")), kind="check"),
    Claim("The reference is above the model that it was made from", "",
          difference(("ntp", RL), ("ntp", MID)), kind="check"),
    Claim(RL_HELPS, "", difference(("ntp", RL), ("ntp", DPO)), kind="check"),
    Claim(LENGTH_HELPS, "",
          difference(("ntp", RL), ("ntp-rl10", RL)), kind="check"),
)  # fmt: skip
OF_SWITCH: tuple[Claim, ...] = (
    Claim("Switch is above NTP after mid-training", "44.7 and 26.1 (reasoning)",
          difference(("switch", MID), ("ntp", MID)), kind="switch"),
    Claim("Switch is above KD, forward KL at every token", "not compared at equal settings",
          difference(("switch", MID), ("kd", MID)), kind="switch"),
    Claim("Switch is above reverse KL at every token", "not compared at equal settings",
          difference(("switch", MID), ("rkl", MID)), kind="switch"),
    Claim("Switch is above ReMiT", "not in the paper", difference(("switch", MID), ("remit", MID)), kind="switch"),
    Claim("Switch has a lower loss on right solutions than NTP", "not in the paper",
          difference(("ntp", MID), ("switch", MID), "loss_solutions"), "nats", kind="switch"),
    Claim("Switch has a lower loss on right solutions than ReMiT", "not in the paper",
          difference(("remit", MID), ("switch", MID), "loss_solutions"), "nats", kind="switch"),
    Claim("Switch has a higher loss than NTP on notes, which mid-training all but lacks", "29.3 and 30.3 (recall of facts)",
          difference(("switch", MID), ("ntp", MID), "loss_notes"), "nats", kind="switch"),
)  # fmt: skip
"""Judged where the arm was measured: not every recipe has it."""


def judge(claim: Claim, results: Results) -> Finding:
    """The finding of one claim, before any correction for how many there are."""
    values = claim.values(results)
    if not values:
        return Finding(claim, {}, None, 0, MISSING)
    numbers = list(values.values())
    found = estimate(numbers, claim.null)
    agree = sum(value > claim.null for value in numbers)
    verdict = ONE_SEED if len(numbers) == 1 else UNDECIDED
    if found.low is not None and found.high is not None:
        if found.low > claim.null:
            verdict = REPRODUCED
        elif found.high < claim.null:
            verdict = CONTRADICTED
    if claim.premise is not None and len(numbers) > 1:
        premise = list(claim.premise(results).values())
        low = estimate(premise).low if premise else None
        if low is None or low <= 0:
            verdict = PREMISE
    return Finding(claim, values, found, agree, verdict)


def is_counted(finding: Finding) -> bool:
    """Whether Holm's correction counts the finding: it was tested, it is a claim and not a check of the set-up, and its
    null is "no effect" (a null of another size is decided where there is none)."""
    is_tested = finding.estimate is not None and finding.estimate.p is not None and finding.verdict != PREMISE
    return is_tested and finding.claim.kind != "check" and finding.claim.null == 0


def judge_all(results: Results, claims: Sequence[Claim] = CLAIMS) -> list[Finding]:
    if "switch" in results.arms("mid") and claims is CLAIMS:
        claims = (*CLAIMS, *OF_SWITCH)
    findings = [judge(claim, results) for claim in claims]
    counted = [finding.estimate.p if finding.estimate and is_counted(finding) else None for finding in findings]
    return [replace(finding, survives=survives) for finding, survives in zip(findings, holm(counted), strict=True)]
