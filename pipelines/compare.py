"""Compare two runs on the held-out loss that remit train --eval-shards wrote: ten lines, NTP against ReMiT.

python -m pipelines.compare --ntp RUN --remit RUN
"""

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from trainer.run import EVALUATION


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


def table(
    ntp: dict[int, float],
    remit: dict[int, float],
    rows: int = 8,
    exported: tuple[dict[int, float], dict[int, float]] = ({}, {}),
) -> str:
    """Header, at most `rows` steps that both runs evaluated, and a conclusion.

    exported: the losses of the exported models, NTP first. Where rounding changed one of the last step, the table ends
    with them, and the conclusion is about them.
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
        ntp, remit = (read_losses(run) for run in (config.ntp, config.remit))
        models = read_losses(config.ntp, "exported_loss"), read_losses(config.remit, "exported_loss")
        print(table(ntp, remit, exported=models))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
