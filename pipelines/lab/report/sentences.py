"""What leads and what ends the report, in sentences that say no more than its tables."""

from collections.abc import Sequence
from statistics import stdev

from pipelines.lab.report.claims import (
    ACCURACY,
    CONTRADICTED,
    MISSING,
    ONE_SEED,
    PREMISE,
    REPRODUCED,
    UNDECIDED,
    Finding,
    difference,
    is_counted,
)  # fmt: skip
from pipelines.lab.report.data import Results
from pipelines.lab.report.statistics import detectable, estimate, power
from pipelines.lab.report.tables import arm_name, found_text

GAIN = "ReMiT is above NTP after mid-training"
CONTROL = "A post-trained reference is better than a plain one: ReMiT is above NTP-guided"
SFT_GUIDED = "ReMiT is above SFT-guided"
PAPER_GAINS = (5.2, 1.8)
"""Points of ReMiT above NTP after mid-training in the paper, the largest and the smallest of three models."""


def summary(results: Results, findings: Sequence[Finding]) -> list[str]:
    """The sentences that lead the report."""
    paper = [finding for finding in findings if finding.claim.kind == "paper"]
    num = len(results.seeds)
    lines = [
        f"{num} seed{'s' if num > 1 else ''} at size {results.size}. Of {len(paper)} claims of the paper as they are put "
        f"here, {_count(paper, REPRODUCED)} are reproduced, {_count(paper, CONTRADICTED)} contradicted, "
        f"{_count(paper, UNDECIDED) + _count(paper, ONE_SEED)} not decided, {_count(paper, MISSING)} not measured; "
        f"{_count(paper, PREMISE)} not tested, since what they suppose is not shown."
    ]
    lines += [named_sentence(paper, verdict) for verdict in (REPRODUCED, CONTRADICTED)]
    if results.size != "full":
        lines.append(
            "This size shows that the parts work together. Its models learn next to nothing: read no number of it."
        )
    if num == 1:
        lines.append("One seed has no interval: its differences may be chance, and nothing is claimed from them.")
    else:
        lines += [checks_sentence(findings), chance_sentence(findings), power_sentence(results)]
    if len(results.code) > 1:
        lines.append("Not all stages ran with the same code: see the set-up.")
    lines += [control_sentence(findings), sft_sentence(findings), others_sentence(results)]
    return [line for line in lines if line]


def _count(findings: Sequence[Finding], verdict: str) -> int:
    return sum(finding.verdict == verdict for finding in findings)


def _verdict(findings: Sequence[Finding], text: str) -> str:
    return next((finding.verdict for finding in findings if finding.claim.text == text), MISSING)


def named_sentence(findings: Sequence[Finding], verdict: str) -> str:
    """Which claims have the verdict, with what is to be said of them."""
    claims = [finding.claim for finding in findings if finding.verdict == verdict]
    names = "; ".join(f"{claim.text} ({claim.note})" if claim.note else claim.text for claim in claims)
    return f"{verdict.capitalize()}: {names}." if claims else ""


def checks_sentence(findings: Sequence[Finding]) -> str:
    """The checks of the experiment that are not shown to hold."""
    checks = [finding for finding in findings if finding.claim.kind == "check"]
    failed = [finding for finding in checks if finding.verdict != REPRODUCED]
    if not failed:
        return ""
    shown = "; ".join(f"{finding.claim.text}: {found_text(finding)}" for finding in failed)
    return (
        f"{len(failed)} of {len(checks)} checks of the experiment itself are not shown to hold ({shown}). What rests on "
        "them has not been put to a test here."
    )


def chance_sentence(findings: Sequence[Finding]) -> str:
    tested = [finding for finding in findings if is_counted(finding)]
    kept = sum(finding.survives for finding in tested)
    return (
        f"Each verdict stands alone: of {len(tested)} tests of no effect at 95 % about {0.05 * len(tested):.1f} would be "
        f"decided by chance if nothing had any. When all are taken together (Holm's correction), {kept or 'none'} of them "
        f"{'stand' if kept > 1 else 'stands'}{', marked with *' if kept else ''}."
    )


def power_sentence(results: Results) -> str:
    """How large a difference these seeds would have shown; rough, since their spread is itself an estimate."""
    values = list(difference(("remit", "mid"), ("ntp", "mid"))(results).values())
    if len(values) < 2 or estimate(values).low is None:
        return ""
    num, spread = len(values), stdev(values)
    large, small = (power(gain, spread, num) for gain in PAPER_GAINS)
    return (
        f"ReMiT minus NTP varies between seeds with a standard deviation of {spread:.1f} points. {num} such seeds would show "
        f"a true difference of {PAPER_GAINS[0]} points, the paper's largest, with a probability of {100 * large:.0f} %, one of "
        f"{PAPER_GAINS[1]}, its smallest, with {100 * small:.0f} %; it takes {detectable(spread, num):.1f} points for 80 %."
    )


def control_sentence(findings: Sequence[Finding]) -> str:
    """What ReMiT's comparison with NTP and with the control say together."""
    gain, control = _verdict(findings, GAIN), _verdict(findings, CONTROL)
    if MISSING in (gain, control):
        return "The control NTP-guided was not compared: whether a gain is due to post-training cannot be told."
    if control == REPRODUCED and gain == REPRODUCED:
        return "ReMiT is above the control NTP-guided: a plain later model as the reference does not explain all of it."
    if control == REPRODUCED:
        below = "below NTP" if gain == CONTRADICTED else "not shown to be above NTP"
        return (
            f"ReMiT is above the control NTP-guided, but {below}: post-training makes the better reference here, and no "
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


def sft_sentence(findings: Sequence[Finding]) -> str:
    """What is left for DPO and RL, after SFT, in making the reference."""
    verdict = _verdict(findings, SFT_GUIDED)
    if verdict == REPRODUCED:
        return "ReMiT is above SFT-guided: DPO and RL add to what a reference from SFT gives."
    if verdict == CONTRADICTED:
        return "ReMiT is below SFT-guided: DPO and RL take from what a reference from SFT gives."
    return "" if verdict == MISSING else "ReMiT is not shown to differ from SFT-guided: what DPO and RL add is open."


def others_sentence(results: Results) -> str:
    """Arms beside NTP by an interval that no claim is about."""
    shown = []
    for arm in results.arms("mid"):
        values = difference((arm, "mid"), ("ntp", "mid"), ACCURACY)(results)
        if arm in ("ntp", "remit", "ntp-guided", "remit-rl10") or not values:
            continue
        found = estimate(list(values.values()))
        if found.low is not None and found.high is not None and found.low * found.high > 0:
            shown.append(f"{arm_name(arm)} {found.mean:+.1f} ({found.low:+.1f} to {found.high:+.1f})")
    if not shown:
        return ""
    return (
        f"Not among the claims, and not corrected for how many were looked at: beside NTP after mid-training {'are' if len(shown) > 1 else 'is'} "
        f"{', '.join(shown)} points."
    )


LIMITS = (
    "These are models of less than a million parameters on one family of generated problems; the paper's have one to three "
    "billion and ten tasks. What holds here need not hold there, and the other way round.",
    "A seed changes everything at once: data, initial weights, order, sampling. The interval is over such repetitions of "
    "the whole experiment. It supposes about normal differences, which a handful of seeds cannot show.",
    "The reference of ReMiT, KD and of the KL descends from the NTP arm of the same seed, by SFT, DPO and RL. What the two have in "
    "common by chance makes NTP look nearer to it.",
    "The problems are few in kind: the easy ones have about 400 different held-out computations, told in different words.",
    "An effect smaller than half the interval cannot be seen here. \"Not decided\" is not \"no effect\".",
    "Tokens until an accuracy are read from curves of eight points, in which accuracy rises late: a sixfold saving could hardly "
    "come out. The saved time of the paper is not tested: references are scored before training here.",
    "All arms share one learning rate, one number of steps and one corpus (MiniPLM trains on a part of it). The learning rate was the "
    "best of a sweep over NTP, which favours NTP; an arm that would do better with settings of its own is not done justice.",
)  # fmt: skip
