"""Results of remit eval, in results.json."""

import hashlib
import json
import math
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.evaluation.suites import GROUPS, SUITES, SuiteTask, group_of_task
from shards.store import LocalStore

FORMAT = 3  # of the result files


def finished(file: Path, asked: dict[str, Any]) -> dict[str, Any] | None:
    """What `file` holds, where it has all tasks that are asked for, evaluated with the same settings."""
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        same = all(values[key] == asked[key] for key in ("format", "suite", "settings", "asked"))
        return values if same and len(values["tasks"]) == len(asked["asked"]) else None
    except (OSError, ValueError, KeyError, TypeError):  # none yet, or none that can be read
        return None


def read_results(file: Path) -> dict[str, Any]:
    """results.json of an earlier run; ValueError where it is something else."""
    remedy = "give results.json of an earlier run; a model is evaluated by a command of its own"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"--compare {file}: cannot be read ({error}); {remedy}") from None
    if not isinstance(values, dict) or "format" not in values or not isinstance(values.get("tasks"), dict):
        raise ValueError(f"--compare {file}: is no result of remit eval; {remedy}")
    if values["format"] != FORMAT:
        raise ValueError(
            f"--compare {file}: has format {values['format']}, expected {FORMAT}: another version of remit wrote it; evaluate "
            "that model again"
        )
    return values


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all: a kill leaves the file that was there."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    LocalStore(file.parent).replace(file.name, text.encode())


def averages(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each suite of the results the mean over its tasks, in shares; none without a suite, or of one that is not known.

    whole: of all its tasks that every version of the harness has, and of all their questions.
    """
    found = {}
    for name in (values["suite"] or "").split(","):
        suite = SUITES.get(name, ())
        there = [values["tasks"][task.task]["value"] for task in suite if task.task in values["tasks"]]
        if there:
            missing = [task for task in suite if task.task not in values["tasks"] and not task.optional]
            whole = not missing and values["settings"]["limit"] is None
            found[name] = {"value": fmean(there), "num_tasks": len(there), "whole": whole}
    return found


def group_means(values: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """For each group of a suite's tasks the mean over those that are there, in shares; none without a suite."""
    return {
        group: {"value": fmean(values["tasks"][task]["value"] for task in tasks), "tasks": tasks}
        for group, tasks in tasks_by_group(values).items()
    }


def tasks_by_group(values: dict[str, Any]) -> dict[str, list[str]]:
    """The tasks of results by their group, in the order of the tables; {} without a suite."""
    if values["suite"] is None:
        return {}
    groups = {group: [task for task in values["tasks"] if group_of_task(task) == group] for group in GROUPS}
    return {group: tasks for group, tasks in groups.items() if tasks}


def to_record(task: SuiteTask, results: Any, own_prompts: bool = False) -> dict[str, Any]:
    """What is kept of the harness' results: all values, and each question's value of the metric for the table.

    samples: for each task of a group [hash of the question, value] in the harness' order; not for values that are no
    numbers. questions: one hash of all questions. own_prompts: a chat template wraps them, so that equal questions have other
    prompts for another model. ValueError where the metric is missing.
    """
    name = task.task
    table = dict(results["results"]) | dict(results.get("groups") or {})
    values = {key: value for key, value in table.get(name, {}).items() if "," in key}
    metric = task.metric or next((key for key in values if "_stderr," not in key), None)
    if metric is None or not isinstance(values.get(metric), int | float):
        raise ValueError(f"{name}: the harness gives {', '.join(values) or 'no metric'}, expected {metric or 'one'}")
    if not math.isfinite(values[metric]):
        raise ValueError(f"{name}: {metric} is {values[metric]}, expected a finite number; look at the model's weights")
    key, filter_name = metric.split(",", 1)
    samples, questions = {}, hashlib.sha256()
    for part, rows in sorted(results["samples"].items()):
        rows = [row for row in rows if row["filter"] == filter_name]
        hashes = [_question(row, own_prompts) for row in rows]
        questions.update(json.dumps([part, hashes]).encode())
        pairs = [[hash_, float(row[key])] for hash_, row in zip(hashes, rows) if isinstance(row.get(key), int | float)]
        if pairs:
            samples[part] = pairs
    stderr = values.get(f"{key}_stderr,{filter_name}")
    return {
        "label": task.label,
        "task": name,
        "settings": {"num_fewshot": task.shots},
        "metric": metric,
        "higher_is_better": (results.get("higher_is_better") or {}).get(name, {}).get(key),
        "value": float(values[metric]),
        "stderr": float(stderr) if isinstance(stderr, int | float) and stderr == stderr else None,
        "questions": questions.hexdigest(),
        "samples": samples,
        "shots": dict(results["n-shot"]),
        "task_versions": {task: str(value) for task, value in results["versions"].items()},
        "num_samples": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "all": {task: {key: _plain(value) for key, value in row.items()} for task, row in table.items()},
    }


def _question(row: dict[str, Any], own_prompts: bool) -> str:
    """A hash of a question as it was asked: its document and target, and its requests, of which the prompt comes first."""
    requests = [list(request)[own_prompts:] for request in row["arguments"]]
    text = json.dumps([row["doc_hash"], row["target_hash"], requests], default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _plain(value: Any) -> Any:
    """A value that JSON has; the harness' "N/A" and what is no number as text."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else str(value)
