"""OUT/tasks.jsonl: the task scores of a run, a line for each step whose model was evaluated. Light to import.

A line: step, the suite, for each task its value, standard error and what else decides whether two values compare, the means
of groups and over all tasks, and where results.json lies. Or step and `skipped`, the reason why there are none.
"""

import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.report.runs import read_lines
from shards.store import LocalStore

TASKS = "tasks.jsonl"
FOLDER = "tasks"
"""In the folder of a run: results.json of each model, and logs of evaluations that failed."""
OF_A_TASK = ("label", "metric", "value", "stderr", "higher_is_better", "shots", "questions")
SETTINGS = ("limit", "chat_template", "seed", "max_length", "backend", "dtype")

Line = dict[str, Any]


def line_of(values: dict[str, Any], results: Path) -> Line:
    """What the table says of the results of remit eval, without the step. results: the folder of results.json."""
    tasks = {name: {key: record[key] for key in OF_A_TASK} for name, record in values["tasks"].items()}
    means = {
        name: group | {"stderr": stderr_of_mean([values["tasks"][task] for task in group["tasks"]])}
        for name, group in values["groups"].items()
    }
    return {
        "suite": values["suite"],
        "tasks": tasks,
        "groups": {name: means[name] for name in means if len(means[name]["tasks"]) > 1},
        "mean": mean_of(values["tasks"]),
        "left_out": values["left_out"],
        "settings": {name: values["settings"][name] for name in SETTINGS},
        "weights_sha256": values["settings"]["model"]["weights"],
        "results": f"{FOLDER}/{results.name}/results.json",
    }


def mean_of(tasks: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    """Mean over tasks and its standard error. None where a value is no share of right answers, which has no mean with those."""
    if not all(map(is_share, tasks.values())):
        return None
    return {"value": fmean(task["value"] for task in tasks.values()), "stderr": stderr_of_mean(list(tasks.values()))}


def stderr_of_mean(tasks: list[dict[str, Any]]) -> float | None:
    """Of the mean over tasks; None where one of theirs is not known, or where a group stands beside one of its own tasks."""
    parts = [part for task in tasks for part in task["samples"]]
    errors = [task["stderr"] for task in tasks]
    if None in errors or len(set(parts)) < len(parts):
        return None
    return math.sqrt(sum(error**2 for error in errors)) / len(errors)


def is_share(task: dict[str, Any]) -> bool:
    """Whether a task's value may be a share, of which more is better: a perplexity is none."""
    return 0 <= task["value"] <= 1 and task.get("higher_is_better") is not False


def read_scores(out: Path) -> list[Line]:
    """The lines of a run, by step."""
    return list(read_lines(out / TASKS, lambda damaged: None))


def add(out: Path, line: Line) -> None:
    """Put a line into the table in the place of its step, whole or not at all."""
    lines = {entry["step"]: entry for entry in read_scores(out)} | {line["step"]: line}
    text = "".join(json.dumps(lines[step], ensure_ascii=False, allow_nan=False) + "\n" for step in sorted(lines))
    LocalStore(out).replace(TASKS, text.encode())


def in_words(line: Line) -> str:
    """The mean and the tasks of a line, on one line."""
    if "skipped" in line:
        return line["skipped"]
    tasks = [f"{task['label']} {_figure(task, is_share(task))}" for task in line["tasks"].values()]
    mean = [f"mean {_figure(line['mean'], True)}"] if line["mean"] and len(tasks) > 1 else []
    return ", ".join([*mean, *tasks])


def _figure(entry: dict[str, Any], as_share: bool) -> str:
    factor, digits, unit = (100, 2, " %") if as_share else (1, 4, "")
    error = "" if entry["stderr"] is None else f" ± {factor * entry['stderr']:.{digits}f}"
    return f"{factor * entry['value']:.{digits}f}{error}{unit}"
