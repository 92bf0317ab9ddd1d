"""Figures of a run for TensorBoard: OUT/tensorboard. The same as in metrics.jsonl, for those who watch it there."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from trainer.statistics import WEIGHT_STEP

DETAILS_EVERY = 10  # steps between histograms and the figures of each source
NOT_SHOWN = ("step", "sources", "weight_histogram", "delta_quantiles")


class Board:
    """Writes to `folder`, or nowhere where it is None (ranks but the first). What an earlier process wrote of steps
    after `first_step` is hidden, because a resumed run makes them again."""

    def __init__(self, folder: Path | None, first_step: int) -> None:
        self._writer = None if folder is None else SummaryWriter(str(folder), purge_step=first_step + 1)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.close()

    def flush(self) -> None:
        """Bring to the disk what was added so far."""
        if self._writer is not None:
            self._writer.flush()

    def write(self, metrics: dict[str, Any]) -> None:
        """Add one step, as it stands in metrics.jsonl."""
        if self._writer is None:
            return
        step = metrics["step"]
        self._scalars("train", metrics, step)
        if step != 1 and step % DETAILS_EVERY:
            return
        self._details("train", metrics, step)
        if len(metrics["sources"]) > 1:
            for name, figures in metrics["sources"].items():
                self._scalars(f"source {name}", figures, step)
                self._details(f"source {name}", figures, step)

    def _scalars(self, group: str, figures: dict[str, Any], step: int) -> None:
        assert self._writer is not None
        for name, value in figures.items():
            if name not in NOT_SHOWN and value is not None:
                self._writer.add_scalar(f"{group}/{name}", value, step)

    def _details(self, group: str, figures: dict[str, Any], step: int) -> None:
        assert self._writer is not None
        for share, value in (figures["delta_quantiles"] or {}).items():
            self._writer.add_scalar(f"{group}/delta_quantile_{share}", value, step)
        counted = {round(float(centre) / WEIGHT_STEP): count for centre, count in figures["weight_histogram"].items()}
        # a bucket reaches down to the limit of the one before it: empty ones must be there, and one below the first
        bins = {index * WEIGHT_STEP: counted.get(index, 0) for index in range(min(counted) - 1, max(counted) + 1)}
        self._writer.add_histogram_raw(
            f"{group}/weights", min=(min(counted) - 0.5) * WEIGHT_STEP, max=(max(counted) + 0.5) * WEIGHT_STEP,
            num=sum(bins.values()), sum=sum(centre * n for centre, n in bins.items()),
            sum_squares=sum(centre**2 * n for centre, n in bins.items()),
            bucket_limits=[centre + WEIGHT_STEP / 2 for centre in bins], bucket_counts=list(bins.values()), global_step=step,
        )  # fmt: skip
