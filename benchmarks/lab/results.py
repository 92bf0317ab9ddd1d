"""The numbers of a laboratory: LAB/results.parquet, written seed by seed, and read for the report.

One row is one number: seed, arm, stage, metric, step, value.

    stage   pretrained, mid, sft, dpo or rl: the training that the model had last
    step    optimizer steps done, where the value belongs to a curve within the stage; null for the finished model

What each seed ran with is a JSON list in the file's metadata, under the key "seeds":
    [{"seed", "size", "recipe", "seconds": {stage of the graph: seconds}, "versions": {package: [...]}, "code": [...]}]
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.store import LocalStore

if TYPE_CHECKING:
    from benchmarks.lab.graph import Seed

FILE = "results.parquet"
SCHEMA = pa.schema(
    [
        pa.field("seed", pa.int32(), nullable=False),
        pa.field("arm", pa.string(), nullable=False),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("step", pa.int32()),
        pa.field("value", pa.float64()),
    ]
)
ABOUT = ("seed", "size", "recipe", "seconds", "versions", "code")
RESULT = "measurements.json"  # that benchmarks.lab.measure writes into its output folder
POINTS = 20  # of a curve that has a value for every step
OF_STEPS = ("grad_norm", "clipped_low", "clipped_high", "gated", "gate_without_topk")  # of mid-training

Key = tuple[str, str, str]
"""arm, stage, metric"""


def collect(
    seed: "Seed",
    outputs: Mapping[str, Path],
    seconds: Mapping[str, float],
    versions: Mapping[str, list[str]],
    code: list[str],
) -> dict[str, Any]:
    """The numbers of a seed whose stages are all done, as `write` and `table` take them.

    outputs: folder of each stage by its name. seconds, versions, code: what the seed's stages took and ran with.
    """
    rows: list[dict[str, Any]] = []

    def add(arm: str, stage: str, metric: str, value: float, step: int | None = None) -> None:
        rows.append({"arm": arm, "stage": stage, "metric": metric, "step": step, "value": value})

    for (arm, kind), stage in seed.measured.items():
        for metric, value in _json(outputs[stage.name] / RESULT).items():
            add(arm, kind, metric, value)
    for arm, stage in seed.curves.items():
        for number, metrics in _json(outputs[stage.name] / RESULT).items():
            for metric, value in metrics.items():
                add(arm, "mid", metric, value, int(number))
    for (arm, kind), stage in seed.models.items():
        run = outputs[stage.name]
        if kind == "mid":
            for line in _json_lines(run / "evaluation.jsonl"):
                add(arm, "mid", "loss_heldout", line["loss"], line["step"])
            for step, means in curve(_json_lines(run / "metrics.jsonl"), OF_STEPS):
                for metric, value in means.items():
                    add(arm, "mid", metric, value, step)
        elif kind == "rl":
            for step, means in curve(_json_lines(run / "metrics.jsonl"), ("reward", "entropy", "grad_norm")):
                for metric, value in means.items():
                    add(arm, "rl", f"train_{metric}", value, step)
    return {
        "seed": seed.seed, "size": seed.size, "recipe": asdict(seed.recipe), "seconds": dict(seconds),
        "versions": dict(versions), "code": code, "measurements": rows,
    }  # fmt: skip


def curve(lines: Sequence[Mapping[str, Any]], metrics: Sequence[str]) -> list[tuple[int, dict[str, float]]]:
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


def write(folder: Path, result: Mapping[str, Any]) -> Path:
    """Put a seed into LAB/results.parquet, in place of what the file has of it. The file is replaced as a whole."""
    path = folder / FILE
    abouts, rows = read_file(path) if path.exists() else ([], SCHEMA.empty_table())
    abouts = [about for about in abouts if about["seed"] != result["seed"]]
    abouts = sorted([*abouts, {key: result[key] for key in ABOUT}], key=lambda about: about["seed"])
    new = pa.Table.from_pylist([{"seed": result["seed"], **row} for row in result["measurements"]], SCHEMA)
    rows = pa.concat_tables([rows.filter(pc.field("seed") != result["seed"]), new]).sort_by("seed")
    sink = pa.BufferOutputStream()
    pq.write_table(rows.replace_schema_metadata({"seeds": json.dumps(abouts)}), sink, compression="zstd")
    LocalStore(folder).replace(FILE, sink.getvalue().to_pybytes())
    return path


def read_file(path: Path) -> tuple[list[dict[str, Any]], pa.Table]:
    """What each seed of a file ran with, and its rows. ValueError for a file that `write` has not written."""
    try:
        rows = pq.read_table(path)
        abouts = json.loads(rows.schema.metadata[b"seeds"])
        rows = rows.replace_schema_metadata(None)
        if not rows.schema.equals(SCHEMA):
            raise TypeError(f"columns {', '.join(map(str, rows.schema))}, expected {', '.join(map(str, SCHEMA))}")
        if not abouts or any(set(about) != set(ABOUT) for about in abouts):
            raise TypeError(f"metadata of a seed, expected {', '.join(ABOUT)}")
        if stray := set(rows["seed"].unique().to_pylist()) - {about["seed"] for about in abouts}:
            raise TypeError(f"rows of the seeds {sorted(stray)}, which its metadata does not have")
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise ValueError(f"{path}: damaged ({error}); delete it and run the same make lab again") from None
    return abouts, rows


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
    """Values that are not finite numbers: they are in no mean, and the report names them."""

    def get(self, arm: str, stage: str, metric: str) -> dict[int, float]:
        """Values by seed; empty where nothing was measured."""
        return self.values.get((arm, stage, metric), {})

    def curve(self, arm: str, stage: str, metric: str) -> dict[int, list[tuple[int, float]]]:
        return self.curves.get((arm, stage, metric), {})

    def metrics(self, stage: str) -> list[str]:
        """Metrics of finished models at that stage, in the order of the file."""
        return list(dict.fromkeys(metric for _, where, metric in self.values if where == stage))

    def arms(self, stage: str) -> list[str]:
        return list(dict.fromkeys(arm for arm, where, _ in self.values if where == stage))


def read(folders: Sequence[Path]) -> Results:
    """All seeds of the folders. ValueError for damaged files, a seed twice, or results that do not go together."""
    results: Results | None = None
    for path in (folder / FILE for folder in folders):
        if not path.exists():
            raise ValueError(f"{path} is missing, expected a folder of make lab with at least one finished seed")
        abouts, rows = read_file(path)
        for about in abouts:
            if results is None:
                results = Results([], about["size"], about["recipe"])
            _add_seed(results, about, path)
        assert results is not None  # a file has at least one seed
        for row in rows.to_pylist():
            _add_row(results, row)
    assert results is not None, "no folders"
    results.seeds.sort()
    for curves in results.curves.values():
        for points in curves.values():
            points.sort()
    return results


def _add_seed(results: Results, about: Mapping[str, Any], path: Path) -> None:
    seed = about["seed"]
    if seed in results.seeds:
        raise ValueError(f"{path}: seed {seed} is in another folder too; give each seed once")
    for what, expected in (("size", results.size), ("recipe", results.recipe)):
        if about[what] != expected:
            raise ValueError(
                f"{path}: the {what} of seed {seed} differs from that of the other seeds, expected the same; a mean over "
                "different experiments says nothing, so keep each size and recipe in a folder of its own"
            )
    results.seeds.append(seed)
    results.seconds[seed] = sum(about["seconds"].values())
    for name, versions in about["versions"].items():
        known = results.versions.setdefault(name, [])
        known += [version for version in versions if version not in known]
    results.code += [code for code in about["code"] if code not in results.code]


def _add_row(results: Results, row: Mapping[str, Any]) -> None:
    seed, step, value = row["seed"], row["step"], row["value"]
    key = (row["arm"], row["stage"], row["metric"])
    if value is None or not math.isfinite(value):
        at = "" if step is None else f" at step {step}"
        results.left_out.append(f"seed {seed}, {', '.join(key)}{at}: the value is {value}, not a finite number")
    elif step is None:
        results.values.setdefault(key, {})[seed] = value
    else:
        results.curves.setdefault(key, {}).setdefault(seed, []).append((step, value))


def table(result: Mapping[str, Any]) -> str:
    """For the terminal: greedy and sampled accuracy, losses and KL of every finished model, one a line."""
    columns = ("greedy_easy", "greedy_hard", "greedy_all", "sampled_all", "loss_solutions", "loss_stories",
               "loss_notes", "kl_reference")  # fmt: skip
    models: dict[tuple[str, str], dict[str, float]] = {}
    for row in result["measurements"]:
        if row["step"] is None:
            models.setdefault((row["arm"], row["stage"]), {})[row["metric"]] = row["value"]
    lines = [f"{'arm':<11} {'stage':<10} " + " ".join(f"{name.replace('_', ' '):>14}" for name in columns)]
    for (arm, stage), values in models.items():
        cells = []
        for name in columns:
            value = values.get(name)
            percent = name.startswith(("greedy", "sampled"))
            cells.append("-" if value is None else f"{100 * value:.1f} %" if percent else f"{value:.4f}")
        lines.append(f"{arm:<11} {stage:<10} " + " ".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
