"""The figures of a training run, as tables, and thinned to the points that a page draws.

In: the OUT of remit train, finished or not, also of an older version with fewer figures. Out: a Run. A point is the mean
over a window of steps and stands at its last step; windows are counted from the end, so that the last one is whole.
Rates count by the time that a step took and figures of a source by its tokens, so that a point shows what all of its
window came to.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.report.runs import EVALUATION, METRICS, characters, finite, read_lines, read_settings

OF_A_STEP = (
    *("tokens", "predicted_tokens", "loss", "ntp_loss", "weight_mean", "weight_std", "clipped_low", "clipped_high"),
    *("effective_tokens", "delta_mean", "kd_loss", "missing_mass", "router_aux_loss", "grad_norm", "lr"),
    *("tokens_per_second", "data_wait_seconds", "peak_memory_bytes"),
)
OF_A_SOURCE = ("predicted_tokens", "ntp_loss", "weight_mean")
BY_TIME = ["tokens_per_second", "data_wait_share"]


@dataclass
class Run:
    """Each table has a row per step (its index) that metrics.jsonl has, and NaN where a step has no such figure.

    steps: a column per figure; bins: tokens in each bin of weight, by its centre; quantiles: of the excess loss, by
    share; sources: figures of each corpus source; evaluations: lines of evaluation.jsonl; damaged: what was left out.
    """

    name: str
    settings: dict[str, Any]
    finished: bool
    steps: pd.DataFrame
    bins: pd.DataFrame
    quantiles: pd.DataFrame
    sources: dict[str, pd.DataFrame]
    evaluations: list[dict[str, Any]]
    damaged: str | None = None

    @property
    def hours(self) -> float:
        """Of the steps, from tokens per second; NaN where no step says it."""
        return self.steps["seconds"].sum(min_count=1) / 3600

    @property
    def missing(self) -> list[tuple[int, int]]:
        """First and last of each stretch of steps that metrics.jsonl does not have."""
        steps = [0, *self.steps.index]
        return [(before + 1, step - 1) for before, step in pairwise(steps) if step != before + 1]


def read_run(out: Path, name: str, progress: Callable[[int], None] = lambda size: None) -> Run:
    """The run in `out`. ValueError where it is none, or where a line but the last of its metrics is damaged.

    progress: told the bytes of each line read.
    """
    settings, damaged = read_settings(out), list[str]()
    index: list[int] = []
    steps, bins, quantiles = list[dict](), list[dict](), list[dict]()
    sources: dict[str, dict[int, dict]] = {}
    for line in read_lines(out / METRICS, damaged.append, progress):
        index.append(line["step"])
        steps.append({key: finite(line.get(key)) for key in OF_A_STEP})
        bins.append(_numbers(line.get("weight_histogram"), r"\d+\.\d\d"))
        quantiles.append(_numbers(line.get("delta_quantiles"), r"0\.\d+"))
        for source, own in _entries(line.get("sources")):
            if isinstance(own, dict):
                figures = {key: finite(own.get(key)) for key in OF_A_SOURCE}
                sources.setdefault(characters(source), {})[line["step"]] = figures
    evaluations = list(read_lines(out / EVALUATION, damaged.append))
    return Run(
        name,
        settings,
        (out / "model").exists(),
        _derive(_table(steps, index, OF_A_STEP)),
        _table(bins, index),
        _table(quantiles, index),
        {source: _table(list(own.values()), list(own), OF_A_SOURCE).reindex(index) for source, own in sources.items()},
        evaluations,
        "; ".join(damaged) or None,
    )


def _entries(value: Any) -> list[tuple[str, Any]]:
    return list(value.items()) if isinstance(value, dict) else []


def _numbers(value: Any, keys: str) -> dict[str, float | None]:
    """Entries of a JSON object whose keys match, by key."""
    return {key: finite(entry) for key, entry in _entries(value) if re.fullmatch(keys, key)}


def _table(rows: list[dict], index: list[int], columns: tuple[str, ...] = ()) -> pd.DataFrame:
    """Rows of numbers; columns: all names, else those that occur, by their value."""
    names = columns or sorted({key for row in rows for key in row}, key=float)
    return pd.DataFrame(rows, index=pd.Index(index, name="step", dtype="int64"), columns=list(names), dtype="float64")


def _derive(steps: pd.DataFrame) -> pd.DataFrame:
    """The same with figures that follow from several others."""
    before = steps["tokens"].shift()
    if len(steps):
        before.iloc[0] = 0.0
    # the one after a gap has no time of its own: the tokens since the line before it are of several steps
    follows = np.diff(steps.index, prepend=0) == 1
    seconds = (steps["tokens"] - before).where(follows) / steps["tokens_per_second"].where(lambda speed: speed != 0)
    return steps.assign(
        seconds=seconds,
        data_wait_share=steps["data_wait_seconds"] / seconds.where(lambda value: value != 0),
        effective_share=steps["effective_tokens"] / steps["predicted_tokens"].where(lambda count: count != 0),
    )


@dataclass
class Points:
    """What a page draws of a run, at most so many points: by last step of each window, as in Run.

    window: steps of a point. shares: of the tokens in each bin of weight, a column of the heat map per row; edges: steps
    between which each lies, one more than rows, and token_edges.
    """

    window: int
    curves: pd.DataFrame
    quantiles: pd.DataFrame
    sources: dict[str, pd.DataFrame]
    heat_window: int
    shares: pd.DataFrame
    edges: np.ndarray
    token_edges: np.ndarray = field(repr=False)


def thin(run: Run, max_points: int, max_columns: int) -> Points:
    """The points of a run."""
    steps, num_steps = run.steps, len(run.steps)
    size, heat_size = (math.ceil(num_steps / largest) or 1 for largest in (max_points, max_columns))
    window = _windows(num_steps, size)
    curves = _means(steps, window)
    curves[BY_TIME] = _means(steps[BY_TIME], window, steps["seconds"].fillna(1.0).replace(0.0, 1.0))
    curves["tokens"] = steps["tokens"].to_numpy()[_ends(window)]  # those so far, not a mean
    sources = {
        name: _means(own, window, own["predicted_tokens"].fillna(1.0).replace(0.0, 1.0))
        for name, own in run.sources.items()
    }
    columns = _windows(num_steps, heat_size)
    counts = run.bins.groupby(columns).sum()
    ends, tokens = steps.index.to_numpy()[_ends(columns)], steps["tokens"].to_numpy()[_ends(columns)]
    first = steps.index[:1].to_numpy()
    return Points(
        size,
        curves,
        _means(run.quantiles, window),
        sources,
        heat_size,
        counts.div(counts.sum(axis=1).where(lambda total: total != 0), axis=0).fillna(0.0),
        np.concatenate([first - 0.5, ends + 0.5]),
        np.concatenate([np.where(first == 1, 0.0, np.nan), tokens]),
    )


def _windows(num_steps: int, size: int) -> np.ndarray:
    """The number of each step's window: ascending, counted from the end, so that only the first may be shorter."""
    return -(np.arange(num_steps)[::-1] // size)


def _ends(window: np.ndarray) -> np.ndarray:
    """Places of the last step of each window."""
    return np.flatnonzero(np.diff(window, append=1))


def _means(table: pd.DataFrame, window: np.ndarray, weights: "pd.Series | float" = 1.0) -> pd.DataFrame:
    """Mean of what is there over each window, by weight; at the window's last step."""
    counts = table.notna().astype("float64").mul(weights, axis=0)
    sums = table.mul(weights, axis=0).groupby(window).sum(min_count=1)
    return (sums / counts.groupby(window).sum()).set_index(table.index[_ends(window)])
