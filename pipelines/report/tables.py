"""The tables of remit report: settings and provenance of runs side by side, and what each run came to."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from pipelines.report.posttrain import log_every, stage_of

if TYPE_CHECKING:
    from pipelines.report.curves import Run

ABSENT = "–"


@dataclass(frozen=True)
class Row:
    """cells: one for each run."""

    label: str
    cells: list[str]

    @property
    def differs(self) -> bool:
        return len(set(self.cells)) > 1


_ORIGIN = (
    "shards",
    "mixture",
    "base_weights_sha256",
    "weights_sha256",
    "data_sha256",
    "reward_sha256",
)  # of provenance


def settings_rows(settings: Sequence[dict[str, Any]]) -> list[Row]:
    """The settings of runs, from their run.json."""
    shown = [{key: own[key] for key in own if key not in _ORIGIN} for own in settings]
    for own in shown:
        if left_out := own.get("rows_left_out"):
            which = f" (sha256 {left_out['sha256'][:12]})" if left_out["rows"] else ""
            own["rows_left_out"] = f"{left_out['rows']:,}{which}"
    return _rows(shown)


def provenance_rows(settings: Sequence[dict[str, Any]]) -> list[Row]:
    """What runs were made from: base, tokenizer, references, shards."""
    return _rows([_provenance(own) for own in settings])


def _provenance(settings: dict[str, Any]) -> dict[str, Any]:
    shards = dict(settings.get("shards") or {})
    if corpus := shards.pop("corpus", None):  # the list itself is too long for a table
        shards["corpus"] = {
            "files": len(corpus),
            "tokens": sum(file.get("tokens") or 0 for file in corpus),
            "sha256": [str(file.get("sha256"))[:12] for file in corpus],
        }
    # what tells runs apart before what describes the folder
    first = {key: shards.pop(key) for key in ("tokenizer", "references") if key in shards}
    mixture = settings.get("mixture") or {}
    stages = {f"after step {stage['after_step']:,}": stage["weights"] for stage in mixture.get("stages", [])}
    mixed = {"mixture": {**stages, **mixture["sources"]}} if mixture else {}
    of_stage = {key: settings[key] for key in ("data_sha256", "reward_sha256") if key in settings}
    weights = settings.get("base_weights_sha256", settings.get("weights_sha256"))  # post-training calls them so
    return _flatten({"base_weights_sha256": weights} | mixed | of_stage | first | shards)


def _flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested object as one of long names: {"a": {"b": 1}} as {"a › b": 1}."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        flat |= _flatten(entry, f"{name} › ") if isinstance(entry, dict) and entry else {name: entry}
    return flat


def _rows(columns: Sequence[dict[str, Any]]) -> list[Row]:
    """A row for each name that any of the columns has; absent and null are different things."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [Row(name, [_text(own[name]) if name in own else ABSENT for own in columns]) for name in names]


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and len(value) > 8:
        all_of_it = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]  # their beginnings may be equal
        return f"{', '.join(map(str, value[:8]))}, ... {len(value)} in all, together {all_of_it}"
    return f"{value:,}" if type(value) is int else json.dumps(value, ensure_ascii=False)


def totals_rows(runs: Sequence["Run"]) -> list[Row]:
    """What runs came to; a figure that none has is left out."""
    columns = [_totals(run) for run in runs]
    rows = [Row(label, [own[label] for own in columns]) for label in columns[0]]
    return [row for row in rows if set(row.cells) != {ABSENT}]


def _totals(run: "Run") -> dict[str, str]:
    every = log_every(run.settings)
    last = {} if run.steps.empty else run.steps.iloc[-1].to_dict()
    seconds = run.steps["seconds"].sum(min_count=1)
    peak = last.get("peak_memory_bytes", math.nan) / 2**30
    sets = run.held_out[["tokens", "manifest_sha256"]].drop_duplicates().fillna({"manifest_sha256": ABSENT})
    held_out = [f"{_figure(own.tokens, ',.0f')} (manifest {own.manifest_sha256[:12]})" for own in sets.itertuples()]
    return {
        "objective": (stage_of(run.settings) or "").upper() or str(run.settings.get("objective", ABSENT)),
        "state": "finished" if run.finished else "no step yet" if run.steps.empty else "not finished",
        "steps": f"{len(run.steps) * every:,}" + _missing(run.steps.index, every),
        "tokens": _figure(last.get("tokens"), ",.0f"),
        "time of training, from tokens/s": ABSENT if math.isnan(seconds) else duration(seconds),
        "model FLOPs, mean": _figure(_mean_over_time(run, "teraflops_per_second"), ",.4g", " TFLOP/s"),
        "share of the bfloat16 peak, mean": _figure(_mean_over_time(run, "mfu"), ".1%"),
        "next-token loss, last step": _figure(last.get("ntp_loss"), ".4f"),
        "held-out loss, last": _held_out(run),
        "held-out tokens": "; ".join(held_out) or ABSENT,
        "peak memory": _figure(peak, ".2f", " GiB"),
        **{
            f"{label}, mean of the last tenth": _late(run, name, format_)
            for label, (name, format_) in OF_STAGES.items()
        },
        "left out": run.damaged or ABSENT,
    }


def _mean_over_time(run: "Run", name: str) -> float:
    """The mean of a rate over the time of training; NaN where no step has it."""
    values = run.steps[name]
    seconds = run.steps["seconds"].where(values.notna())
    return float((values * seconds).sum() / seconds.sum()) if seconds.sum() else math.nan


OF_STAGES = {  # what post-training came to; a single step says little
    "SFT loss": ("sft_loss", ".4f"), "DPO loss": ("dpo_loss", ".4f"), "pairs in the right order": ("pair_accuracy", ".1%"),
    "reward": ("reward", ".4f"), "correct rate": ("correct_rate", ".1%"), "length of completions": ("completion_length", ".1f"),
}  # fmt: skip


def _late(run: "Run", name: str, format_: str) -> str:
    """The mean of a figure over the last tenth of the lines that have it, one at least."""
    if name not in run.steps:
        return ABSENT
    values = run.steps[name].dropna()
    return _figure(values.iloc[-max(1, len(values) // 10) :].mean(), format_)


def _figure(value: float | None, format_: str, unit: str = "") -> str:
    return ABSENT if value is None or math.isnan(value) else f"{value:{format_}}{unit}"


def duration(seconds: float) -> str:
    """In the two largest units: 4 min 57 s, 3 h 12 min, 2 d 5 h."""
    for large, small, names in ((86_400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        count, rest = divmod(round(seconds / small), large // small)
        if count:
            return f"{count:,} {names[0]} {rest} {names[1]}"
    return f"{seconds:.3g} s"


def _missing(index: Sequence[int], every: int = 1) -> str:
    """The steps that metrics.jsonl does not have, where it has a line for every `every` steps."""
    steps = [0, *index]
    gaps = [(before + every, step - every) for before, step in pairwise(steps) if step > before + every]
    shown = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in gaps[:3]]
    more = f" and {len(gaps) - 3:,} more stretches" if len(gaps) > 3 else ""
    return f"; metrics.jsonl lacks {', '.join(shown)}{more}" if gaps else ""


def _held_out(run: "Run") -> str:
    """The loss of the model that was exported, where one was; what rounding did to it is said beside it."""
    if run.held_out.empty:
        return ABSENT
    step, line = run.held_out.index[-1], run.held_out.iloc[-1]
    loss, exported = (_figure(line[key], ".4f") for key in ("loss", "exported_loss"))
    if exported == ABSENT:
        return f"{loss} (step {step:,}, of the float32 weights)"
    return f"{exported} (step {step:,}, of the exported model{'' if exported == loss else f'; {loss} before rounding'})"
