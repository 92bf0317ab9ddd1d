"""The figures of remit report, drawn by plotly: panels below each other over one axis of steps or tokens.

Colours of text and grid come from the page's style, which follows the light or dark scheme of the system.
"""

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from pipelines.report.curves import Run
from pipelines.report.panels import Panel

# told apart also by readers who see few colours, on white and on black; those of runs are not those of sources
RUN_COLORS = ("#2a7fc9", "#e07b1a", "#1f9e77", "#c65aa5", "#8c6ad6", "#a08a1c", "#d84b4b", "#5f7a8a")
SOURCE_COLORS = ("#0aa3b5", "#9a5f3c", "#7c9a00", "#e0559b", "#4d5bd6", "#c9a100", "#3f8f3a", "#8f8f8f")
DASHES = ("solid", "dot", "dash", "dashdot")
HEAT_COLORS = [[0, "rgba(201,160,220,0)"], [0.2, "rgb(201,160,220)"], [1, "rgb(91,15,134)"]]  # rare weights show, too
PANEL, GAP = 190, 60  # pixels: height of a panel, and between two
WEIGHT_STEP = 0.05  # of the bins


HELD_OUT = Panel(
    "Held-out loss", "nats per token", ("loss", "exported_loss"), ".4f",
    note="over all tokens of --eval-shards, of the float32 weights that train; diamonds: of the exported models.",
)  # fmt: skip
SECTIONS: dict[str, tuple[Panel, ...]] = {
    "Weights": (
        Panel("Mean weight", "weight", ("weight_mean",), idle=1.0),
        Panel("Standard deviation of the weights", "weight", ("weight_std",), idle=0.0),
        Panel("Clipped weights", "share of tokens", ("clipped_low", "clipped_high"), ".2%", 0.0,
              "tokens whose weight the clip raised to its lower bound (solid) or cut to its upper one (dotted)."),
        Panel("Effective tokens", "share of tokens", ("effective_share",), ".2%", 1.0,
              "as many equally weighted tokens would give a gradient of the same variance."),
        Panel("Mean excess loss", "nats", ("delta_mean",), note="loss of the base minus that of the reference."),
    ),
    "Losses": (
        HELD_OUT,
        Panel("Next-token loss", "nats per token", ("ntp_loss",), note="training batches, every token counted once."),
        Panel("Loss of the objective", "nats per token", ("loss",), note="what was minimised: with weights, the "
              "weighted loss. Runs of different objectives do not compare here."),
        Panel("Distillation loss", "nats per token", ("kd_loss",), note="mean KL divergence from the reference."),
        Panel("Probability outside of the stored top k", "share", ("missing_mass",), ".2%"),
        Panel("Balancing loss of the router", "loss", ("router_aux_loss",)),
    ),
    "Optimizer and machine": (
        Panel("Gradient norm", "before clipping", ("grad_norm",)),
        Panel("Learning rate", "per step", ("lr",), ".3e"),
        Panel("Throughput", "tokens/s", ("tokens_per_second",), ",.0f"),
        Panel("Model FLOPs", "TFLOP/s", ("teraflops_per_second",), note="of all processes together, forward and backward."),
        Panel("Model FLOP utilisation", "share of the peak", ("mfu",), ".1%", note="of the GPUs' dense bfloat16 peak."),
        Panel("Waiting for data", "share of the step", ("data_wait_share",), ".3%"),
        Panel("Peak memory", "bytes", ("peak_memory_bytes",), ",.0f"),
    ),
}  # fmt: skip
HEAT = Panel(
    "Share of the tokens at each weight", "weight", (), ".2f", note="in bins of 0.05, that at 2 with all above."
)
BANDS = Panel("Quantiles of the excess loss", "nats", (), note="over the tokens of a step; solid: the median.")
OF_SOURCES = (
    Panel("Next-token loss by corpus source", "nats per token", ("ntp_loss",)),
    Panel("Mean weight by corpus source", "weight", ("weight_mean",), idle=1.0),
)


class Stack:
    """A figure of panels over one horizontal axis, with buttons for steps and tokens."""

    def __init__(self, panels: Sequence[Panel], num_steps: int, legend: Sequence[str] = ()) -> None:
        """num_steps: where the axis ends; legend: the names that it has, none for no legend."""
        plots = len(panels) * PANEL + (len(panels) - 1) * GAP
        names_per_row = max(1, 330 // (7 * max(map(len, legend), default=1) + 45))  # in a window of 400 pixels
        self.height = plots + 105 + 30 * math.ceil(len(legend) / names_per_row)
        self.dtick = 1 if num_steps <= 10 else None  # whole steps
        self.x: list[tuple[Any, Any]] = []
        titles = [panel.title for panel in panels]
        self.figure = make_subplots(len(panels), 1, vertical_spacing=GAP / plots, subplot_titles=titles)
        self.figure.update_annotations(x=0, xanchor="left", font_size=13)  # the titles
        self.figure.update_layout(
            template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", hovermode="x unified",
            font={"size": 12, "family": "system-ui, sans-serif"}, margin={"l": 10, "r": 10, "t": 55, "b": 40},
            legend={"orientation": "h", "x": 0, "yref": "container", "y": 1, "yanchor": "top"}, showlegend=bool(legend),
        )  # fmt: skip
        self.figure.update_xaxes(automargin=True, matches="x", **self._axis("step"))
        self.figure.update_xaxes(title={"text": "step", "standoff": 6}, row=len(panels))
        for row, panel in enumerate(panels, start=1):
            share, count = "%" in panel.format, "," in panel.format
            # a constant share would get a whole unit on both sides
            limits = {"minallowed": -0.01, "maxallowed": 1.01} if share else {}
            self.figure.update_yaxes(
                row=row, title={"text": panel.unit, "standoff": 4}, automargin=True, exponentformat="power",
                tickformat=".2~%" if share else "~s" if count else ".2f" if panel is HEAT else None, **limits,
            )  # fmt: skip

    def _axis(self, what: str) -> dict[str, Any]:
        is_step = what == "step"
        formats = {"tickformat": ",d", "hoverformat": ",d"} if is_step else {"tickformat": "~s", "hoverformat": ".4s"}
        return formats | {"dtick": self.dtick if is_step else None, "autorange": True}

    def add(self, row: int, trace: Any, tokens: pd.Series) -> None:
        """Add a trace of points; tokens: those so far at each, by step."""
        trace.x = tokens.index.to_numpy()
        self.x.append((trace.x, tokens.to_numpy("float64")))
        self.figure.add_trace(trace, row=row, col=1)

    def html(self, name: str) -> str:
        """A div and its script; name: its id."""
        axes = [axis.plotly_name for axis in self.figure.select_xaxes()]
        buttons = []
        for place, what in enumerate(("step", "tokens")):
            layout = {f"{axis}.{key}": value for axis in axes for key, value in self._axis(what).items()}
            x = {"x": [own[place] for own in self.x]}
            buttons.append({"label": what, "method": "update", "args": [x, layout | {f"{axes[-1]}.title.text": what}]})
        place_of_it = {"x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 22}}
        self.figure.update_layout(
            updatemenus=[{"type": "buttons", "direction": "right", "buttons": buttons, **place_of_it}]
        )
        return self.figure.to_html(
            full_html=False, include_plotlyjs=False, div_id=name, default_height=f"{self.height}px",
            config={"displayModeBar": False},
        )  # fmt: skip


def line(number: int, colors: Sequence[str], place: int = 0) -> dict[str, Any]:
    """Of run or source `number`, which shows `place` figures before this one in the same colour."""
    dash = DASHES[(place + 2 * (number // len(colors))) % len(DASHES)]
    return {"color": colors[number % len(colors)], "dash": dash, "width": 1.6}


def label(name: str) -> str:
    """At most 40 characters of a name, its end, without what plotly would read as a tag."""
    return html.escape(name if len(name) <= 40 else f"…{name[-39:]}", quote=False)


def curve(values: pd.Series, name: str, format_: str, **more: Any) -> go.Scatter:
    """A line with its gaps; where a point has no neighbours, with markers."""
    there = values.notna().to_numpy()
    alone = there & ~np.append(False, there[:-1]) & ~np.append(there[1:], False)
    look = {"mode": "lines+markers" if alone.any() else "lines", "marker": {"size": 5}} | more
    return go.Scatter(y=values.to_numpy("float32"), name=label(name), yhoverformat=format_, **look)


def says_something(tables: Sequence[pd.DataFrame], panel: Panel) -> bool:
    """Whether a figure of the panel is there, and not at its idle value throughout."""
    columns = [table[figure].dropna() for table in tables for figure in panel.figures if figure in table]
    return any(((values - (np.inf if panel.idle is None else panel.idle)).abs() > 1e-9).any() for values in columns)


def shared(runs: Sequence[Run], panels: Sequence[Panel]) -> Stack:
    """All runs over each other."""
    figures = [figure for panel in panels for figure in panel.figures]
    have_some = [run for run in runs if HELD_OUT in panels or any(figure in run.steps for figure in figures)]
    last = max(step for run in have_some for step in (0, *run.steps.index[-1:]))
    stack = Stack(panels, last, [label(run.name) for run in runs] if len(runs) > 1 else [])
    for number, run in enumerate(runs):
        in_legend = True
        for row, panel in enumerate(panels, start=1):
            table = run.held_out if panel is HELD_OUT else run.steps
            tokens = table["trained_tokens" if panel is HELD_OUT else "tokens"]
            for place, figure in enumerate(panel.figures):
                values = table.get(figure, pd.Series(dtype="float64"))
                values = values.dropna() if panel is HELD_OUT else values
                if not values.notna().any():
                    continue
                more: dict[str, Any] = {"line": line(number, RUN_COLORS, place)}
                if panel is HELD_OUT:
                    diamonds = {"mode": "markers", "marker": {"symbol": "diamond-open", "size": 11}}
                    more = {"mode": "lines+markers", "line": line(number, RUN_COLORS)} | (diamonds if place else {})
                name = run.name + (
                    f", {figure.removeprefix('clipped_').removesuffix('_loss').removesuffix('_reward')}"
                    if place
                    else ""
                )
                trace = curve(values, name, panel.format, legendgroup=str(number), showlegend=in_legend, **more)
                stack.add(row, trace, tokens[values.index])
                in_legend = False
    return stack


def weights_of(run: Run) -> Stack | None:
    """The weights of a run over time, as a heat map, and the quantiles of its excess loss as bands."""
    panels = ([HEAT] if len(run.bins.columns) > 1 else []) + ([BANDS] if len(run.quantiles.columns) else [])
    if not panels:
        return None
    stack = Stack(panels, run.steps.index[-1])
    if HEAT in panels:
        first, last = (round(edge(map(float, run.bins.columns)) / WEIGHT_STEP) for edge in (min, max))
        centres = [f"{number * WEIGHT_STEP:.2f}" for number in range(first, last + 1)]  # empty bins, too
        shares = run.bins.div(run.bins.sum(axis=1), axis=0).reindex(columns=centres).fillna(0.0)
        trace = go.Heatmap(
            y=list(map(float, centres)), z=shares.to_numpy("float32").T, colorscale=HEAT_COLORS, zmin=0,
            colorbar={"thickness": 10, "tickformat": ".0%", "len": PANEL, "lenmode": "pixels", "y": 1, "yanchor": "top"},
            hovertemplate="%{z:.2%} of the tokens have weight %{y:.2f}<extra></extra>",
        )  # fmt: skip
        stack.add(1, trace, run.steps["tokens"])
    for place, share in enumerate(sorted(run.quantiles.columns, key=float)):  # filled between neighbours
        look = {
            "color": RUN_COLORS[0],
            "width": 2 if share == "0.5" else 0.8,
            "dash": "solid" if share == "0.5" else "dot",
        }
        fill = {"fill": "tonexty" if place else "none", "fillcolor": "rgba(42,127,201,0.15)"}
        trace = curve(run.quantiles[share], f"{float(share):.0%}", ".4g", line=look, **fill)
        stack.add(len(panels), trace, run.steps["tokens"])
    return stack


def sources_of(run: Run, places: dict[str, int]) -> Stack | None:
    """Figures of each corpus source of a run that has several. places: of each source among those of all runs, so that
    it has one colour on the page."""
    panels = [panel for panel in OF_SOURCES if says_something(list(run.sources.values()), panel)]
    if len(run.sources) < 2 or not panels:
        return None
    names = sorted(run.sources)
    stack = Stack(panels, run.steps.index[-1], list(map(label, names)))
    for row, panel in enumerate(panels, start=1):
        for name in names:
            if (figure := panel.figures[0]) in run.sources[name]:
                look = line(places[name], SOURCE_COLORS)
                more = {"line": look, "legendgroup": name, "showlegend": row == 1}
                stack.add(row, curve(run.sources[name][figure], name, panel.format, **more), run.steps["tokens"])
    return stack
