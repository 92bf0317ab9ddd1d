"""A training run as remit report shows it: what run.json, metrics.jsonl and evaluation.jsonl hold, thinned.

In: the OUT of remit train, finished or not, also of an older version with fewer figures. Out: a Run, whose curves have
one value per point. A point is the mean over a window of steps and stands at its last step; windows are counted from
the end, so that the last step is always the end of a whole window. Rates count by the time that a step took and figures
of a source by its tokens, so that a window shows what all of it came to. n = points.
"""

import json
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

MAX_POINTS = 2000  # of a curve
MAX_COLUMNS = 250  # of a heat map
OF_A_STEP = (
    *("loss", "ntp_loss", "weight_mean", "weight_std", "clipped_low", "clipped_high", "delta_mean", "kd_loss"),
    *("missing_mass", "grad_norm", "lr", "tokens_per_second", "peak_memory_bytes"),
)
OF_A_SOURCE = ("ntp_loss", "weight_mean")
BY_TIME = ("tokens_per_second", "data_wait_share")


@dataclass
class Run:
    """name: the shortest end of its path that no other run of the report has. steps_n, tokens_n: at which the points
    stand. curves: by figure; sources: by corpus source and figure; None where a point has no such figure.
    heat_edges: steps (and tokens) between which each column lies, one more than columns; heat: share of the tokens in
    each bin of weight, by bin and column. held_out: (step, tokens, loss); exported: held-out loss of the
    exported models, by step; held_out_sets: what these losses are over, tokens and checksum of the manifest, None where it
    is not written; more than one where it changed on the way. hours: of steps, from tokens per second. missing: first and
    last of each stretch of steps that metrics.jsonl does not have."""

    name: str
    settings: dict[str, Any]
    finished: bool
    window: int = 1
    steps_n: list[int] = field(default_factory=list)
    tokens_n: list[float | None] = field(default_factory=list)
    curves: dict[str, list[float | None]] = field(default_factory=dict)
    sources: dict[str, dict[str, list[float | None]]] = field(default_factory=dict)
    heat_window: int = 1
    heat_edges: dict[str, list[float | None]] = field(default_factory=dict)
    heat: dict[str, list[float]] = field(default_factory=dict)
    held_out: list[tuple[int, float | None, float]] = field(default_factory=list)
    exported: dict[int, float] = field(default_factory=dict)
    held_out_sets: list[tuple[float | None, str | None]] = field(default_factory=list)
    last: dict[str, float] = field(default_factory=dict)
    num_steps: int = 0
    tokens: float | None = None
    hours: float | None = None
    damaged: str | None = None
    missing: list[tuple[int, int]] = field(default_factory=list)


def read_run(out: Path, max_points: int = MAX_POINTS, progress: Callable[[int], None] = lambda size: None) -> Run:
    """The run in `out`; its name is set by `name_runs`. progress is told the bytes of each line read.

    ValueError where `out` is no run, or where a line but the last of its metrics is damaged.
    """
    settings = read_settings(out)
    run = Run(out.name, settings, (out / "model").exists())
    evaluations = [line for line, _ in read_lines(out / "evaluation.jsonl", run)]
    losses = {line["step"]: number(line.get("loss")) for line in evaluations}
    exported = {line["step"]: number(line.get("exported_loss")) for line in evaluations}
    run.exported = {step: loss for step, loss in exported.items() if loss is not None}
    run.held_out_sets = list(
        dict.fromkeys((number(line.get("tokens")), line.get("manifest_sha256")) for line in evaluations)
    )
    metrics = out / "metrics.jsonl"
    run.num_steps = sum(1 for _ in read_lines(metrics, run))
    run.window = math.ceil(run.num_steps / max_points) or 1
    run.heat_window = math.ceil(run.num_steps / MAX_COLUMNS) or 1
    points, columns = Windows(run.num_steps, run.window), Windows(run.num_steps, run.heat_window)
    means = Means()
    by_source: dict[str, Means] = {}
    counts: dict[str, float] = {}
    seconds, tokens_at = Sum(), dict[int, float | None]({0: 0.0})
    tokens: float | None = 0.0
    last_step = 0

    # a run that is going on may have more lines by now
    for line, size in islice(read_lines(metrics, None), run.num_steps):
        step, tokens_before, tokens = line["step"], tokens, number(line.get("tokens"))
        if step != last_step + 1:
            run.missing.append((last_step + 1, step - 1))
            tokens_before = None  # more than this step's lie between the two
        last_step = step
        if not run.heat_edges:
            tokens_before = tokens_before if step == 1 else None
            run.heat_edges = {"step": [step - 0.5], "tokens": [tokens_before]}
        figures = step_figures(line, tokens_before)
        took = figures.pop("seconds", None)
        seconds.add(took)
        means.add(figures, dict.fromkeys(BY_TIME, took or 1.0))
        sources = line.get("sources")
        for name, own in sources.items() if isinstance(sources, dict) else ():
            if isinstance(own, dict):
                weights = dict.fromkeys(OF_A_SOURCE, number(own.get("predicted_tokens")) or 1.0)
                by_source.setdefault(name, Means()).add({key: number(own.get(key)) for key in OF_A_SOURCE}, weights)
        for centre, count in weight_bins(line):
            counts[centre] = counts.get(centre, 0) + count
        if step in losses:
            tokens_at[step] = tokens
        if points.ends_here():
            close_point(run, step, tokens, means, by_source)
        if columns.ends_here():
            close_column(run, step, tokens, counts)
        run.tokens = tokens
        run.last = {key: value for key, value in figures.items() if value is not None}
        progress(size)
    run.hours = seconds.total / 3600 if seconds.count else None
    run.held_out = [(step, tokens_at.get(step), loss) for step, loss in sorted(losses.items()) if loss is not None]
    for curves in (run.curves, *run.sources.values()):
        for key in [key for key, values in curves.items() if all(value is None for value in values)]:
            del curves[key]  # a figure that this version of the trainer did not write
    return run


def read_settings(out: Path) -> dict[str, Any]:
    """run.json; ValueError where there is none that can be read."""
    path = out / "run.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "holds no run.json, so it is not a run of remit train" if out.is_dir() else "no such folder"
        raise ValueError(f"{out}: {what}; give the --out of remit train") from None
    except NotADirectoryError:
        raise ValueError(f"{out}: is a file; give the --out of remit train") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({' '.join(str(error).split())}); restore it") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{path}: is not a JSON object, so {out} is not a run of remit train")
    return settings


def read_lines(path: Path, run: Run | None) -> Iterator[tuple[dict[str, Any], int]]:
    """Each object of a file of JSON lines with ascending steps, and its size in bytes. A damaged last line is left out,
    and noted in `run`: it was being written when the run was killed, or is right now."""
    if not path.exists():
        return
    problem, last_step = None, -1
    with open(path, "rb") as file:
        for index, text in enumerate(file, start=1):
            if not text.strip():
                continue
            if problem is not None:
                raise ValueError(f"{path}: {problem}, and lines follow it; take it out or restore the file")
            try:
                line = json.loads(text)
            except ValueError:  # UnicodeDecodeError too
                line = None
            if not isinstance(line, dict) or type(line.get("step")) is not int:
                problem = f"line {index} is not a JSON object with a step"
            elif line["step"] <= last_step:
                problem = f"line {index} has step {line['step']}, the one before it {last_step}"
            else:
                last_step = line["step"]
                yield line, len(text)
    if problem is not None and run is not None:
        run.damaged = f"{path.name}: {problem}; left out, as the last one"


def number(value: Any) -> float | None:
    """`value` where it is a finite number, else None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None


def step_figures(line: dict[str, Any], tokens_before: float | None) -> dict[str, float | None]:
    """Figures of one step, those that follow from several of its fields included."""
    figures = {key: number(line.get(key)) for key in OF_A_STEP}
    quantiles = line.get("delta_quantiles")
    for share, value in quantiles.items() if isinstance(quantiles, dict) else ():
        if re.fullmatch(r"0\.\d+", share):
            figures[f"delta_quantile_{share}"] = number(value)
    predicted, effective = number(line.get("predicted_tokens")), number(line.get("effective_tokens"))
    figures["effective_share"] = effective / predicted if predicted and effective is not None else None
    tokens, speed = number(line.get("tokens")), figures["tokens_per_second"]
    wait = number(line.get("data_wait_seconds"))
    if tokens is not None and tokens_before is not None and speed:
        figures["seconds"] = (tokens - tokens_before) / speed
        figures["data_wait_share"] = wait / figures["seconds"] if wait is not None and figures["seconds"] else None
    return figures


def weight_bins(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Centre of each bin of weight, as written, and the tokens in it."""
    histogram = line.get("weight_histogram")
    for centre, count in histogram.items() if isinstance(histogram, dict) else ():
        if re.fullmatch(r"\d+\.\d\d", centre):
            yield centre, number(count) or 0.0


class Windows:
    """Divides steps into windows of `size`, counted from the end: only the first may be shorter."""

    def __init__(self, num_steps: int, size: int) -> None:
        self._left, self._size = num_steps, size

    def ends_here(self) -> bool:
        """Whether the step that is asked about, one after the other, is the last of its window."""
        self._left -= 1
        return self._left % self._size == 0


@dataclass
class Sum:
    """Sum of what is not None, each times its weight, and of the weights."""

    total: float = 0.0
    count: float = 0.0

    def add(self, value: float | None, weight: float = 1.0) -> None:
        if value is not None:
            self.total += value * weight
            self.count += weight


class Means:
    """Weighted means of figures since they were last asked for."""

    def __init__(self) -> None:
        self._sums: dict[str, Sum] = {}

    def add(self, figures: dict[str, float | None], weights: dict[str, float]) -> None:
        """weights: those that are not 1."""
        for key, value in figures.items():
            self._sums.setdefault(key, Sum()).add(value, weights.get(key, 1.0))

    def take(self) -> dict[str, float | None]:
        means = {key: sum_.total / sum_.count if sum_.count else None for key, sum_ in self._sums.items()}
        self._sums = {key: Sum() for key in means}
        return means


def close_point(run: Run, step: int, tokens: float | None, means: Means, by_source: dict[str, Means]) -> None:
    """End a window of the curves at `step`."""
    run.steps_n.append(step)
    run.tokens_n.append(tokens)
    extend(run.curves, means.take(), len(run.steps_n))
    for name, own in by_source.items():
        extend(run.sources.setdefault(name, {}), own.take(), len(run.steps_n))


def extend(curves: dict[str, list[float | None]], values: dict[str, float | None], num_points: int) -> None:
    """Add a value to each curve; one that begins late, or is not there now, gets None in between."""
    for key in {**curves, **values}:
        curve = curves.setdefault(key, [None] * (num_points - 1))
        curve.append(values.get(key))


def close_column(run: Run, step: int, tokens: float | None, counts: dict[str, float]) -> None:
    """End a column of the heat map at `step`, and empty `counts`."""
    columns = len(run.heat_edges["step"])
    run.heat_edges["step"].append(step + 0.5)
    run.heat_edges["tokens"].append(tokens)
    total = sum(counts.values())
    for centre in {**run.heat, **counts}:
        row = run.heat.setdefault(centre, [0.0] * (columns - 1))
        row.append(counts.get(centre, 0.0) / total if total else 0.0)
    counts.clear()


def name_runs(runs: list[Run], folders: list[Path]) -> None:
    """Give each run the shortest end of its path, in whole folders, that is its own."""
    parts = [folder.absolute().resolve().parts for folder in folders]
    for index, run in enumerate(runs):
        for length in range(1, len(parts[index]) + 1):
            run.name = "/".join(parts[index][-length:])
            if all(other[-length:] != parts[index][-length:] for i, other in enumerate(parts) if i != index):
                break
