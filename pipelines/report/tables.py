"""The tables of remit report: settings and provenance of runs side by side, and what each run came to."""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipelines.report.runs import finite

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


def settings_rows(settings: Sequence[dict[str, Any]]) -> list[Row]:
    """The settings of runs, from their run.json."""
    return _rows([{key: own[key] for key in own if key not in ("shards", "base_weights_sha256")} for own in settings])


def provenance_rows(settings: Sequence[dict[str, Any]]) -> list[Row]:
    """What runs were made from: base, tokenizer, references, shards."""
    return _rows([_provenance(own) for own in settings])


def _provenance(settings: dict[str, Any]) -> dict[str, Any]:
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
    return _flatten(first) | rest | _flatten(shards)


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
    if isinstance(value, list) and value and all(isinstance(entry, str) for entry in value):
        all_of_it = hashlib.sha256(json.dumps(value).encode()).hexdigest()[:12]  # their beginnings may be equal
        return ", ".join(value[:8]) + (f", ... {len(value)} in all, together {all_of_it}" if len(value) > 8 else "")
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:,}"
    return json.dumps(value, ensure_ascii=False)


def totals_rows(runs: Sequence["Run"]) -> list[Row]:
    """What runs came to; a figure that none has is left out."""
    columns = [_totals(run) for run in runs]
    rows = [Row(label, [own[label] for own in columns]) for label in columns[0]]
    return [row for row in rows if set(row.cells) != {ABSENT}]


def _totals(run: "Run") -> dict[str, str]:
    last = run.steps.iloc[-1] if len(run.steps) else run.steps.max()  # without a step: NaN each
    evaluated = [line for line in run.evaluations if finite(line.get("loss")) is not None]
    sets = dict.fromkeys((finite(line.get("tokens")), line.get("manifest_sha256")) for line in run.evaluations)
    return {
        "objective": str(run.settings.get("objective", ABSENT)),
        "state": "finished" if run.finished else "not finished" if len(run.steps) else "no step yet",
        "steps": f"{len(run.steps):,}" + _missing(run.missing),
        "tokens": _figure(last["tokens"], ",.0f"),
        "time of training, from tokens/s": ABSENT if math.isnan(run.hours) else duration(run.hours * 3600),
        "next-token loss, last step": _figure(last["ntp_loss"], ".4f"),
        "held-out loss, last": _held_out(evaluated[-1]) if evaluated else ABSENT,
        "held-out tokens": "; ".join(_held_out_set(*own) for own in sets) or ABSENT,
        "peak memory": _figure(last["peak_memory_bytes"] / 2**30, ".2f", " GiB"),
        "left out": run.damaged or ABSENT,
    }


def _figure(value: float, format_: str, unit: str = "") -> str:
    return ABSENT if math.isnan(value) else f"{value:{format_}}{unit}"


def duration(seconds: float) -> str:
    """In the two largest units: 4 min 57 s, 3 h 12 min, 2 d 5 h."""
    for large, small, names in ((86_400, 3600, ("d", "h")), (3600, 60, ("h", "min")), (60, 1, ("min", "s"))):
        count, rest = divmod(round(seconds / small), large // small)
        if count:
            return f"{count:,} {names[0]} {rest} {names[1]}"
    return f"{seconds:.3g} s"


def _missing(stretches: list[tuple[int, int]]) -> str:
    shown = [f"{first:,}" if first == last else f"{first:,} to {last:,}" for first, last in stretches[:3]]
    more = f" and {len(stretches) - 3:,} more stretches" if len(stretches) > 3 else ""
    return f"; metrics.jsonl lacks {', '.join(shown)}{more}" if shown else ""


def _held_out(line: dict[str, Any]) -> str:
    """The loss of the model that was exported, where one was; what rounding did to it is said beside it."""
    loss, exported = line["loss"], finite(line.get("exported_loss"))
    if exported is None:
        return f"{loss:.4f} (step {line['step']:,}, of the float32 weights)"
    if f"{exported:.4f}" == f"{loss:.4f}":
        return f"{loss:.4f} (step {line['step']:,}, of the exported model)"
    return f"{exported:.4f} (step {line['step']:,}, of the exported model; {loss:.4f} before rounding)"


def _held_out_set(tokens: float | None, manifest: str | None) -> str:
    count = "?" if tokens is None else f"{tokens:,.0f}"
    return count if manifest is None else f"{count} (manifest {manifest[:12]})"
