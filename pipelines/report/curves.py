"""The figures of a training run as tables, and thinned to the points that a page draws.

In: the OUT of remit train or of post-training, finished or not, also of an older version with fewer figures. A point is the mean over a window
of steps and stands at its last step; windows are counted from the end, so that the last one is whole. Rates count by the
time that a step took and figures of a source by its tokens, so that a point shows what all of its window came to.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from pipelines.report.posttrain import renamed, stage_of
from pipelines.report.runs import EVALUATION, METRICS, characters, read_lines, read_settings

OF_A_SOURCE = ("predicted_tokens", "ntp_loss", "weight_mean")
BY_TIME = ["tokens_per_second", "data_wait_share", "teraflops_per_second", "mfu"]


@dataclass(frozen=True)
class Run:
    """The tables have a row per step or point (their index), and NaN where there is no such figure.

    steps: a column per figure; bins: tokens in each bin of weight, by its centre; quantiles: of the excess loss, by share;
    sources: figures of each corpus source; held_out: loss, exported_loss, tokens, manifest_sha256 of each evaluation, and the
    trained_tokens before it.
    window: steps of a point; damaged: what was left out of the files.
    """

    name: str
    settings: dict[str, Any]
    finished: bool
    steps: pd.DataFrame
    bins: pd.DataFrame
    quantiles: pd.DataFrame
    sources: dict[str, pd.DataFrame]
    held_out: pd.DataFrame
    damaged: str
    window: int = 1


def read_run(out: Path, name: str, progress: Callable[[int], None] = lambda size: None) -> Run:
    """The run in `out`. ValueError where it is none, or where a line but the last of its files is damaged.

    progress: told the bytes of each line of metrics.jsonl.
    """
    settings, damaged = read_settings(out), list[str]()
    lines = []
    stage = stage_of(settings)
    for line in read_lines(out / METRICS, damaged.append, progress):
        line = line if stage is None else renamed(line, stage)
        sources = (line.get("sources") or {}).items()
        lines.append(line | {"sources": {key: {of: own.get(of) for of in OF_A_SOURCE} for key, own in sources}})
    index = pd.Index([line["step"] for line in lines], dtype="int64")
    names = dict.fromkeys(name for line in lines for name in line["sources"])
    evaluations = list(read_lines(out / EVALUATION, damaged.append))
    steps = derive(_table(lines, index))
    columns = ["step", "loss", "exported_loss", "tokens", "manifest_sha256"]
    held_out = pd.DataFrame(evaluations, columns=columns).dropna(subset="loss").set_index("step")
    trained = pd.concat([pd.Series({0: 0.0}), steps["tokens"]])
    return Run(
        name,
        settings,
        (out / "model").exists(),
        steps,
        _table((line.get("weight_histogram") or {} for line in lines), index),
        _table((line.get("delta_quantiles") or {} for line in lines), index),
        {characters(name): _table((line["sources"].get(name, {}) for line in lines), index) for name in names},
        held_out.assign(trained_tokens=trained.reindex(held_out.index)),
        "; ".join(damaged),
    )


def _table(rows: Iterable[dict], index: pd.Index) -> pd.DataFrame:
    """The numbers among the entries of each row."""
    table = pd.DataFrame(list(rows), index=index).apply(pd.to_numeric, errors="coerce").astype("float64")
    return table.where(np.isfinite(table)).dropna(axis="columns", how="all")


def derive(steps: pd.DataFrame) -> pd.DataFrame:
    """The same with the figures that follow from several others."""
    columns = (
        *("tokens", "predicted_tokens", "effective_tokens", "data_wait_seconds", "tokens_per_second"),
        *("model_flops_per_token", "mfu"),
    )
    tokens, predicted, effective, wait, speed, flops, mfu = (
        steps.get(name, pd.Series(np.nan, steps.index)) for name in columns
    )
    # the step after a gap has no time of its own: the tokens since the line before it are of several steps
    follows = np.diff(steps.index.to_numpy(), prepend=0) == 1
    seconds = (tokens - tokens.shift(fill_value=0.0)).where(follows) / speed
    return steps.assign(
        tokens=tokens, seconds=seconds, data_wait_share=wait / seconds, effective_share=effective / predicted,
        tokens_per_second=speed, teraflops_per_second=flops * speed / 1e12, mfu=mfu,
    )  # fmt: skip


def thin(run: Run, max_points: int) -> Run:
    """The run with a row per point, at most so many."""
    num_steps = len(run.steps)
    size = math.ceil(num_steps / max_points) or 1
    windows = -(np.arange(num_steps)[::-1] // size)  # ascending; only the first may be shorter
    ends = np.flatnonzero(np.diff(windows, append=1))

    def means(table: pd.DataFrame, weights: "pd.Series | float" = 1.0) -> pd.DataFrame:
        counts = table.notna().mul(weights, axis=0).groupby(windows).sum()
        sums = table.mul(weights, axis=0).groupby(windows).sum(min_count=1)
        return (sums / counts).set_index(table.index[ends])

    steps = means(run.steps)
    steps[BY_TIME] = means(run.steps[BY_TIME], run.steps["seconds"].fillna(1.0))
    steps["tokens"] = run.steps["tokens"].iloc[ends]  # those so far, not a mean
    return replace(
        run,
        steps=steps,
        bins=run.bins.groupby(windows).sum().set_index(run.steps.index[ends]),
        quantiles=means(run.quantiles),
        sources={
            name: means(own, own["predicted_tokens"].fillna(1.0) if "predicted_tokens" in own else 1.0)
            for name, own in run.sources.items()
        },
        window=size,
    )
