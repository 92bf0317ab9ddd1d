"""The figures of remit report, drawn by plotly: panels below each other over one axis of steps or tokens.

Colours of text and lines of the grid come from the page's style, which follows the light or dark scheme of the system.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipelines.report.curves import Points, Run
from pipelines.report.runs import finite

# told apart also by readers who see few colours, on white and on black; those of runs are not those of sources
RUN_COLORS = ("#2a7fc9", "#e07b1a", "#1f9e77", "#c65aa5", "#8c6ad6", "#a08a1c", "#d84b4b", "#5f7a8a")
SOURCE_COLORS = ("#0aa3b5", "#9a5f3c", "#7c9a00", "#e0559b", "#4d5bd6", "#c9a100", "#3f8f3a", "#8f8f8f")
DASHES = ("solid", "dot", "dash", "dashdot")
HEAT_COLORS = [[0, "rgba(201,160,220,0)"], [0.2, "rgb(201,160,220)"], [1, "rgb(91,15,134)"]]  # rare weights show, too
PANEL, GAP = 190, 60  # pixels: height of a panel, and between two
WEIGHT_STEP = 0.05  # of the bins


@dataclass(frozen=True)
class Panel:
    """Curves that runs share: figures and dashes in one panel. idle: the value that says nothing: where all runs have
    nothing else, the panel is left out (weights under plain next-token prediction are 1). format: as d3 writes it."""

    title: str
    unit: str
    figures: tuple[str, ...]
    format: str = ".4g"
    idle: float | None = None
    scale: float = 1.0
    note: str = ""


HELD_OUT = Panel("Held-out loss", "nats per token", ("held_out",))
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Weights": (
        Panel("Mean weight", "weight", ("weight_mean",), idle=1.0),
        Panel("Standard deviation of the weights", "weight", ("weight_std",), idle=0.0),
        Panel(
            "Clipped weights", "share of tokens", ("clipped_low", "clipped_high"), ".2%", 0.0,
            note="tokens whose weight the clip raised to its lower bound (solid) or cut to its upper one (dotted).",
        ),
        Panel(
            "Effective tokens", "share of tokens", ("effective_share",), ".2%", 1.0,
            note="as many equally weighted tokens would give a gradient of the same variance.",
        ),
        Panel("Mean excess loss", "nats", ("delta_mean",), note="loss of the base minus that of the reference."),
    ),
    "Losses": (
        HELD_OUT,
        Panel("Next-token loss", "nats per token", ("ntp_loss",), note="training batches, every token counted once."),
        Panel(
            "Loss of the objective", "nats per token", ("loss",),
            note="what was minimised: with weights, the weighted loss. Runs of different objectives do not compare here.",
        ),
        Panel("Distillation loss", "nats per token", ("kd_loss",), note="mean KL divergence from the reference."),
        Panel("Probability outside of the stored top k", "share", ("missing_mass",), ".2%"),
        Panel("Balancing loss of the router", "loss", ("router_aux_loss",)),
    ),
    "Optimizer and machine": (
        Panel("Gradient norm", "before clipping", ("grad_norm",)),
        Panel("Learning rate", "per step", ("lr",), ".3e"),
        Panel("Throughput", "tokens/s", ("tokens_per_second",), ",.0f"),
        Panel("Waiting for data", "share of the step", ("data_wait_share",), ".3%"),
        Panel("Peak memory", "GiB", ("peak_memory_bytes",), scale=1 / 2**30),
    ),
}  # fmt: skip


class Stack:
    """A figure of panels, each (title, unit, d3 format), with a button for the horizontal axis."""

    def __init__(self, panels: Sequence[tuple[str, str, str]], num_steps: int, legend: Sequence[str] = ()) -> None:
        """num_steps: the last step of the axis; legend: the names that it has, none for no legend."""
        plots = len(panels) * PANEL + (len(panels) - 1) * GAP
        per_row = max(1, 330 // (7 * max(map(len, legend), default=1) + 45))  # in a window of 400 pixels
        self.height = plots + 105 + 20 * math.ceil(len(legend) / per_row)
        self.x: list[tuple[Any, Any]] = []
        self.dtick = 1 if num_steps <= 10 else None  # whole steps
        self.figure = make_subplots(
            len(panels), 1, shared_xaxes=True, vertical_spacing=GAP / plots, subplot_titles=[p[0] for p in panels]
        )
        self.figure.update_annotations(x=0, xanchor="left", font_size=13)  # the titles
        self.figure.update_layout(
            template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", hovermode="x unified",
            font={"size": 12, "family": "system-ui, sans-serif"}, margin={"l": 10, "r": 10, "t": 55, "b": 40},
            legend={"orientation": "h", "x": 0, "yref": "container", "y": 1, "yanchor": "top"}, showlegend=bool(legend),
        )  # fmt: skip
        self.figure.update_xaxes(automargin=True, showticklabels=True, **self._axis("step"))
        self.figure.update_xaxes(title={"text": "step", "standoff": 6}, row=len(panels))
        for row, (_, unit, format_) in enumerate(panels, start=1):
            is_share, is_count = "%" in format_, "," in format_
            self.figure.update_yaxes(
                row=row, title={"text": unit, "standoff": 4}, automargin=True, exponentformat="power",
                tickformat=".2~%" if is_share else "~s" if is_count else None,
                # else a constant gets a whole unit on both sides
                **({"minallowed": -0.01, "maxallowed": 1.01} if is_share else {}),
            )  # fmt: skip

    def _axis(self, what: str) -> dict[str, Any]:
        if what == "step":
            return {"tickformat": ",d", "hoverformat": ",d", "dtick": self.dtick, "autorange": True}
        return {"tickformat": "~s", "hoverformat": ".4s", "dtick": None, "autorange": True}

    def add(self, row: int, trace: Any, steps: Any, tokens: Any) -> None:
        """Add a trace, whose points stand at these steps and tokens so far."""
        trace.x = np.asarray(steps)
        self.x.append((trace.x, np.asarray(tokens, "float64")))
        self.figure.add_trace(trace, row=row, col=1)

    def html(self, name: str) -> str:
        """A div and its script; name: its id."""
        buttons = []
        axes = [axis.plotly_name for axis in self.figure.select_xaxes()]
        for place, what in enumerate(("step", "tokens")):
            layout = {f"{axis}.{key}": value for axis in axes for key, value in self._axis(what).items()}
            changes = {"x": [own[place] for own in self.x]}, layout | {f"{axes[-1]}.title.text": what}
            buttons.append({"label": f"{what.rstrip('s')}s", "method": "update", "args": changes})
        if any(np.isfinite(tokens).any() for _, tokens in self.x):
            place_of_it = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 22}}
            self.figure.update_layout(
                updatemenus=[{"type": "buttons", "direction": "right", "buttons": buttons, **place_of_it}]
            )
        return self.figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=name, default_height=f"{self.height}px",
            config={"displayModeBar": False},
        )  # fmt: skip


def look(number: int, colors: Sequence[str], place: int = 0) -> dict[str, Any]:
    """Line of run or source `number`, which shows `place` figures before this one in the same colour."""
    dash = DASHES[(place + 2 * (number // len(colors))) % len(DASHES)]
    return {"color": colors[number % len(colors)], "dash": dash, "width": 1.6}


def label(name: str) -> str:
    """At most 40 characters of a name, its end, without what plotly would read as a tag."""
    return html.escape(name if len(name) <= 40 else f"…{name[-39:]}", quote=False)


def curve(
    values: pd.Series, name: str, line: dict[str, Any], format_: str, at: bool = False, **more: Any
) -> go.Scatter:
    """A line with its gaps; points that have no neighbours get a marker. at: each says under the pointer where it stands."""
    there = values.notna().to_numpy()
    alone = there & ~np.append(False, there[:-1]) & ~np.append(there[1:], False)
    where = " at %{x}" if at else ""
    return go.Scatter(
        y=values.to_numpy("float32"), name=label(name), line=line, mode="lines+markers" if alone.any() else "lines",
        marker={"size": 5}, hovertemplate=f"%{{y:{format_}}}{where}<extra>%{{fullData.name}}</extra>", **more,
    )  # fmt: skip


def is_idle(tables: Sequence[pd.DataFrame], figure: str, idle: float | None) -> bool:
    """Whether the figure is nowhere, or nowhere but at its idle value."""
    values = pd.concat([table[figure].dropna() for table in tables])
    return bool(((values - (np.inf if idle is None else idle)).abs() < 1e-9).all())


def shared(runs: Sequence[Run], points: Sequence[Points], panels: Sequence[Panel]) -> tuple[Stack | None, list[Panel]]:
    """All runs over each other; and the panels that are drawn: those that say something."""
    curves = [own.curves for own in points]
    drawn = [
        panel
        for panel in panels
        if (any(held_out(run, "loss").size for run in runs) if panel is HELD_OUT
            else not all(is_idle(curves, figure, panel.idle) for figure in panel.figures))
    ]  # fmt: skip
    if not drawn:
        return None, []
    names = [label(run.name) for run in runs] if len(runs) > 1 else []
    last = max((step for run in runs for step in run.steps.index[-1:]), default=0)
    stack = Stack([(panel.title, panel.unit, panel.format) for panel in drawn], last, names)
    longest = max((own.curves.index for own in points), key=len)
    at = any(not own.curves.index.equals(longest[: len(own.curves)]) for own in points)
    in_legend = set[int]()
    for row, panel in enumerate(drawn, start=1):
        for number, (run, own) in enumerate(zip(runs, points)):
            group = {"legendgroup": str(number), "showlegend": number not in in_legend}
            traces = _held_out(run, number) if panel is HELD_OUT else []
            for place, figure in enumerate(panel.figures if panel is not HELD_OUT else ()):
                values = own.curves[figure] * panel.scale
                if values.notna().any():
                    what = f", {figure.removeprefix('clipped_')}" if len(panel.figures) > 1 else ""
                    trace = curve(values, run.name + what, look(number, RUN_COLORS, place), panel.format, at)
                    traces.append((trace, values.index, own.curves["tokens"]))
            for trace, steps, tokens in traces:
                in_legend.add(number)
                stack.add(row, trace.update(group), steps, tokens)
                group = group | {"showlegend": False}
    return stack, drawn


def held_out(run: Run, key: str) -> pd.Series:
    """The held-out loss, or that of the exported models, by step."""
    losses = {line["step"]: finite(line.get(key)) for line in run.evaluations}
    return pd.Series(losses, dtype="float64").dropna()


def _held_out(run: Run, number: int) -> list[tuple[go.Scatter, Any, Any]]:
    """Of the float32 weights as a line, of the exported models as diamonds."""
    traces = []
    tokens = pd.concat([pd.Series({0: 0.0}), run.steps["tokens"]])
    for key, name, mode in (("loss", "", "lines+markers"), ("exported_loss", ", exported", "markers")):
        if len(values := held_out(run, key)):
            trace = curve(values, run.name + name, look(number, RUN_COLORS), ".4f", at=True)
            trace.update(mode=mode, **({"marker": {"symbol": "diamond-open", "size": 11}} if name else {}))
            traces.append((trace, values.index, tokens.reindex(values.index)))
    return traces


def weights_of(run: Run, points: Points) -> Stack | None:
    """The weights of a run over time, as a heat map, and quantiles of its excess loss."""
    has_heat, has_bands = len(points.shares.columns) > 1, len(points.quantiles.columns) > 0
    panels = [("Share of the tokens at each weight", "weight", ".2f")] if has_heat else []
    panels += [("Quantiles of the excess loss", "nats", ".4g")] if has_bands else []
    if not panels:
        return None
    stack = Stack(panels, run.steps.index.max())
    if has_heat:
        first, last = (round(float(centre) / WEIGHT_STEP) for centre in points.shares.columns[[0, -1]])
        centres = [f"{index * WEIGHT_STEP:.2f}" for index in range(first, last + 1)]  # also those of empty bins
        trace = go.Heatmap(
            y=(np.arange(first, last + 2) - 0.5) * WEIGHT_STEP, colorscale=HEAT_COLORS, zmin=0,
            z=points.shares.reindex(columns=centres, fill_value=0.0).to_numpy("float32").T,
            colorbar={"thickness": 10, "tickformat": ".0%", "len": PANEL, "lenmode": "pixels", "y": 1, "yanchor": "top"},
            hovertemplate="weight %{y:.2f}: %{z:.2%} of the tokens<extra></extra>",
        )  # fmt: skip
        stack.add(1, trace, points.edges, points.token_edges)
        stack.figure.update_yaxes(row=1, tickformat=".2f")
    middle = (len(points.quantiles.columns) - 1) / 2
    for place, share in enumerate(points.quantiles.columns):  # the space between neighbours is filled, more so inside
        is_median = share == "0.5"
        line = {"color": RUN_COLORS[0], "width": 2 if is_median else 0.8, "dash": "solid" if is_median else "dot"}
        opacity = 0.05 + 0.25 * (1 - abs(place - 0.5 - middle) / (middle + 1))
        fill: dict[str, Any] = {"fill": "tonexty" if place else "none", "fillcolor": f"rgba(42,127,201,{opacity:.2f})"}
        trace = curve(points.quantiles[share], f"{float(share):.0%}", line, ".4g", **fill)
        stack.add(len(panels), trace, points.quantiles.index, points.curves["tokens"])
    return stack


def sources_of(run: Run, points: Points, places: dict[str, int]) -> Stack | None:
    """Figures of each corpus source of a run that has several. places: of each source among those of all runs, so that
    it has one colour on the page."""
    tables = list(points.sources.values())
    if len(tables) < 2 or is_idle(tables, "ntp_loss", None):
        return None
    kinds = [("ntp_loss", "Next-token loss by corpus source", "nats per token")]
    kinds += [] if is_idle(tables, "weight_mean", 1.0) else [("weight_mean", "Mean weight by corpus source", "weight")]
    names = sorted(points.sources)
    stack = Stack([(title, unit, ".4g") for _, title, unit in kinds], run.steps.index.max(), list(map(label, names)))
    for row, (figure, *_) in enumerate(kinds, start=1):
        for name in names:
            values = points.sources[name][figure]
            if values.notna().any():
                group: dict[str, Any] = {"legendgroup": name, "showlegend": row == 1}
                trace = curve(values, name, look(places[name], SOURCE_COLORS), ".4g", **group)
                stack.add(row, trace, values.index, points.curves["tokens"])
    return stack
