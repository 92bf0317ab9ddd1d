"""The tables of remit report: totals, settings and provenance of each run side by side."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipelines.report.data import Run

ABSENT = "–"


@dataclass(frozen=True)
class TableRow:
    """cells: one for each run. differs: the runs do not agree."""

    label: str
    cells: list[str]
    differs: bool = False


@dataclass(frozen=True)
class ReportTable:
    """marks: whether differences between the runs are marked."""

    title: str
    rows: list[TableRow]
    marks: bool = True

    @property
    def num_different(self) -> int:
        return sum(row.differs for row in self.rows)


def make_tables(runs: Sequence[Run]) -> list[ReportTable]:
    """Totals, settings, provenance."""
    totals: dict[str, list[str]] = {}
    for run in runs:
        for label, value in run_totals(run).items():
            totals.setdefault(label, []).append(value)
    settings = [{key: value for key, value in run.settings.items() if not _is_provenance(key)} for run in runs]
    return [
        ReportTable(
            "Totals",
            [TableRow(label, cells) for label, cells in totals.items() if set(cells) != {ABSENT}],
            marks=False,
        ),
        ReportTable("Settings", _rows(settings)),
        ReportTable("Provenance", _rows([provenance(run.settings) for run in runs])),
    ]


def run_totals(run: Run) -> dict[str, str]:
    """What a run came to, by label."""
    held_out = run.held_out[-1] if run.held_out else None
    objective = run.settings.get("objective")
    peak = run.last.get("peak_memory_bytes")
    return {
        "objective": ABSENT if objective is None else str(objective),
        "state": "finished" if run.finished else "not finished" if run.num_steps else "no step yet",
        "steps": f"{run.num_steps:,}" + _missing(run.missing),
        "tokens": ABSENT if run.tokens is None else f"{run.tokens:,.0f}",
        "hours of training, from tokens/s": ABSENT if run.hours is None else f"{run.hours:,.3g}",
        "next-token loss, last step": _figure(run.last.get("ntp_loss"), ".4f"),
        "held-out loss, last": ABSENT if held_out is None else _held_out(held_out[0], held_out[2], run.exported),
        "held-out tokens": "; ".join(_held_out_set(*own) for own in run.held_out_sets) or ABSENT,
        "peak memory": ABSENT if peak is None else f"{peak / 2**30:.2f} GiB",
        "left out": run.damaged or ABSENT,
    }


def _missing(stretches: list[tuple[int, int]]) -> str:
    if not stretches:
        return ""
    shown = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in stretches[:3]]
    more = f" and {len(stretches) - 3:,} more stretches" if len(stretches) > 3 else ""
    return f"; metrics.jsonl lacks {', '.join(shown)}{more}"


def _held_out(step: int, loss: float, exported: dict[int, float]) -> str:
    """The loss of the model that was exported, where one was; what rounding did to it is said beside it."""
    model = exported.get(step, loss)
    if f"{model:.4f}" == f"{loss:.4f}":
        return f"{loss:.4f} (step {step:,})"
    return f"{model:.4f} (step {step:,}, of the exported model; {loss:.4f} before rounding)"


def _held_out_set(tokens: float | None, manifest: str | None) -> str:
    count = "?" if tokens is None else f"{tokens:,.0f}"
    return count if manifest is None else f"{count} (manifest {manifest[:12]})"


def _figure(value: float | None, format_: str) -> str:
    return ABSENT if value is None else format(value, format_)


def _is_provenance(key: str) -> bool:
    return key in ("shards", "base_weights_sha256")


def provenance(settings: dict[str, Any]) -> dict[str, Any]:
    """What a run was made from, flat: shards, tokenizer, references, base."""
    shards = settings.get("shards")
    shards = dict(shards) if isinstance(shards, dict) else {}
    first = {"base_weights_sha256": settings.get("base_weights_sha256")}
    # what tells runs apart before what describes the folder
    first |= {key: shards.pop(key) for key in ("tokenizer", "references") if key in shards}
    corpus = shards.pop("corpus", None)
    rest: dict[str, Any] = {}
    if isinstance(corpus, list):
        files = [file for file in corpus if isinstance(file, dict)]
        rest["corpus files"] = len(files)
        rest["corpus tokens"] = sum(file["tokens"] for file in files if isinstance(file.get("tokens"), int))
        rest["corpus sha256"] = [str(file.get("sha256"))[:12] for file in files]
    return flatten(first) | rest | flatten(shards)


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested object as one of long names: {"a": {"b": 1}} as {"a › b": 1}."""
    flat: dict[str, Any] = {}
    for key, entry in value.items():
        name = f"{prefix}{key}"
        flat |= flatten(entry, f"{name} › ") if isinstance(entry, dict) and entry else {name: entry}
    return flat


def _rows(columns: Sequence[dict[str, Any]]) -> list[TableRow]:
    """A row for each name that any of the columns has; absent and null are different things."""
    names = dict.fromkeys(name for column in columns for name in column)
    rows = []
    for name in names:
        cells = [_text(column[name]) if name in column else ABSENT for column in columns]
        rows.append(TableRow(name, cells, len(set(cells)) > 1))
    return rows


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        more = f", ... {len(value)} in all, together {_short_hash(value)}" if len(value) > 8 else ""
        return ", ".join(value[:8]) + more
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False)


def _short_hash(value: list[Any]) -> str:
    """Tells long lists with equal beginnings apart."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]
