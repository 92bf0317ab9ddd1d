"""Compare two runs on the held-out loss that remit train --eval-shards wrote: ten lines, NTP against ReMiT.

python -P -m pipelines.compare --ntp RUN --remit RUN

Only runs that differ in their objective: the same base, rows, order and schedule, evaluated on the same tokens.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from shards.output_folder import RUN
from trainer.objectives.settings import OPTIONS
from trainer.run import EVALUATION

# an objective and what it reads; how often a run is evaluated, of which only common steps are compared; what rho1's
# --scope micro adds, since it ranks the tokens of a forward pass
MAY_DIFFER = {
    *("objective", "reference", "eval_every", "micro_batch_size", "processes", "base", "leave_out"),
    *(name for names in OPTIONS.values() for name in names),
}


@dataclass(frozen=True)
class CompareConfig:
    """Compare the held-out loss of an NTP run and a ReMiT run."""

    ntp: Path
    """Folder of the run with --objective ntp."""
    remit: Path
    """Folder of the run with --objective remit."""


def read_losses(run: Path, key: str = "loss") -> dict[int, float]:
    """Held-out loss in nats per token by step; ValueError where the run was not evaluated.

    key: "exported_loss" for that of the exported models, for those steps that have it.
    """
    path = run / EVALUATION
    if not path.exists():
        raise ValueError(f"{path}: not found; run remit train with --eval-shards and --eval-every")
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {value["step"]: value[key] for value in values if key in value}


def require_comparable(one: Path, other: Path) -> None:
    """ValueError names the first setting, beside those of the objective, in which two runs differ, or that they were
    evaluated on other tokens, with both values."""
    first, second = _settings(one), _settings(other)
    left_out, as_well = first.pop("rows_left_out", None), second.pop("rows_left_out", None)
    found = _difference(first, second)
    if found is None and left_out and as_well and left_out["sha256"] != as_well["sha256"]:  # older runs do not say
        found = ("rows_left_out", left_out["by_reference"], as_well["by_reference"])
    if found is None and (tokens := _heldout(one)) != (others := _heldout(other)):
        found = ("manifest_sha256 of the held-out shards", tokens, others)
    if found is not None:
        field, *values = found
        raise ValueError(
            f"{one} and {other} do not compare: {field} is {values[0]!r} in the first and {values[1]!r} in the second, expected "
            "the same in both; train one of them again with the settings of the other, all but those of its objective"
        )


def _settings(run: Path) -> dict[str, Any]:
    """All of run.json that decides which rows train how, without the objective."""
    try:
        found = json.loads((run / RUN).read_text(encoding="utf-8"))
        shards = {key: value for key, value in found["shards"].items() if key != "references"}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{run / RUN}: missing or damaged, expected the folder of a run of remit train") from None
    return {key: value for key, value in found.items() if key not in MAY_DIFFER} | {"shards": shards}


def _heldout(run: Path) -> str | None:
    """sha256 of the manifest of the held-out shards; None in runs of old. ValueError where they were changed in between."""
    lines = (run / EVALUATION).read_text(encoding="utf-8").splitlines() if (run / EVALUATION).exists() else []
    found = list(dict.fromkeys(json.loads(line).get("manifest_sha256") for line in lines))
    if len(found) > 1:
        raise ValueError(
            f"{run / EVALUATION}: manifest_sha256 is {found[0]!r} in one line and {found[1]!r} in another, expected one: the run "
            "was resumed with other --eval-shards; train it again"
        )
    return found[0] if found else None


def _difference(one: Any, other: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Name and both values of the first field in which two JSON values differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        pairs = [(f"{where}.{key}".lstrip("."), one.get(key), other.get(key)) for key in {**one, **other}]
    elif isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        pairs = [(f"{where}[{index}]", *values) for index, values in enumerate(zip(one, other))]
    else:
        return None if one == other else (where, one, other)
    return next((found for name, a, b in pairs if (found := _difference(a, b, name))), None)


def table(
    ntp: dict[int, float],
    remit: dict[int, float],
    rows: int = 8,
    exported: tuple[dict[int, float], dict[int, float]] = ({}, {}),
) -> str:
    """Header, at most `rows` steps that both runs evaluated, and a conclusion.

    exported: the losses of the exported models, NTP first, none where they were exported in different dtypes. Where
    rounding changed one of the last step, the table ends with them, and the conclusion is about them.
    """
    steps = sorted(ntp.keys() & remit.keys())
    if not steps:
        raise ValueError("the two runs have no evaluated step in common; give both the same --eval-every")
    rows = min(rows, len(steps))
    shown = [steps[round(index * (len(steps) - 1) / max(1, rows - 1))] for index in range(rows)]
    lines = ["  step   held-out loss: NTP    ReMiT    ReMiT - NTP"]
    lines += [f"{step:6,}{ntp[step]:21.4f}{remit[step]:9.4f}{remit[step] - ntp[step]:+15.4f}" for step in shown]
    last = steps[-1]
    difference, what = remit[last] - ntp[last], "ReMiT"
    ntp_model, remit_model = (losses.get(last) for losses in exported)
    if ntp_model is not None and remit_model is not None and (ntp_model, remit_model) != (ntp[last], remit[last]):
        difference, what = remit_model - ntp_model, "the exported model of ReMiT"
        lines.append(f"{'model':>6}{ntp_model:21.4f}{remit_model:9.4f}{difference:+15.4f}")
    lines.append(f"After {last:,} steps on the same rows {what} is {_verdict(difference)} on held-out reasoning.")
    return "\n".join(lines)


def _verdict(difference: float) -> str:
    if abs(difference) < 5e-4:
        return "level with NTP"
    return f"{abs(difference):.4f} nat per token {'better' if difference < 0 else 'worse'} than NTP"


def main() -> None:
    config = tyro.cli(CompareConfig)
    try:
        require_comparable(config.ntp, config.remit)
        ntp, remit = (read_losses(run) for run in (config.ntp, config.remit))
        models = read_losses(config.ntp, "exported_loss"), read_losses(config.remit, "exported_loss")
        if read_losses(config.ntp, "export_dtype") != read_losses(config.remit, "export_dtype"):
            models = {}, {}  # what rounding costs the one and not the other is no difference of the objectives
        print(table(ntp, remit, exported=models))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
