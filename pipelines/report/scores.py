"""Task scores of runs (OUT/tasks.jsonl of remit train --eval-tasks) as curves over tokens: figures 1a and 12 of the paper.

Means come first, then a panel for each task. Values of one panel are of one task with one metric and number of shots.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from pipelines.beside.scores import Line, is_share
from pipelines.report.curves import Run
from pipelines.report.figures import RUN_COLORS, Stack, curve, label, line
from pipelines.report.panels import Panel
from pipelines.terminal import counted


@dataclass(frozen=True)
class Score:
    """A value of a model. Two with the same panel belong into one plot; alike: and with the same of this they compare."""

    panel: Panel
    value: float
    stderr: float | None
    alike: str


def scores_of(entry: Line) -> list[Score]:
    """What a line of the table gives to plot: means, then tasks."""
    tasks = entry.get("tasks") or {}
    settings = [entry.get("settings", {}).get(name) for name in ("limit", "chat_template", "max_length", "seed")]
    means = [(f"Mean of {name}", group, list(group["tasks"])) for name, group in (entry.get("groups") or {}).items()]
    if entry.get("mean") and len(tasks) > 1:
        means.insert(0, (f"Mean of all {len(tasks)} tasks", entry["mean"], list(tasks)))
    found = []
    for title, mean, names in means:
        own = [tasks[name] for name in names]
        labels = ", ".join(task["label"] for task in own)
        panel = Panel(title, "share right", (), ".2%", note=f"over {counted(len(own), 'task')}, {labels}.")
        found.append(Score(panel, mean["value"], mean["stderr"], repr([settings, [_identity(task) for task in own]])))
    for task in tasks.values():
        shots = ", ".join(map(str, sorted(set(task["shots"].values()))))
        title, unit = f"{task['label']}, {shots}-shot", task["metric"].removesuffix(",none")
        panel = Panel(title, unit, (), ".2%" if is_share(task) else ".4g")
        found.append(Score(panel, task["value"], task["stderr"], repr([settings, _identity(task)])))
    return found


def _identity(task: dict[str, Any]) -> list[Any]:
    return [task["metric"], task["shots"], task["questions"]]


def draw_scores(runs: Sequence[Run]) -> tuple[Stack, list[str]] | None:
    """The figure of all runs over each other, and notes on it; None where no model was evaluated."""
    tables: dict[Panel, dict[int, dict[int, Score]]] = {}
    for number, run in enumerate(runs):
        for entry in run.scores:
            for score in scores_of(entry):
                tables.setdefault(score.panel, {}).setdefault(number, {})[entry["step"]] = score
    if not tables:
        return None
    panels = sorted(tables, key=lambda panel: not panel.title.startswith("Mean of"))  # else in the order of the tasks
    last = max(step for of_runs in tables.values() for steps in of_runs.values() for step in steps)
    known = all(
        runs[number].tokens_at(pd.Index(steps)).notna().all()
        for own in tables.values()
        for number, steps in own.items()
    )
    names = [label(run.name) for run in runs] if len(runs) > 1 else []
    shown = [
        replace(panel, title=label(panel.title, 30), unit=label(panel.unit, 26)) for panel in panels
    ]  # in 400 x 190 pixels
    stack = Stack(shown, last, names, over="tokens" if known else "step")
    named = set[int]()
    for row, panel in enumerate(panels, start=1):
        for number, steps in tables[panel].items():
            run = runs[number]
            values = pd.Series({step: score.value for step, score in steps.items()})
            errors = pd.Series({step: score.stderr for step, score in steps.items()}, dtype="float64")
            look = line(number, RUN_COLORS)
            bars = {"array": errors.to_numpy("float32"), "thickness": 1, "width": 2, "color": look["color"]}
            trace = curve(
                values, run.name, panel.format, mode="lines+markers", line=look, error_y=bars if errors.notna().any() else None,
                legendgroup=str(number), showlegend=number not in named,
            )  # fmt: skip
            stack.add(row, trace, run.tokens_at(values.index))
            named.add(number)
    return stack, notes_on(runs, panels, tables)


def notes_on(
    runs: Sequence[Run], panels: Sequence[Panel], tables: dict[Panel, dict[int, dict[int, Score]]]
) -> list[str]:
    """What to know of the figure: what means are over, what does not compare, what is missing."""
    notes = [
        "bars are one standard error, which is that of the questions; another seed of the training moves a value too."
    ]
    notes += [f"{panel.title}: {panel.note}" for panel in panels if panel.note]
    for panel in panels:
        if len({score.alike for steps in tables[panel].values() for score in steps.values()}) > 1:
            notes.append(
                f"{panel.title}: other questions, settings or metrics for some of the points; do not compare them."
            )
    for run in runs:
        skipped = [f"{entry['step']:,}" for entry in run.scores if "skipped" in entry]
        if skipped:
            notes.append(f"{run.name}: no scores of step {', '.join(skipped)}, which evaluations did not get to.")
    return notes
