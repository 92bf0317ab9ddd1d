"""Figures of a run for TensorBoard: OUT/tensorboard. The same as in metrics.jsonl, for those who watch it there."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from trainer.figures import WeightHistogram, step_groups
from trainer.statistics import WEIGHT_STEP


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
        for group in step_groups(metrics):
            for name, value in group.scalars.items():
                self._writer.add_scalar(f"{group.name}/{name}", value, metrics["step"])
            if group.weights is not None:
                self._histogram(f"{group.name}/weights", group.weights, metrics["step"])

    def _histogram(self, tag: str, weights: WeightHistogram, step: int) -> None:
        assert self._writer is not None
        counted = {round(centre / WEIGHT_STEP): count for centre, count in zip(weights.centres, weights.counts)}
        # a bucket reaches down to the limit of the one before it: empty ones must be there, and one below the first
        bins = {index * WEIGHT_STEP: counted.get(index, 0) for index in range(min(counted) - 1, max(counted) + 1)}
        self._writer.add_histogram_raw(
            tag, min=(min(counted) - 0.5) * WEIGHT_STEP, max=(max(counted) + 0.5) * WEIGHT_STEP,
            num=sum(bins.values()), sum=sum(centre * n for centre, n in bins.items()),
            sum_squares=sum(centre**2 * n for centre, n in bins.items()),
            bucket_limits=[centre + WEIGHT_STEP / 2 for centre in bins], bucket_counts=list(bins.values()), global_step=step,
        )  # fmt: skip
