"""Compare two runs on the held-out loss that remit train --eval-shards wrote: ten lines, NTP against ReMiT.

python -P -m pipelines.compare --ntp RUN --remit RUN
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


def read_losses(run: Path) -> dict[int, float]:
    """Held-out loss in nats per token by step; ValueError where the run was not evaluated."""
    path = run / EVALUATION
    if not path.exists():
        raise ValueError(f"{path}: not found; run remit train with --eval-shards and --eval-every")
    values = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {value["step"]: value["loss"] for value in values}


def table(ntp: dict[int, float], remit: dict[int, float], rows: int = 8) -> str:
    """Header, at most `rows` steps that both runs evaluated, and a conclusion."""
    steps = sorted(ntp.keys() & remit.keys())
    if not steps:
        raise ValueError("the two runs have no evaluated step in common; give both the same --eval-every")
    rows = min(rows, len(steps))
    shown = [steps[round(index * (len(steps) - 1) / max(1, rows - 1))] for index in range(rows)]
    lines = ["  step   held-out loss: NTP    ReMiT    ReMiT - NTP"]
    lines += [f"{step:6,}{ntp[step]:21.4f}{remit[step]:9.4f}{remit[step] - ntp[step]:+15.4f}" for step in shown]
    last = steps[-1]
    lines.append(
        f"After {last:,} steps on the same rows ReMiT is {_verdict(remit[last] - ntp[last])} on held-out reasoning."
    )
    return "\n".join(lines)


def _verdict(difference: float) -> str:
    if abs(difference) < 5e-4:
        return "level with NTP"
    return f"{abs(difference):.4f} nat per token {'better' if difference < 0 else 'worse'} than NTP"


def main() -> None:
    config = tyro.cli(CompareConfig)
    try:
        print(table(read_losses(config.ntp), read_losses(config.remit)))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    main()
