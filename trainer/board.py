"""Figures of a run for TensorBoard: OUT/tensorboard. The same as in metrics.jsonl, for those who watch it there."""

from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from trainer.figures import WeightHistogram, step_groups


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
        pairs = list(zip(weights.centres, weights.counts))
        self._writer.add_histogram_raw(
            tag, min=weights.centres[0], max=weights.centres[-1], num=sum(weights.counts),
            sum=sum(centre * n for centre, n in pairs), sum_squares=sum(centre**2 * n for centre, n in pairs),
            bucket_limits=weights.upper_edges, bucket_counts=weights.counts, global_step=step,
        )  # fmt: skip
