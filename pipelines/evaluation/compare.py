"""Differences between two evaluated models, with their standard errors: results in, figures out.

A difference is claimed only where it is more than 1.96 standard errors, never where its error is not known.
"""

import math
from statistics import fmean, stdev
from typing import Any

CONFIDENCE = 1.96  # standard errors: 95 % of a normal distribution
SHOULD_AGREE = ("backend", "dtype", "versions")  # or values may differ of equal models
MUST_AGREE = ("limit", "chat_template", "seed", "max_length")  # or the questions differ


def compare(name: str, other: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """`ours` minus `other`, task by task and in the mean; both as pipelines.evaluation.run writes results.json.

    name: of the other. Each task has difference, stderr (None: not known), paired, num_questions and claim: higher,
    lower or none; or only not_compared, the reason. tasks_alone: those that just one of them has. settings_differ: of
    SHOULD_AGREE, in words. The mean's error is not known where one task's is not, or is zero beside a difference, or where
    a question counts in two tasks. There is no mean where a task's value is no share (`is_share`).
    """
    both = [task for task in ours["tasks"] if task in other["tasks"]]
    clash = next((key for key in MUST_AGREE if other["settings"].get(key) != ours["settings"].get(key)), None)
    rows = {task: compare_task(other["tasks"][task], ours["tasks"][task]) for task in both}
    if clash is not None:
        reason = f"{clash} is {ours['settings'].get(clash)} and {other['settings'].get(clash)}"
        rows = {task: {"not_compared": reason} for task in both}
    compared = [row for row in rows.values() if "difference" in row]
    values: dict[str, Any] = {"other": name, "tasks": rows, "mean": None}
    values["settings_differ"] = []
    values["higher_is_better"] = {task: ours["tasks"][task].get("higher_is_better") for task in both}
    values["tasks_alone"] = sorted(set(ours["tasks"]) ^ set(other["tasks"]))
    if compared:
        values["settings_differ"] = settings_differ(other["settings"], ours["settings"])
    if compared and all(is_share(side["tasks"][task]) for side in (other, ours) for task in rows):
        errors = [row["stderr"] if row["stderr"] or row["difference"] == 0 else None for row in compared]
        names = [name for task, row in rows.items() if "difference" in row for name in ours["tasks"][task]["samples"]]
        if len(set(names)) < len(names):  # a group and one of its tasks: their errors are not independent
            errors = [None]
        known = [error for error in errors if error is not None]
        stderr = math.sqrt(sum(error**2 for error in known)) / len(known) if len(known) == len(errors) else None
        difference = fmean(row["difference"] for row in compared)
        values["mean"] = {"difference": difference, "stderr": stderr, "claim": claim(difference, stderr)}
        values["mean"]["num_tasks"] = len(compared)
    return values


def is_share(record: dict[str, Any]) -> bool:
    """Whether a task's value may be a share, of which more is better: a perplexity has no mean with those."""
    return 0 <= record["value"] <= 1 and record.get("higher_is_better") is not False


def settings_differ(other: dict[str, Any], ours: dict[str, Any]) -> list[str]:
    """Which of SHOULD_AGREE differ, as "dtype is float32 and bfloat16", ours first."""
    found = []
    for key in SHOULD_AGREE:
        a, b = ours.get(key), other.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += [
                f"{name} is {a[name]} and {b[name]}" for name in sorted(a.keys() & b.keys()) if a[name] != b[name]
            ]
        elif a != b:
            found.append(f"{key} is {a} and {b}")
    return found


def compare_task(other: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """One task's entry of `compare`."""
    for key in ("metric", "shots", "task_versions"):
        if other[key] != ours[key]:
            return {"not_compared": f"{key} is {ours[key]} and {other[key]}"}
    if other["questions"] != ours["questions"]:
        return {"not_compared": "the questions or their prompts differ"}
    difference = ours["value"] - other["value"]
    pairs = paired_differences(other, ours)
    # the mean over questions is the metric of nearly all tasks; where it is not, the pairs say nothing about it
    if pairs and math.isclose(fmean(pairs), difference, abs_tol=1e-9):
        stderr = paired_stderr(pairs)
        return {"difference": difference, "stderr": stderr, "paired": True, "num_questions": len(pairs)} | {
            "claim": claim(difference, stderr)
        }
    unpaired = None
    if other["stderr"] is not None and ours["stderr"] is not None:
        unpaired = math.hypot(other["stderr"], ours["stderr"])
    number = sum(ours["num_samples"].values())
    return {"difference": difference, "stderr": unpaired, "paired": False, "num_questions": number} | {
        "claim": claim(difference, unpaired)
    }


def paired_differences(other: dict[str, Any], ours: dict[str, Any]) -> list[float]:
    """Ours minus other for each question; empty where the two have no values of the same ones in the same order."""
    rows = [row for task in sorted(ours["samples"]) for row in ours["samples"][task]]
    others = [row for task in sorted(other["samples"]) for row in other["samples"][task]]
    if [key for key, _ in rows] != [key for key, _ in others]:
        return []
    return [value - before for (_, value), (_, before) in zip(rows, others)]


def paired_stderr(differences: list[float]) -> float | None:
    """Standard error of their mean, sd / sqrt(n) with n - 1 in the sd; None with fewer than two."""
    return stdev(differences) / math.sqrt(len(differences)) if len(differences) > 1 else None


def claim(difference: float, stderr: float | None) -> str:
    """higher, lower, or none. An error of zero is that of too few questions: nothing is claimed from it."""
    if not stderr or abs(difference) <= CONFIDENCE * stderr:
        return "none"
    return "higher" if difference > 0 else "lower"
