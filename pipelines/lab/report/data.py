"""Read LAB/results/seed-N.json of one or several laboratories, and look values up by arm, stage, metric and seed.

    {"seed": N, "size": "...", "measurements": [{"arm", "stage", "metric", "value", "step"}, ...], ...}

stage: pretrained, mid, sft, dpo or rl. step: null for the finished model, else of a curve within the stage. What is no
finite number is left out and named in `Results.left_out`, so that no mean hides it.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[str, str, str]
"""arm, stage, metric"""


@dataclass
class Results:
    """values[arm, stage, metric][seed]; curves[arm, stage, metric][seed] = [(step, value), ...] by rising step."""

    seeds: list[int]
    size: str
    recipe: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, list[str]] = field(default_factory=dict)
    code: list[str] = field(default_factory=list)
    """Fingerprints of the code that the stages ran with: one, unless it was changed in between."""
    seconds: dict[int, float] = field(default_factory=dict)
    values: dict[Key, dict[int, float]] = field(default_factory=dict)
    curves: dict[Key, dict[int, list[tuple[int, float]]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def get(self, arm: str, stage: str, metric: str) -> dict[int, float]:
        """Values by seed; empty where nothing was measured."""
        return self.values.get((arm, stage, metric), {})

    def curve(self, arm: str, stage: str, metric: str) -> dict[int, list[tuple[int, float]]]:
        return self.curves.get((arm, stage, metric), {})

    def metrics(self, stage: str) -> list[str]:
        """Those that some arm has of finished models at that stage, in the order of the files."""
        return list(dict.fromkeys(metric for _, where, metric in self.values if where == stage))

    def arms(self, stage: str) -> list[str]:
        return list(dict.fromkeys(arm for arm, where, _ in self.values if where == stage))


def read_results(folders: Sequence[Path]) -> Results:
    """All seeds of the folders; ValueError for damaged files, a seed twice, or results that do not go together."""
    files = [file for folder in folders for file in sorted((folder / "results").glob("seed-*.json"))]
    if not files:
        names = ", ".join(map(str, folders))
        raise ValueError(f"{names}: no results/seed-N.json, expected those of make lab, at least one seed finished")
    results: Results | None = None
    for file in files:
        record = _read(file)
        if results is None:
            results = Results([], record["size"], record.get("recipe") or {})
        if record["seed"] in results.seeds:
            raise ValueError(f"{file}: seed {record['seed']} is there twice; give each seed once")
        for what, value in (("size", results.size), ("recipe", results.recipe)):
            if (record.get(what) or type(value)()) != value:
                raise ValueError(
                    f"{file}: its {what} differs from that of the other seeds, expected the same; a mean over different "
                    "experiments says nothing"
                )
        _add(results, record)
    assert results is not None
    results.seeds.sort()
    return results


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(record["seed"], int) or not isinstance(record["size"], str):
            raise TypeError("seed is a whole number, size a text")
        for entry in record["measurements"]:
            for name in ("arm", "stage", "metric"):
                if not isinstance(entry[name], str):
                    raise TypeError(f"{name} is {entry[name]!r}, expected a text")
            if not isinstance(entry["value"], int | float | None) or isinstance(entry["value"], bool):
                raise TypeError(f"value is {entry['value']!r}, expected a number")
            if not isinstance(entry.get("step"), int | None):
                raise TypeError(f"step is {entry['step']!r}, expected a whole number or null")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{file}: damaged ({error!r}); run make lab again for this seed, or leave the file out"
        ) from None
    return record


def _add(results: Results, record: dict[str, Any]) -> None:
    seed = record["seed"]
    results.seeds.append(seed)
    results.seconds[seed] = sum((record.get("seconds") or {}).values())
    for name, versions in (record.get("versions") or {}).items():
        known = results.versions.setdefault(name, [])
        known += [version for version in versions if version not in known]
    results.code += [code for code in record.get("code") or [] if code not in results.code]
    for entry in record["measurements"]:
        key = (entry["arm"], entry["stage"], entry["metric"])
        value, step = entry["value"], entry.get("step")
        if value is None or not math.isfinite(value):
            at = "" if step is None else f" at step {step}"
            results.left_out.append(f"seed {seed}, {key[0]}, {key[1]}, {key[2]}{at}: {value}, no number")
        elif step is None:
            results.values.setdefault(key, {})[seed] = float(value)
        else:
            results.curves.setdefault(key, {}).setdefault(seed, []).append((step, float(value)))
    for curve in results.curves.values():
        if seed in curve:
            curve[seed].sort()
