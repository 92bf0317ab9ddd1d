"""remit distribution --html: the distributions as one page that stands alone, drawn by plotly."""

from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from markupsafe import Markup

from pipelines.distribution.tables import summary, tables
from pipelines.plot_pages import render_plots
from pipelines.report.figures import DASHES, RUN_COLORS, label

HEIGHT = 380  # pixels of a plot


def render(figures: dict[str, Any], folder: str) -> str:
    """The page of the JSON object of figures.py."""
    curves = [
        [(name, own) for name, own in figures["logprobs"].items()],
        [(f"{own['of']} - {own['minus']}", own) for own in figures["differences"]],
    ]
    if figures["kl"]:
        curves.append(
            [
                (name, own[direction])
                for own in figures["kl"]
                for name, direction in (
                    (f"KL({own['reference']} || {own['other']})", "forward"),
                    (f"KL({own['other']} || {own['reference']})", "backward"),
                )
            ]
        )
    units = ("log-prob, nats", "difference, nats", "divergence at least, nats")
    found = tables(figures)
    plots = [plot(f"plot-{number}", own, unit) for number, (own, unit) in enumerate(zip(curves, units))]
    return render_plots(
        Path(__file__).with_name("page.html"),
        plots,
        folder=folder,
        summary=summary(figures),
        sections=[
            (table, Markup(html), beyond(own)) for table, html, own in zip(found, plots, curves, strict=True)
        ],
    )  # fmt: skip


def plot(name: str, curves: list[tuple[str, dict[str, Any]]], unit: str) -> str:
    """A div and its script: the density of each distribution, share of the tokens per nat, with a switch to a log axis."""
    figure = go.Figure()
    for number, (title, own) in enumerate(curves):
        histogram = own["histogram"]
        width, shares = histogram["width"], histogram["shares"]
        edges = [histogram["left"] + width * place for place in range(len(shares) + 1)]
        figure.add_trace(
            go.Scatter(
                x=edges, y=[share / width for share in (*shares, 0.0)], name=label(title),
                mode="lines", line=look(number), hovertemplate="%{y:.4g} per nat from %{x:.3f} nat on",
            )
        )  # fmt: skip
    rows_of_legend = -(-sum(len(label(title)) * 7 + 55 for title, _ in curves) // 340)  # in a window of 400 pixels
    top = 45 + 22 * rows_of_legend
    figure.update_layout(
        template="none", paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)", hovermode="closest",
        font={"size": 12, "family": "system-ui, sans-serif"}, margin={"l": 10, "r": 10, "t": top, "b": 40},
        legend={"orientation": "h", "x": 0, "yref": "container", "y": 1, "yanchor": "top"}, showlegend=True,
        xaxis={"title": {"text": unit, "standoff": 6}, "automargin": True},
        yaxis={"title": {"text": "share per nat", "standoff": 4}, "automargin": True, "exponentformat": "power"},
        updatemenus=[{
            "type": "buttons", "direction": "right", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom", "pad": {"b": 6},
            "buttons": [
                {"label": axis, "method": "relayout", "args": [{"yaxis.type": axis, "yaxis.autorange": True}]}
                for axis in ("linear", "log")
            ],
        }],
    )  # fmt: skip
    for trace in figure.data:
        trace.line.shape = "hv"  # a step for each bin
    return figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=name, default_height=f"{HEIGHT + 22 * rows_of_legend}px",
        config={"displayModeBar": False},
    )  # fmt: skip


def look(number: int) -> dict[str, Any]:
    """Of the curve `number`: no two of the first 32 are the same."""
    return {
        "color": RUN_COLORS[number % len(RUN_COLORS)],
        "dash": DASHES[number // len(RUN_COLORS) % len(DASHES)],
        "width": 1.6,
    }


def beyond(curves: list[tuple[str, dict[str, Any]]]) -> str:
    """How much of the distributions the plot leaves out."""
    most = max(own["histogram"]["below"] + own["histogram"]["above"] for _, own in curves)
    return f"Up to {most:.2%} of a column's tokens lie beyond its curve." if most else ""
