"""What RMT claims, as quantities that are measured here. The rule of a verdict is that of benchmarks.lab.claims: a paired
95 % interval over seeds, fixed before any run. The next token of RMT and RPT is the one after their thought."""

import math
from collections.abc import Callable

from benchmarks.lab.claims import Claim, Values, difference, paired
from benchmarks.lab.results import Results
from benchmarks.rmt_lab.graph import SLOW

MID = "mid"
THINKS = "A thought helps: RMT with its thought above RMT without"


def points(ours: tuple[str, str], theirs: tuple[str, str], stage: str = MID) -> Callable[[Results], Values]:
    """One arm's metric minus another's, both shares, in percentage points by seed."""

    def values(results: Results) -> Values:
        (arm, metric), (other, of_other) = ours, theirs
        pairs = paired(results.get(arm, stage, metric), results.get(other, _stage(other, stage), of_other))
        return {seed: 100 * value for seed, value in pairs.items()}

    return values


def _stage(arm: str, stage: str) -> str:
    return "pretrained" if arm == "base" else stage


def shorter(results: Results) -> Values:
    """ln(tokens of thought without budget / with it), of the means over the last quarter of the steps."""
    with_budget, without = (last_quarter(results, arm) for arm in ("rmt", "no-budget"))
    return {
        seed: math.log(without[seed] / with_budget[seed])
        for seed in sorted(with_budget.keys() & without.keys())
        if with_budget[seed] > 0 and without[seed] > 0
    }


def last_quarter(results: Results, arm: str, metric: str = "thought_tokens") -> Values:
    """Mean by seed over the last quarter of the reinforcement steps."""
    means = {}
    for seed, curve in results.curve(arm, MID, metric).items():
        last = [value for step, value in curve if step > 0.75 * curve[-1][0]]
        means[seed] = sum(last) / len(last)
    return means


def distance_from_budget(arm: str) -> Callable[[Results], Values]:
    """-|ln(tokens of thought / budget)|, the mean over the points of the curve: 0 where they are equal."""

    def values(results: Results) -> Values:
        found = {}
        for seed, curve in results.curve(arm, MID, "thought_tokens").items():
            budgets = dict(results.curve(arm, MID, "budget").get(seed, []))
            away = [abs(math.log(max(tokens, 1e-9) / budgets[step])) for step, tokens in curve if step in budgets]
            if away:
                found[seed] = -sum(away) / len(away)
        return found

    return values


CLAIMS: tuple[Claim, ...] = (
    Claim("RMT, with its thought, is above NTP at equal compute in next-token accuracy", "46.87 and 31.13; 59.12 and 35.84",
          points(("rmt", "thought_all"), ("ntp", "bare_all")), note="the paper's models have equal data, not equal compute",
          rests_on=THINKS),
    Claim("RMT, with its thought, is above NTP at equal steps", "the same",
          points(("rmt", "thought_all"), ("ntp-steps", "bare_all")), rests_on=THINKS),
    Claim("RMT is above RPT, both with their thoughts", "46.87 and 35.85", points(("rmt", "thought_all"), ("rpt", "thought_all")),
          note="RPT's hit is a boxed text that is a true prefix, RMT's a token"),
    Claim("RMT is above RMT without budget", "46.87 and 40.24", points(("rmt", "thought_all"), ("no-budget", "thought_all"))),
    Claim("RMT is above RMT without curriculum", "46.87 and 43.22",
          points(("rmt", "thought_all"), ("no-curriculum", "thought_all"))),
    Claim("RMT is above RMT without NTP", "46.87 and 33.84", points(("rmt", "thought_all"), ("no-ntp", "thought_all"))),
    Claim("The budget makes thoughts shorter", "188 tokens; RPT 872", shorter, "ratio",
          note="tokens of thought without budget / with it, last quarter of the steps; the paper's figures are RMT and RPT"),
    Claim("RMT solves more problems afterwards than RPT", "54.67 and 48.50, after GRPO",
          points(("rmt", "greedy_all"), ("rpt", "greedy_all")), note="here right after mid-training, without a thought"),
    Claim("RMT without a thought is above NTP at equal compute in next-token accuracy", "not in the paper",
          points(("rmt", "bare_all"), ("ntp", "bare_all")), kind="control",
          note="arXiv 2608.23256 reports the opposite for RPT and mixed SFT"),
    Claim("RMT solves more problems afterwards than NTP at equal compute", "not in the paper",
          points(("rmt", "greedy_all"), ("ntp", "greedy_all")), kind="control"),
    Claim("RMT has a lower loss on right solutions than NTP at equal compute", "not in the paper",
          difference(("ntp", MID), ("rmt", MID), "loss_solutions"), "nats", kind="control"),
    Claim("RMT, with its thought, is above ReMiT at equal compute", "not in the paper",
          points(("rmt", "thought_all"), ("remit", "bare_all")), kind="control", rests_on=THINKS),
    Claim("ReMiT is above NTP, both at equal compute", "not in the paper",
          points(("remit", "bare_all"), ("ntp", "bare_all")), kind="control"),
    Claim("NTP at equal compute is above the pre-trained model in next-token accuracy", "",
          points(("ntp", "bare_all"), ("base", "bare_all")), kind="check"),
    Claim(THINKS, "", points(("rmt", "thought_all"), ("rmt", "bare_all")), kind="check"),
    Claim("The length of RMT's thoughts follows the budget", "", distance_from_budget("rmt"), "ratio", math.log(0.8),
          kind="check", note="mean ratio of the two over the steps, the larger below; shown where it is within a fifth"),
    Claim("The same, where the budget shrinks over three times as many steps", "", distance_from_budget(SLOW), "ratio",
          math.log(0.8), kind="check"),
    Claim("The base solves some problems after NTP at equal compute", "", points(("ntp", "greedy_all"), ("base", "greedy_all")),
          kind="check"),
)  # fmt: skip
"""`RMT` is the rmt arm. The paper's pairs are for R1-Distill-Qwen-14B; Qwen3-14B."""
