"""remit compare: the held-out losses of two or more runs as a table, and what they differ in.

In: runs of remit train --eval-shards, evaluated on the same tokens. Out: text. Light to import: no torch, no pandas.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from pipelines.report.runs import EVALUATION, Line, finite, read_lines, read_settings, require_different, run_names
from pipelines.report.tables import ABSENT, Row, provenance_rows, settings_rows
from pipelines.terminal import counted
from trainer.objectives.settings import OPTIONS

NAMES = {
    "ntp": "NTP",
    "remit": "ReMiT",
    "rho1": "RHO-1",
    "kd": "KD",
    "rkl": "reverse KL",
    "switch": "switch",
    "sampled": "sampled KD",
    "entropy": "by entropy",
}
# what belongs to an objective: itself, and what it reads
OF_AN_OBJECTIVE = {"objective", "reference", *(name for names in OPTIONS.values() for name in names)}
OF_RHO1 = {"micro_batch_size", "processes"}  # with --scope micro, which ranks the tokens of a forward pass
# how often a run is evaluated, of which only common steps are compared; where the base was found
MAY_DIFFER = OF_AN_OBJECTIVE | OF_RHO1 | {"eval_every", "base", "leave_out"}
MAX_ROWS = 8  # of the table
MAX_DIFFERENCES = 12
LEVEL = 5e-4  # nats per token: runs that are nearer than this are level


@dataclass(frozen=True)
class CompareConfig:
    """Compare the held-out losses of runs that were evaluated on the same tokens, the first with each of the others."""

    runs: Annotated[tyro.conf.Positional[list[Path]], tyro.conf.arg(metavar="RUN RUN [RUN ...]", help_behavior_hint="")]
    """Folders of two or more runs (--out of remit train with --eval-shards), finished or not."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if len(self.runs) < 2:
            raise ValueError(f"{counted(len(self.runs), 'run')} given, expected two or more: remit compare RUN RUN")
        require_different(self.runs)


@dataclass(frozen=True)
class Evaluated:
    """A run's settings (run.json) and the lines of its evaluation.jsonl by step. last: the newest line."""

    out: Path
    settings: dict[str, Any]
    lines: dict[int, Line]
    finished: bool

    @property
    def last(self) -> Line:
        return self.lines[max(self.lines)]


def compare(runs: Sequence[Path]) -> str:
    """What remit compare prints. ValueError where a folder is no run, has no evaluations, or has them on other tokens."""
    evaluated = [read_evaluated(run) for run in runs]
    for other in evaluated[1:]:
        require_same_tokens(evaluated[0], other)
    objectives = [NAMES.get(run.settings.get("objective", ""), "") for run in evaluated]
    names = objectives if all(objectives) and len(set(objectives)) == len(runs) else run_names(runs)
    differing = differences([run.settings for run in evaluated], names == objectives)
    return "\n".join([*table(evaluated, names), *difference_lines(differing, names), *conclusion(evaluated, names)])


def read_evaluated(out: Path) -> Evaluated:
    """The run in `out`; ValueError where it is none, was not evaluated, or was evaluated on several sets of rows."""
    settings, path = read_settings(out), out / EVALUATION
    lines = {line["step"]: line for line in read_lines(path, lambda what: None) if finite(line.get("loss")) is not None}
    if not lines:
        raise ValueError(f"{path}: has no held-out loss; run remit train with --eval-shards and --eval-every")
    sets = list(dict.fromkeys(line.get("manifest_sha256") for line in lines.values()))
    if len(sets) > 1:
        raise ValueError(
            f"{path}: manifest_sha256 is {sets[0]!r} in one line and {sets[1]!r} in another, expected one: the run was resumed "
            "with other --eval-shards; train it again"
        )
    return Evaluated(out, settings, lines, (out / "model").exists())


def require_same_tokens(one: Evaluated, other: Evaluated) -> None:
    """ValueError, with both values, where the held-out losses of two runs are over other tokens or in another context."""
    for what, values in (
        ("manifest_sha256 of the held-out shards", [run.last.get("manifest_sha256") for run in (one, other)]),
        ("the number of held-out tokens", [run.last.get("tokens") for run in (one, other)]),
        ("context", [run.settings.get("context") for run in (one, other)]),
    ):
        if values[0] != values[1]:
            raise ValueError(
                f"{one.out} and {other.out} do not compare: {what} is {values[0]!r} in the first and {values[1]!r} in the "
                "second, expected the same in both; train one of them again with the --eval-shards and the context of the other"
            )


def differences(settings: Sequence[dict[str, Any]], by_objective: bool) -> list[Row]:
    """Settings and provenance in which runs differ.

    by_objective: the runs are called by their objectives, which need not be said again, nor that an objective reads
    settings that the others do not have.
    """
    rows = [row for row in (*settings_rows(settings), *provenance_rows(settings)) if row.differs]
    own = OF_AN_OBJECTIVE | OF_RHO1
    implied = {row.label for row in rows if row.label in own and len({*row.cells} - {ABSENT}) < 2}
    # where the base was found: base_weights_sha256 says whether it is another; and what a run that names another
    # reference, or none, does not have: the row `reference` says so
    passed_over = {"base"} | {row.label for row in rows if row.label.startswith("references") and ABSENT in row.cells}
    rows = [row for row in rows if row.label not in passed_over]
    return [row for row in rows if not (by_objective and row.label in implied | {"objective"})]


def difference_lines(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """A line for each setting in which runs differ."""
    lines = [
        f"  {row.label}: " + ", ".join(f"{cell} ({name})" for name, cell in zip(names, _cut(row.cells)))
        for row in rows[:MAX_DIFFERENCES]
    ]
    more = [f"  and {len(rows) - MAX_DIFFERENCES} more; remit report shows all"] if len(rows) > MAX_DIFFERENCES else []
    return ["The runs differ in:", *lines, *more] if rows else []


def _cut(cells: Sequence[str]) -> list[str]:
    """Of long values what is around the place where they begin to differ."""
    if max(map(len, cells)) <= 40:
        return list(cells)
    differs_at = next((place for place, letters in enumerate(zip(*cells)) if len(set(letters)) > 1), 0)
    first = max(0, differs_at - 6)
    return [
        f"{'...' if first else ''}{cell[first : first + 20]}{'...' if cell[first + 20 :] else ''}" for cell in cells
    ]


def differs_in(one: dict[str, Any], other: dict[str, Any]) -> str | None:
    """The first field of two run.json, beside those of the objective, that differs; None where the same rows trained the
    same base in the same steps."""
    first, second = (
        {key: value for key, value in own.items() if key not in MAY_DIFFER and key != "rows_left_out"}
        | {"shards": {key: value for key, value in (own.get("shards") or {}).items() if key != "references"}}
        for own in (one, other)
    )
    left_out, as_well = one.get("rows_left_out"), other.get("rows_left_out")
    if left_out and as_well and left_out["sha256"] != as_well["sha256"]:  # older runs do not say
        return "rows_left_out"
    return next((key for key in {**first, **second} if first.get(key) != second.get(key)), None)


def table(runs: Sequence[Evaluated], names: Sequence[str]) -> list[str]:
    """Header and at most MAX_ROWS steps that all runs evaluated, with the differences from the first.

    A row `last` has the last losses of runs of different lengths; where rounding changed an exported model, a row `model`
    has those of the exported models.
    """
    steps = common_steps(runs)
    num_rows = min(MAX_ROWS, len(steps))
    shown = [steps[round(index * (len(steps) - 1) / max(1, num_rows - 1))] for index in range(num_rows)]
    heads = [f"held-out loss: {names[0]}", *names[1:], *(f"{name} - {names[0]}" for name in names[1:])]
    widths = [max(len(head), 5) + (4 if place else 3) for place, head in enumerate(heads)]

    def row(label: str, losses: Sequence[float]) -> str:
        cells = [f"{loss:.4f}" for loss in losses] + [f"{loss - losses[0]:+.4f}" for loss in losses[1:]]
        return f"{label:>6}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, widths))

    lines = ["  step" + "".join(f"{head:>{width}}" for head, width in zip(heads, widths))]
    lines += [row(f"{step:,}", [run.lines[step]["loss"] for run in runs]) for step in shown]
    final = final_lines(runs)
    if len({line["step"] for line in final}) > 1:
        lines.append(row("last", [line["loss"] for line in final]))
    models = exported(final)
    return lines + ([row("model", models)] if models else [])


def common_steps(runs: Sequence[Evaluated]) -> list[int]:
    """Steps that all runs evaluated, ascending."""
    return sorted(set.intersection(*(set(run.lines) for run in runs)))


def final_lines(runs: Sequence[Evaluated]) -> list[Line]:
    """What the conclusion is about: the last step that all runs evaluated, or each one's last, where all are finished or
    have only the base in common."""
    step = max(common_steps(runs), default=0)
    return [run.lines[step] if step and not all(run.finished for run in runs) else run.last for run in runs]


def exported(lines: Sequence[Line]) -> list[float]:
    """Held-out losses of the exported models, where rounding changed one of them; none where they do not compare: what
    rounding to one dtype costs the one and not the other is no difference of the runs."""
    losses = [loss for line in lines if (loss := finite(line.get("exported_loss"))) is not None]
    is_one_dtype = len({line.get("export_dtype") for line in lines}) == 1
    return losses if is_one_dtype and len(losses) == len(lines) and losses != [line["loss"] for line in lines] else []


def conclusion(runs: Sequence[Evaluated], names: Sequence[str]) -> list[str]:
    """How each run but the first compares with it, in words."""
    lines = final_lines(runs)
    models = exported(lines)
    losses = models or [line["loss"] for line in lines]
    said = []
    for run, name, line, loss in list(zip(runs, names, lines, losses))[1:]:
        first, step = lines[0]["step"], line["step"]
        when = f"After {step:,} steps" if step == first else f"After {step:,} and {first:,} steps"
        rows = " on the same rows" if step == first and differs_in(runs[0].settings, run.settings) is None else ""
        what = f"the exported model of {name}" if models else name
        said.append(f"{when}{rows} {what} is {_verdict(loss - losses[0], names[0])} on held-out tokens.")
    return said


def _verdict(difference: float, first: str) -> str:
    if abs(difference) < LEVEL:
        return f"level with {first}"
    return f"{abs(difference):.4f} nat per token {'better' if difference < 0 else 'worse'} than {first}"
