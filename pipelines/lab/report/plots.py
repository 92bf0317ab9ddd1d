"""The report's plots as numbers: dots by arm and lines over steps or stages, each mean with its interval over seeds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from pipelines.lab.report.data import Results
from pipelines.lab.report.statistics import estimate, paired
from pipelines.lab.report.tables import STAGE_NAMES, STAGES, arm_name, scaled

COLORS = {
    "base": 7, "ntp": 0, "remit": 1, "remit2": 6, "ntp-guided": 2, "sft-guided": 5, "rho1": 3, "miniplm": 4, "kd": 3,
    "no-clip": 4, "remit-rl10": 5, "ntp-rl10": 7,
}  # fmt: skip
"""Number in the palette of the page's script; arms that share a plot of lines have different ones."""
DASHES = {"kd": "dash", "no-clip": "dot", "ntp-guided": "dashdot", "remit-rl10": "dot", "ntp-rl10": "dot"}


@dataclass
class Series:
    """at: names or steps; low, high: ends of the interval, null without one; seeds: the values behind each mean."""

    label: str
    color: int
    dash: str = "solid"
    at: list[str | int] = field(default_factory=list)
    mean: list[float] = field(default_factory=list)
    low: list[float | None] = field(default_factory=list)
    high: list[float | None] = field(default_factory=list)
    seeds: list[list[float]] = field(default_factory=list)

    def add(self, at: str | int, values: Sequence[float]) -> None:
        if not values:
            return
        found = estimate(values)
        self.at.append(at)
        self.mean.append(found.mean)
        self.low.append(found.low)
        self.high.append(found.high)
        self.seeds.append(list(values))


@dataclass(frozen=True)
class Plot:
    """kind: dots stand beside each other by name, lines go over steps, stages over what was done last. zero: a line."""

    title: str
    unit: str
    kind: Literal["dots", "lines", "stages"]
    series: list[Series]
    note: str = ""
    zero: bool = False


def make_plots(results: Results) -> list[Plot]:
    """In the order of the page; plots without values are left out."""
    arms = [arm for arm in COLORS if arm in results.arms("mid")]
    trained = [arm for arm in arms if results.get(arm, "rl", "greedy_all")]
    plots = [
        Plot(
            "Difference in accuracy from NTP", "percentage points", "dots",
            [_differences(results, arms, "greedy_all", "", 1)], zero=True,
            note="After mid-training, greedy, both levels; on the same seeds.",
        ),
        Plot("Accuracy after mid-training", "% of the problems", "dots", [_dots(results, arms, "greedy_all")],
             note="Greedy, both levels."),
        Plot("Through post-training", "% of the problems", "stages",
             [_stages(results, arm, "greedy_all") for arm in trained], note="Greedy, both levels."),
        Plot("Accuracy during mid-training", "% of the problems", "lines", _lines(results, arms, "mid", "greedy_all"),
             note="Greedy, both levels, on fewer problems than after it."),
        Plot("Loss on held-out problems during mid-training", "nats per token", "lines",
             _lines(results, arms, "mid", "loss_heldout")),
        Plot("Gradient norm", "before --max-grad-norm", "lines",
             _lines(results, [arm for arm in arms if arm in ("ntp", "remit", "no-clip")], "mid", "grad_norm")),
        Plot("Reward during RL", "share of the completions", "lines",
             _lines(results, ["ntp", "remit", "kd", "ntp-rl10"], "rl", "train_reward"),
             note="Of sampled completions to the training prompts."),
        Plot("KL to the reference", "nats per token", "dots", [_dots(results, ["base", *arms], "kl_reference")],
             note="After mid-training, on right solutions."),
        Plot(
            "Difference in the loss of general text from NTP", "nats per token", "dots",
            [_differences(results, arms, "loss_stories", "stories", 1), _differences(results, arms, "loss_notes", "notes", 0)],
            zero=True, note="After mid-training; above zero is worse.",
        ),
    ]  # fmt: skip
    shown = [Plot(**{**vars(plot), "series": [series for series in plot.series if series.at]}) for plot in plots]
    return [plot for plot in shown if plot.series]


def _dots(results: Results, arms: Iterable[str], metric: str) -> Series:
    series = Series("", 0)
    for arm in arms:
        stage = "pretrained" if arm == "base" else "mid"
        series.add(arm_name(arm), scaled(metric, results.get(arm, stage, metric)))
    return series


def _differences(results: Results, arms: Iterable[str], metric: str, label: str, color: int) -> Series:
    series = Series(label, color)
    for arm in arms:
        if arm != "ntp":
            values = paired(results.get(arm, "mid", metric), results.get("ntp", "mid", metric))
            series.add(arm_name(arm), scaled(metric, values))
    return series


def _stages(results: Results, arm: str, metric: str) -> Series:
    series = Series(arm_name(arm), COLORS.get(arm, 7), DASHES.get(arm, "solid"))
    for stage in STAGES[1:]:
        series.add(STAGE_NAMES[stage], scaled(metric, results.get(arm, stage, metric)))
    return series


def _lines(results: Results, arms: Iterable[str], stage: str, metric: str) -> list[Series]:
    """Curves of the steps that all seeds of an arm have."""
    lines = []
    for arm in arms:
        curves = [dict(curve) for curve in results.curve(arm, stage, metric).values()]
        series = Series(arm_name(arm), COLORS.get(arm, 7), DASHES.get(arm, "solid"))
        for step in sorted(set.intersection(*(set(curve) for curve in curves))) if curves else ():
            series.add(step, scaled(metric, {index: curve[step] for index, curve in enumerate(curves)}))
        lines.append(series)
    return lines
