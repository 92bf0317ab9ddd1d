"""The report's plots: dots by arm, and lines over steps or stages. Each mean has its 95 % interval over the seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from benchmarks.lab.claims import estimate, paired
from benchmarks.lab.results import Results
from benchmarks.lab.tables import STAGE_NAMES, STAGES, arm_name, scaled

# told apart also by readers who see few colours, on white and on black; arms of one colour have different dashes
BLUE, ORANGE, GREEN, PINK, VIOLET, OLIVE, RED, GREY = (
    "#2a7fc9", "#e07b1a", "#1f9e77", "#c65aa5", "#8c6ad6", "#a08a1c", "#d84b4b", "#5f7a8a",
)  # fmt: skip
LINES = {
    "base": (GREY, "solid"), "ntp": (BLUE, "solid"), "remit": (ORANGE, "solid"), "remit2": (RED, "solid"),
    "ntp-guided": (GREEN, "dashdot"), "sft-guided": (OLIVE, "solid"), "rho1": (PINK, "solid"), "miniplm": (VIOLET, "solid"),
    "kd": (PINK, "dash"), "no-clip": (VIOLET, "dot"), "remit-rl10": (OLIVE, "dot"), "ntp-rl10": (GREY, "dot"),
    "rkl": (GREEN, "dot"), "switch": (RED, "dash"),
}  # fmt: skip
GRID = "rgba(128, 128, 128, 0.3)"  # on white and on black


@dataclass(frozen=True)
class Plot:
    title: str
    note: str
    figure: go.Figure


def make_plots(results: Results) -> list[Plot]:
    """In the order of the page; plots without values are left out."""
    arms = [arm for arm in LINES if arm in results.arms("mid")]
    trained = [arm for arm in arms if results.get(arm, "rl", "greedy_all")]
    greedy = "Greedy, both levels"

    def means(of: Sequence[str], metric: str) -> dict[str, list[float]]:
        stages = {"base": "pretrained"}
        return {arm_name(arm): scaled(metric, results.get(arm, stages.get(arm, "mid"), metric)) for arm in of}

    def gains(metric: str) -> dict[str, list[float]]:
        ntp = results.get("ntp", "mid", metric)
        others = [arm for arm in arms if arm != "ntp"]
        return {arm_name(arm): scaled(metric, paired(results.get(arm, "mid", metric), ntp)) for arm in others}

    def through_stages(arm: str) -> dict[str, list[float]]:
        names = {STAGE_NAMES[stage]: results.get(arm, stage, "greedy_all") for stage in STAGES[1:]}
        return {name: scaled("greedy_all", values) for name, values in names.items()}

    def curves(of: Sequence[str], stage: str, metric: str) -> dict[str, dict[int, list[float]]]:
        return {arm: _at_all_seeds(results, arm, stage, metric) for arm in of}

    points, percent, nats = "percentage points", "% of the problems", "nats per token"
    plots = [
        Plot("Difference in accuracy from NTP", f"After mid-training. {greedy}, on the same seeds.",
             dots({"": (ORANGE, gains("greedy_all"))}, points, zero=True)),
        Plot("Accuracy after mid-training", f"{greedy}.", dots({"": (BLUE, means(arms, "greedy_all"))}, percent)),
        Plot("Through post-training", f"{greedy}.",
             lines({arm: through_stages(arm) for arm in trained}, percent, "", bands=False)),
        Plot("Accuracy during mid-training", f"{greedy}, on fewer problems than after it.",
             lines(curves(arms, "mid", "greedy_all"), percent)),
        Plot("Loss on held-out problems during mid-training", "", lines(curves(arms, "mid", "loss_heldout"), nats)),
        Plot("Gradient norm", "", lines(curves(("ntp", "remit", "no-clip"), "mid", "grad_norm"), "before --max-grad-norm")),
        Plot("Reward during RL", "Of sampled completions of the training prompts.",
             lines(curves(("ntp", "remit", "kd", "ntp-rl10"), "rl", "train_reward"), "share of the completions")),
        Plot("KL to the reference", "After mid-training, on right solutions.",
             dots({"": (BLUE, means(("base", *arms), "kl_reference"))}, nats)),
        Plot("Difference in the loss of general text from NTP", "After mid-training; above zero is worse.",
             dots({"stories": (ORANGE, gains("loss_stories")), "notes": (BLUE, gains("loss_notes"))}, nats, zero=True)),
    ]  # fmt: skip
    return [plot for plot in plots if plot.figure.data]


def _at_all_seeds(results: Results, arm: str, stage: str, metric: str) -> dict[int, list[float]]:
    """Values of the seeds by step, at the steps that all seeds of the arm have."""
    curves = [dict(curve) for curve in results.curve(arm, stage, metric).values()]
    steps = sorted(set.intersection(*(set(curve) for curve in curves))) if curves else []
    return {step: scaled(metric, {index: curve[step] for index, curve in enumerate(curves)}) for step in steps}


def dots(series: Mapping[str, tuple[str, Mapping[str, list[float]]]], unit: str, zero: bool = False) -> go.Figure:
    """Values by name, the names below each other. series: label to (colour, {name: values of the seeds})."""
    figure = go.Figure()
    series = {label: (color, {name: v for name, v in groups.items() if v}) for label, (color, groups) in series.items()}
    series = {label: (color, groups) for label, (color, groups) in series.items() if groups}
    names = list(dict.fromkeys(name for _, groups in series.values() for name in groups))
    for place, (label, (color, groups)) in enumerate(series.items()):
        rows = [names.index(name) + 0.25 * (place - (len(series) - 1) / 2) for name in groups]
        symbol = ("circle", "diamond")[place]
        figure.add_scatter(
            x=[value for values in groups.values() for value in values],
            y=[row for row, values in zip(rows, groups.values()) for _ in values],
            mode="markers", marker={"color": color, "size": 5, "opacity": 0.45, "symbol": symbol}, hoverinfo="skip",
            showlegend=False, legendgroup=label,
        )  # fmt: skip
        mean, interval, hover = _means(groups)
        figure.add_scatter(
            x=mean, y=rows, name=label, legendgroup=label, mode="markers", marker={"color": color, "size": 10, "symbol": symbol},
            error_x={**interval, "color": color}, text=hover, hovertemplate="%{text}<extra></extra>", showlegend=bool(label),
        )  # fmt: skip
    _style(figure, 90 + 26 * len(names) + (30 if len(series) > 1 else 0))
    figure.update_xaxes(title_text=unit)
    if zero:  # a line there, within what is shown
        ends = [0, *(end for trace in figure.data for end in _ends(trace))]
        margin = 0.05 * (max(ends) - min(ends))
        figure.update_xaxes(
            zeroline=True, zerolinecolor=GREY, zerolinewidth=2, range=[min(ends) - margin, max(ends) + margin]
        )
    figure.update_yaxes(
        tickvals=list(range(len(names))), ticktext=names, range=[len(names) - 0.4, -0.6], showgrid=False
    )
    return figure


def _ends(trace: go.Scatter) -> list[float]:
    """Where a trace of `dots` ends on both sides, its intervals included."""
    up, down = trace.error_x.array or [0] * len(trace.x), trace.error_x.arrayminus or [0] * len(trace.x)
    return [max(map(sum, zip(trace.x, up))), min(middle - less for middle, less in zip(trace.x, down))]


def lines(
    curves: Mapping[str, Mapping[int | str, list[float]]], unit: str, along: str = "step", bands: bool = True
) -> go.Figure:
    """Values of the seeds along steps or names, by arm. bands: intervals as bands, else as bars."""
    figure = go.Figure()
    for arm, points in curves.items():
        points = {at: values for at, values in points.items() if values}
        if not points:
            continue
        color, dash = LINES[arm]
        label, (mean, interval, hover) = arm_name(arm), _means(points)
        at = list(points)
        if bands and all(interval["array"]):
            high = [middle + up for middle, up in zip(mean, interval["array"])]
            low = [middle - down for middle, down in zip(mean, interval["arrayminus"])]
            figure.add_scatter(
                x=at + at[::-1], y=high + low[::-1], mode="none", fill="toself", fillcolor=color, opacity=0.15,
                hoverinfo="skip", showlegend=False, legendgroup=arm,
            )  # fmt: skip
        figure.add_scatter(
            x=at, y=mean, name=label, legendgroup=arm, mode="lines+markers", line={"color": color, "dash": dash, "width": 1.8},
            marker={"size": 4 if bands else 8}, error_y=None if bands else {**interval, "color": color}, text=hover,
            hovertemplate=f"{label}, %{{text}}<extra></extra>", showlegend=True,
        )  # fmt: skip
    _style(figure, 380)
    figure.update_xaxes(title_text=along)
    figure.update_yaxes(title_text=unit)
    return figure


def _means(groups: Mapping[int | str, list[float]]) -> tuple[list[float], dict, list[str]]:
    """Means of the groups; their intervals as plotly's error bars, of no length where there is none; texts to show."""
    found = {at: estimate(values) for at, values in groups.items()}
    interval = {
        "type": "data", "symmetric": False, "thickness": 1.4, "width": 3,
        "array": [0 if one.high is None else one.high - one.mean for one in found.values()],
        "arrayminus": [0 if one.low is None else one.mean - one.low for one in found.values()],
    }  # fmt: skip
    texts = [
        f"{at}: {one.mean:.4g} ({'no interval' if one.low is None else f'{one.low:.4g} to {one.high:.4g}'}), "
        f"{len(groups[at])} seed{'s' if len(groups[at]) > 1 else ''}"
        for at, one in found.items()
    ]
    return [one.mean for one in found.values()], interval, texts


def _style(figure: go.Figure, height: int) -> None:
    figure.update_layout(
        template="none", height=height, margin={"l": 10, "r": 10, "t": 10, "b": 10}, paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)", font={"family": "system-ui, sans-serif", "size": 12}, hovermode="closest",
        hoverlabel={"bgcolor": "#ffffff"}, dragmode=False,
        legend={"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom", "bgcolor": "rgba(0,0,0,0)"},
    )  # fmt: skip
    axis = {
        "automargin": True,
        "zeroline": False,
        "gridcolor": GRID,
        "linecolor": GRID,
        "title_standoff": 6,
        "exponentformat": "power",
    }
    figure.update_xaxes(axis)
    figure.update_yaxes(axis)
