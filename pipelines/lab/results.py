"""From the done stages of a seed to one file of numbers, LAB/results/seed-N.json, and a table for the terminal.

    {"seed", "size", "recipe", "seconds", "versions", "code",
     "measurements": [{"arm", "stage", "metric", "value", "step"}]}

versions, code: all that any of its stages ran with. stage: pretrained, mid, sft, dpo or rl. step: optimizer steps done where the value is of the middle of a run, else null.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.flywheel.records import Places, Record
from pipelines.lab.graph import Seed
from pipelines.lab.measure import RESULT
from shards.part import encode_json
from shards.store import LocalStore

POINTS = 20  # of a curve that has a value for every step


def collect(seed: Seed, records: Mapping[str, Record], places: Places) -> dict[str, Any]:
    """The numbers of a seed, all of whose stages are in `records`."""
    measurements: list[dict[str, Any]] = []

    def add(arm: str, stage: str, metric: str, value: float, step: int | None = None) -> None:
        measurements.append({"arm": arm, "stage": stage, "metric": metric, "value": value, "step": step})

    def output(name: str) -> Path:
        return places.folder / records[name]["output"]

    for (arm, kind), stage in seed.measured.items():
        for metric, value in read(output(stage.name) / RESULT).items():
            add(arm, kind, metric, value)
    for arm, stage in seed.curves.items():
        for number, metrics in read(output(stage.name) / RESULT).items():
            for metric, value in metrics.items():
                add(arm, "mid", metric, value, int(number))
    for (arm, kind), stage in seed.models.items():
        run = output(stage.name)
        if kind == "mid":
            for line in read_lines(run / "evaluation.jsonl"):
                add(arm, "mid", "loss_heldout", line["loss"], line["step"])
            for step, means in curve(read_lines(run / "metrics.jsonl"), ("grad_norm", "clipped_low", "clipped_high")):
                for metric, value in means.items():
                    add(arm, "mid", metric, value, step)
        elif kind == "rl":
            for step, means in curve(read_lines(run / "metrics.jsonl"), ("reward", "entropy", "grad_norm")):
                for metric, value in means.items():
                    add(arm, "rl", f"train_{metric}", value, step)
    names = [stage.name for stage in seed.stages]
    return {
        "seed": seed.seed,
        "size": seed.size,
        "recipe": asdict(seed.recipe),
        "seconds": {name.partition("/")[2]: records[name]["seconds"] for name in names},
        "versions": {
            package: sorted(
                {records[name]["versions"][package] for name in names if package in records[name]["versions"]}
            )
            for package in sorted({package for name in names for package in records[name]["versions"]})
        },
        "code": sorted({records[name].get("code", "not known") for name in names}),
        "measurements": measurements,
    }


def curve(lines: list[dict[str, Any]], metrics: tuple[str, ...]) -> list[tuple[int, dict[str, float]]]:
    """At most POINTS points of a log with a line per step: (last step, means over the steps since the point before)."""
    length = max(1, -(-len(lines) // POINTS))
    points = []
    for start in range(0, len(lines), length):
        group = lines[start : start + length]
        means = {}
        for metric in metrics:
            values = [line[metric] for line in group if line.get(metric) is not None]
            if values:
                means[metric] = sum(values) / len(values)
        points.append((group[-1]["step"], means))
    return points


def write(folder: Path, result: dict[str, Any]) -> Path:
    """Write LAB/results/seed-N.json, whole."""
    name = f"results/seed-{result['seed']}.json"
    LocalStore(folder).replace(name, encode_json(result))
    return folder / name


def table(result: dict[str, Any]) -> str:
    """Greedy and sampled accuracy, losses and KL of every model, one a line."""
    columns = ("greedy_easy", "greedy_hard", "greedy_all", "sampled_all", "loss_solutions", "loss_stories",
               "loss_notes", "kl_reference")  # fmt: skip
    rows: dict[tuple[str, str], dict[str, float]] = {}
    for entry in result["measurements"]:
        if entry["step"] is None:
            rows.setdefault((entry["arm"], entry["stage"]), {})[entry["metric"]] = entry["value"]
    lines = [f"{'arm':<11} {'stage':<10} " + " ".join(f"{name.replace('_', ' '):>14}" for name in columns)]
    for (arm, stage), values in rows.items():
        cells = []
        for name in columns:
            value = values.get(name)
            percent = name.startswith(("greedy", "sampled"))
            cells.append("-" if value is None else f"{100 * value:.1f} %" if percent else f"{value:.4f}")
        lines.append(f"{arm:<11} {stage:<10} " + " ".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
