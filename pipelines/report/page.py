"""remit report: one self-contained HTML page of training runs, to be looked at in any browser, without a network.

In: folders of remit train. Out: a page with plotly and the thinned figures inside; nothing of it is executable but
report.js and plotly, and a content security policy keeps the page from loading anything.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from pipelines.pages import content_hash, write_page
from pipelines.report.data import MAX_POINTS, Run, name_runs, read_run
from pipelines.report.plots import make_plots
from pipelines.report.tables import make_tables
from pipelines.settings import ReportConfig

HERE = Path(__file__).parent
POINTS_OF_ALL_RUNS = 8000  # of a figure, which keeps the page below about 10 MB with any number of runs


def write_report(config: ReportConfig, progress: Callable[[int], None] = lambda size: None) -> list[Run]:
    """Write config.out and return what it shows. ValueError where a folder is no run, or its metrics are damaged."""
    max_points = max(1, min(MAX_POINTS, POINTS_OF_ALL_RUNS // len(config.runs)))
    runs = [read_run(folder, max_points, progress) for folder in config.runs]
    name_runs(runs, config.runs)
    write_page(config.out, render(runs))
    return runs


def render(runs: Sequence[Run]) -> str:
    """The page."""
    from plotly.offline import get_plotlyjs

    plots, left_out = make_plots(runs)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    plotly, script = get_plotlyjs(), (HERE / "report.js").read_text(encoding="utf-8")
    return environment.get_template("report.html").render(
        runs=runs,
        plots=plots,
        left_out=left_out,
        tables=make_tables(runs),
        windows=[run for run in runs if run.window > 1],
        style=Markup((HERE / "report.css").read_text(encoding="utf-8")),
        plotly=Markup(plotly),
        script=Markup(script),
        script_hashes=[content_hash(plotly), content_hash(script)],
        data=Markup(encode({"runs": [run_data(run) for run in runs], "plots": [asdict(plot) for plot in plots]})),
    )


def run_data(run: Run) -> dict[str, Any]:
    """What the page's script reads of a run."""
    centres = sorted(run.heat, key=float)
    return {
        "name": run.name,
        "step": run.steps_n,
        "tokens": run.tokens_n,
        "window": run.window,
        "curves": run.curves,
        "sources": run.sources,
        "held_out": {
            "step": [step for step, _, _ in run.held_out],
            "tokens": [tokens for _, tokens, _ in run.held_out],
            "loss": [loss for _, _, loss in run.held_out],
        },
        "heat": {"edges": run.heat_edges, "centres": centres, "shares": [run.heat[centre] for centre in centres]},
    }


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
