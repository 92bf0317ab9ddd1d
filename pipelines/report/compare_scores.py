"""What remit compare says of task scores: the newest step at which all runs were evaluated on tasks (--eval-tasks)."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipelines.beside.scores import is_share, read_scores
from pipelines.evaluation.compare import compare
from pipelines.evaluation.tables import verdict, with_error


def score_lines(runs: Sequence[Path], names: Sequence[str]) -> list[str]:
    """The first run with each of the others, task by task, with paired errors; none where they have no step in common."""
    tables = [{line["step"]: line for line in read_scores(run) if "skipped" not in line} for run in runs]
    common = set.intersection(*map(set, tables))
    step = max(common, default=0)
    files = [run / table[step]["results"] for run, table in zip(runs, tables)] if step else []
    if not files or not all(file.exists() for file in files):
        return []
    first, *others = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    said = [f"Task scores after {step:,} steps:"]
    for name, own in zip(names[1:], others):
        comparison = compare(names[0], first, own)
        for task, row in comparison["tasks"].items():
            said.append(_row(name, own["tasks"][task], names[0], first["tasks"][task], row))
        mean = comparison["mean"]
        if mean is not None and mean["num_tasks"] > 1:
            what = f"mean over {mean['num_tasks']} tasks"
            said.append(f"  {what}, {name} - {names[0]}: {with_error(mean, 'difference', 100)} %, {verdict(mean)}")
    return said


def _row(name: str, own: dict[str, Any], other_name: str, other: dict[str, Any], row: dict[str, Any]) -> str:
    if "not_compared" in row:
        return f"  {own['label']}: {name} and {other_name} do not compare: {row['not_compared']}"
    factor, unit = (100, " %") if is_share(own) and is_share(other) else (1, "")
    values = [
        f"{factor * entry['value']:.{2 if unit else 4}f}{unit} ({whose})"
        for entry, whose in ((own, name), (other, other_name))
    ]
    return f"  {own['label']}: {', '.join(values)}, {with_error(row, 'difference', factor)}{unit}, {verdict(row)}"
