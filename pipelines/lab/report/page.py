"""The report as Markdown, and as one self-contained HTML page with the style of remit report."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.lab.report.claims import Finding
from pipelines.lab.report.data import Results
from pipelines.lab.report.plots import make_plots
from pipelines.lab.report.sentences import LIMITS, summary
from pipelines.lab.report.tables import Table, make_tables

HERE = Path(__file__).parent
TITLE = "The paper's claims at laptop scale"


def to_markdown(results: Results, findings: Sequence[Finding]) -> str:
    """The page without its plots."""
    parts = [f"# {TITLE}", *summary(results, findings)]
    for table in make_tables(results, findings):
        parts += [f"## {table.title}", table.note, _markdown_table(table)]
    parts += ["## What this does not show", "\n".join(f"- {limit}" for limit in LIMITS)]
    if results.left_out:
        parts += ["## Left out", "\n".join(f"- {line}" for line in results.left_out)]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return (
            "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*").replace("\n", " ") for cell in cells) + " |"
        )

    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *(line(row) for row in table.rows)])


def to_html(results: Results, findings: Sequence[Finding]) -> str:
    """The page; nothing of it is executable but its script and plotly, and its policy keeps it from loading anything."""
    from plotly.offline import get_plotlyjs

    plots = make_plots(results)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    style = (HERE / "report.css").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        title=TITLE,
        summary=summary(results, findings),
        tables=make_tables(results, findings),
        plots=plots,
        limits=LIMITS,
        left_out=results.left_out,
        style=Markup(style),
        plotly=Markup(get_plotlyjs()),
        script=Markup((HERE / "report.js").read_text(encoding="utf-8")),
        data=Markup(encode([asdict(plot) for plot in plots])),
    )


def encode(value: Any) -> str:
    """JSON for a script element: no number has more than six significant digits but whole ones, and no `<` is left
    that could end the element."""
    return json.dumps(_short(value), ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _short(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _short(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_short(entry) for entry in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return int(value) if value.is_integer() and abs(value) < 2**53 else float(f"{value:.6g}")
    return value
