"""Differences between two evaluated models, with their standard errors: results in, figures out.

A difference is claimed only where it is more than 1.96 standard errors, never where its error is not known.
"""

import math
from statistics import fmean, stdev
from typing import Any

from pipelines.evaluation.results import tasks_by_group

CONFIDENCE = 1.96  # standard errors: 95 % of a normal distribution
SHOULD_AGREE = ("backend", "dtype")  # and versions of libraries, or values may differ of equal models
MUST_AGREE = ("limit", "chat_template", "seed", "max_length")  # or the questions differ


def compare(name: str, other: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`ours` minus `other`, task by task and in the mean; both as pipelines.evaluation.run writes results.json.

    name: of the other. Each task has difference, stderr (None: not known), paired, num_questions and claim: higher,
    lower or none; or only not_compared, the reason. tasks_alone: those that just one of them has. settings_differ: in
    words. There is no mean where a task's value is no share. groups: means over those of each group of a suite's tasks.
    """
    both = [task for task in ours["tasks"] if task in other["tasks"]]
    rows = {task: compare_task(task, other, ours) for task in both}
    compared = [task for task in both if "difference" in rows[task]]
    shares = all(is_share(side["tasks"][task]) for side in (other, ours) for task in both)
    groups = {
        group: [task for task in tasks if task in compared] for group, tasks in tasks_by_group(ours).items() if shares
    }
    return {
        "other": name,
        "tasks": rows,
        "mean": mean_of(rows, compared, ours) if compared and shares else None,
        "groups": {group: mean_of(rows, tasks, ours) for group, tasks in groups.items() if tasks},
        "settings_differ": settings_differ(other["settings"], ours["settings"]) if compared else [],
        "higher_is_better": {task: ours["tasks"][task].get("higher_is_better") for task in both},
        "tasks_alone": sorted(set(ours["tasks"]) ^ set(other["tasks"])),
    }


def compare_task(task: str, other_results: dict[str, Any], our_results: dict[str, Any]) -> dict[str, Any]:
    """One task's entry of `compare`."""
    other, ours = other_results["tasks"][task], our_results["tasks"][task]
    for keys, a, b in (
        (MUST_AGREE, our_results["settings"], other_results["settings"]),
        (("metric", "shots", "task_versions"), ours, other),
    ):
        for key in keys:
            if a.get(key) != b.get(key):
                return {"not_compared": f"{key} is {a.get(key)} and {b.get(key)}"}
    if other["questions"] != ours["questions"]:
        return {"not_compared": "the questions or their prompts differ"}
    difference = ours["value"] - other["value"]
    pairs = paired_differences(other, ours)
    # the mean over questions is the metric of nearly all tasks; where it is not, the pairs say nothing about it
    paired = bool(pairs) and math.isclose(fmean(pairs), difference, abs_tol=1e-9)
    if paired:
        stderr = stdev(pairs) / math.sqrt(len(pairs)) if len(pairs) > 1 else None
    else:
        errors = (other["stderr"], ours["stderr"])
        stderr = None if None in errors else math.hypot(*errors)
    return {
        "difference": difference,
        "stderr": stderr,
        "paired": paired,
        "num_questions": len(pairs) if paired else sum(ours["num_samples"].values()),
        "claim": claim(difference, stderr),
    }


def paired_differences(other: dict[str, Any], ours: dict[str, Any]) -> list[float]:
    """Ours minus other for each question; empty where the two have no values of the same ones in the same order."""
    rows, others = (
        [row for task in sorted(record["samples"]) for row in record["samples"][task]] for record in (ours, other)
    )
    if [key for key, _ in rows] != [key for key, _ in others]:
        return []
    return [value - before for (_, value), (_, before) in zip(rows, others)]


def mean_of(rows: dict[str, Any], compared: list[str], ours: dict[str, Any]) -> dict[str, Any]:
    """The mean over the tasks that are compared. Its error is not known where one task's is not, or is zero beside a
    difference, or where a question counts in two tasks: a group and one of its tasks are not independent."""
    difference = fmean(rows[task]["difference"] for task in compared)
    errors = [rows[task]["stderr"] for task in compared if rows[task]["stderr"] or rows[task]["difference"] == 0]
    parts = [part for task in compared for part in ours["tasks"][task]["samples"]]
    known = len(errors) == len(compared) and None not in errors and len(set(parts)) == len(parts)
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(errors) if known else None
    return {
        "difference": difference,
        "stderr": stderr,
        "claim": claim(difference, stderr),
        "num_tasks": len(compared),
    }


def is_share(record: dict[str, Any]) -> bool:
    """Whether a task's value may be a share, of which more is better: a perplexity has no mean with those."""
    return 0 <= record["value"] <= 1 and record.get("higher_is_better") is not False


def settings_differ(other: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Which of SHOULD_AGREE and of the versions that both have differ, as "dtype is float32 and bfloat16", ours first."""
    versions, others = ours.get("versions", {}), other.get("versions", {})
    pairs = [(key, ours.get(key), other.get(key)) for key in SHOULD_AGREE]
    pairs += [(name, versions[name], others[name]) for name in sorted(versions.keys() & others.keys())]
    return [f"{name} is {a} and {b}" for name, a, b in pairs if a != b]


def claim(difference: float, stderr: float | None) -> str:
    """higher, lower, or none. An error of zero is that of too few questions: nothing is claimed from it."""
    if not stderr or abs(difference) <= CONFIDENCE * stderr:
        return "none"
    return "higher" if difference > 0 else "lower"
