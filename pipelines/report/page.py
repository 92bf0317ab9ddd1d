"""remit report: one self-contained HTML page of runs of training and post-training, to be looked at in any browser, without a network.

In: folders of remit train, sft, dpo and rl. Out: a page with plotly and the thinned figures inside; no script of it runs but plotly and
those that plotly made, and a content security policy keeps the page from loading anything.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from markupsafe import Markup

from pipelines.pages import write_page
from pipelines.plot_pages import render_plots
from pipelines.report.curves import Run, read_run, thin
from pipelines.report.figures import (
    BANDS,
    HEAT,
    HELD_OUT,
    RUN_COLORS,
    SECTIONS,
    Stack,
    says_something,
    shared,
    sources_of,
    weights_of,
)  # fmt: skip
from pipelines.report.panels import Panel
from pipelines.report.posttrain import PANELS, STAGES, log_every, stage_of
from pipelines.report.runs import run_names
from pipelines.report.scores import draw_scores
from pipelines.report.settings import ReportConfig
from pipelines.report.tables import provenance_rows, settings_rows, totals_rows

MACHINE = "Optimizer and machine"
MAX_POINTS = 1000  # of a curve
POINTS_OF_ALL_RUNS = 4000  # of a figure, which keeps the page below about 10 MB with any number of runs


def write_report(config: ReportConfig, progress: Callable[[int], None] = lambda size: None) -> list[Run]:
    """Write config.out and return what it shows. ValueError where a folder is no run, or its files are damaged."""
    runs = [read_run(folder, name, progress) for folder, name in zip(config.runs, run_names(config.runs))]
    write_page(config.out, render(runs))
    return runs


def render(runs: Sequence[Run]) -> str:
    """The page."""
    points = [thin(run, max(1, min(MAX_POINTS, POINTS_OF_ALL_RUNS // len(runs)))) for run in runs]
    sections, left_out = make_sections(points)
    parts = [
        (
            title,
            notes,
            [
                (caption, Markup(stack.html(f"figure-{number}-{place}")))
                for place, (caption, stack) in enumerate(stacks)
            ],
        )
        for number, (title, notes, stacks) in enumerate(sections)
    ]
    settings = [run.settings for run in runs]
    return render_plots(
        Path(__file__).with_name("report.html"),
        [html for *_, own in parts for _, html in own],
        runs=runs,
        colors=RUN_COLORS,
        totals=totals_rows(runs),
        compared=[("Settings", settings_rows(settings)), ("Provenance", provenance_rows(settings))],
        sections=parts,
        thinned=[
            (run, len(own.steps), own.window, "logged steps" if log_every(run.settings) > 1 else "steps")
            for run, own in zip(runs, points)
            if own.window > 1
        ],
        left_out=left_out,
    )


def make_sections(runs: Sequence[Run]) -> tuple[list[tuple[str, list[str], list[tuple[str, Stack]]]], list[str]]:
    """Title, notes and captioned figures of each part of the page, scores and weights first; the titles of panels that are left out."""
    parts: list[tuple[str, list[str], list[tuple[str, Stack | None]]]] = []
    left_out: list[str] = []
    if drawn_scores := draw_scores(runs):
        parts.append(("Task scores", drawn_scores[1], [("", drawn_scores[0])]))
    for title, panels in panels_of(runs).items():
        own = [(run.name, weights_of(run)) for run in runs] if title == "Weights" else []
        drawn = [panel for panel in panels if says_something(_tables(runs, panel), panel)]
        left_out += [panel.title for panel in panels if panel not in drawn]
        notes = [f"{panel.title}: {panel.note}" for panel in drawn if panel.note]
        if HELD_OUT in drawn and not evaluated_alike(runs):
            notes.append("The held-out tokens, or their context, are not the same for all points: do not compare them.")
        if any(stack for _, stack in own):
            notes = [*(f"{panel.title}: {panel.note}" for panel in (HEAT, BANDS)), *notes]
        parts.append((title, notes, [*own, *([("", shared(runs, drawn))] if drawn else [])]))
    places = {source: place for place, source in enumerate(sorted({name for run in runs for name in run.sources}))}
    parts.append(("Corpus sources", [], [(run.name, sources_of(run, places)) for run in runs]))
    sections = [(title, notes, [(name, stack) for name, stack in stacks if stack]) for title, notes, stacks in parts]
    return [section for section in sections if section[2]], left_out


def panels_of(runs: Sequence[Run]) -> dict[str, tuple[Panel, ...]]:
    """The panels of each section that runs of these kinds may have: of training, of each stage of post-training."""
    stages = {stage_of(run.settings) for run in runs}
    of_stages = {title: PANELS[stage] for stage, title in STAGES.items() if stage in stages}
    if None in stages:
        return {title: SECTIONS[title] for title in ("Weights", "Losses")} | of_stages | {MACHINE: SECTIONS[MACHINE]}
    return of_stages | {MACHINE: tuple(panel for panel in SECTIONS[MACHINE] if panel.figures[0] in ("grad_norm", "lr"))}


def _tables(runs: Sequence[Run], panel: Panel) -> list:
    return [run.held_out if panel is HELD_OUT else run.steps for run in runs]


def evaluated_alike(runs: Sequence[Run]) -> bool:
    """Whether all held-out losses are over the same tokens and in the same context, as far as that is written."""
    evaluated = [run for run in runs if len(run.held_out)]
    sets = [
        {value for run in evaluated for value in run.held_out[key].dropna()} for key in ("tokens", "manifest_sha256")
    ]
    contexts = {run.settings.get("context") for run in evaluated} - {None}
    return all(len(values) < 2 for values in (*sets, contexts))
