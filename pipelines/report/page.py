"""remit report: one self-contained HTML page of training runs, to be looked at in any browser, without a network.

In: folders of remit train. Out: a page with plotly and the thinned figures inside; no script of it runs but plotly and
those that plotly made, and a content security policy keeps the page from loading anything.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from pipelines.pages import content_hash, write_page
from pipelines.report.curves import Points, Run, read_run, thin
from pipelines.report.figures import (
    HELD_OUT,
    RUN_COLORS,
    SECTIONS,
    Stack,
    held_out,
    shared,
    sources_of,
    weights_of,
)
from pipelines.report.runs import finite, run_names
from pipelines.report.tables import provenance_rows, settings_rows, totals_rows
from pipelines.settings import ReportConfig

MAX_POINTS = 1000  # of a curve
POINTS_OF_ALL_RUNS = 4000  # of a figure, which keeps the page below about 10 MB with any number of runs
MAX_COLUMNS = 250  # of a heat map


@dataclass(frozen=True)
class Section:
    """A part of the page. figures: caption and HTML of each."""

    title: str
    notes: list[str]
    figures: list[tuple[str, Markup]]


def write_report(config: ReportConfig, progress: Callable[[int], None] = lambda size: None) -> list[Run]:
    """Write config.out and return what it shows. ValueError where a folder is no run, or its metrics are damaged."""
    names = run_names(config.runs)
    runs = [read_run(folder, name, progress) for folder, name in zip(config.runs, names)]
    write_page(config.out, render(runs))
    return runs


def render(runs: Sequence[Run]) -> str:
    """The page."""
    max_points = max(1, min(MAX_POINTS, POINTS_OF_ALL_RUNS // len(runs)))
    points = [thin(run, max_points, MAX_COLUMNS) for run in runs]
    sections, left_out = make_sections(runs, points)
    scripts = [script for section in sections for _, html in section.figures for script in scripts_of(html)]
    settings = [run.settings for run in runs]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        runs=runs,
        thinned=[(run, own) for run, own in zip(runs, points) if own.window > 1],
        swatches=[swatch(number) for number in range(len(runs))],
        totals=totals_rows(runs),
        compared=[("Settings", settings_rows(settings)), ("Provenance", provenance_rows(settings))],
        sections=sections,
        left_out=left_out,
        plotly=Markup(get_plotlyjs()),
        script_hashes=[content_hash(script) for script in (get_plotlyjs(), *scripts)],
    )


def scripts_of(html: str) -> list[str]:
    """What stands in the script elements of a figure, whose data have no `<`."""
    return re.findall("<script[^>]*>(.*?)</script>", html, re.DOTALL)


def swatch(number: int) -> str:
    """The look of a run in the heads of tables, as CSS: dashed where its lines are."""
    color = RUN_COLORS[number % len(RUN_COLORS)]
    is_dashed = number // len(RUN_COLORS) % 2 == 1
    return f"repeating-linear-gradient(90deg, {color} 0 3px, transparent 3px 5px)" if is_dashed else color


def make_sections(runs: Sequence[Run], points: Sequence[Points]) -> tuple[list[Section], list[str]]:
    """The parts of the page, weights first, and the titles of the panels that are left out."""
    places = {source: place for place, source in enumerate(sorted({name for run in runs for name in run.sources}))}
    pairs = list(zip(runs, points))
    parts: list[tuple[str, list[str], list[tuple[str, Stack | None]]]] = []
    left_out: list[str] = []
    for title, panels in SECTIONS.items():
        stack, drawn = shared(runs, points, panels)
        left_out += [panel.title for panel in panels if panel not in drawn]
        notes = [held_out_note(runs)] if HELD_OUT in drawn else []
        notes += [f"{panel.title}: {panel.note}" for panel in drawn if panel.note]
        if title == "Weights":
            own = [(run.name, weights_of(run, thinned)) for run, thinned in pairs]
            parts.append((title, heat_notes(points) + notes, [*own, ("", stack)]))
        else:
            parts.append((title, notes, [("", stack)]))
    parts.append(("Corpus sources", [], [(run.name, sources_of(run, thinned, places)) for run, thinned in pairs]))
    sections = [
        Section(
            title,
            notes,
            [
                (caption, Markup(stack.html(f"figure-{number}-{place}")))
                for place, (caption, stack) in enumerate(own)
                if stack
            ],
        )
        for number, (title, notes, own) in enumerate(parts)
    ]
    return [section for section in sections if section.figures], left_out


def heat_notes(points: Sequence[Points]) -> list[str]:
    """What the heat maps and bands show, where there are some."""
    notes = []
    if any(len(own.shares.columns) > 1 for own in points):
        note = "Share of the tokens at each weight: in bins of 0.05"
        note += "; the bin at 2 holds what is above, too." if any("2.00" in own.shares for own in points) else "."
        sizes = sorted({own.heat_window for own in points} - {1})
        notes.append(note + (f" A column counts the tokens of {' or '.join(map(str, sizes))} steps." if sizes else ""))
    if any(len(own.quantiles.columns) for own in points):
        notes.append(
            "Quantiles of the excess loss: over the tokens of a step, of the base's loss minus the reference's; solid: the median."
        )
    return notes


def held_out_note(runs: Sequence[Run]) -> str:
    """Which weights the held-out loss is of, and whether the points compare."""
    note = "Held-out loss: over all tokens of --eval-shards, of the float32 weights that are trained"
    if any(len(held_out(run, "exported_loss")) for run in runs):
        note += "; diamonds: of the exported models, whose weights are rounded"
    lines = [line for run in runs for line in run.evaluations]
    told: list[set] = [
        {finite(line.get("tokens")) for line in lines},
        {line.get("manifest_sha256") for line in lines},
        {run.settings.get("context") for run in runs if run.evaluations},
    ]
    if any(len(values - {None}) > 1 for values in told):
        note += ". The tokens, or the context, are not the same for all of these points: do not compare them"
    return f"{note}."
