"""What the parts of one training share: the processes, the right to write to the run's folder, and the caller."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from shards.lease import Lease
from trainer.distributed import World

if TYPE_CHECKING:
    from trainer.mirror import Mirror

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called as progress(steps done, steps in all, metrics of the step)."""


@dataclass(frozen=True)
class Session:
    """One process's part in a training.

    lease: of --out, on the process that writes to it, None on the others and where the run is finished. The callbacks are
    those of `trainer.train.train`; progress and note are called on the first process alone. mirror: of the run, with --mirror.
    """

    world: World
    lease: Lease | None
    progress: Progress
    should_stop: Callable[[], bool]
    note: Callable[[str], None]
    phase: Callable[[str], None]
    mirror: "Mirror | None" = None

    def check_lease(self) -> None:
        """LeaseLost where another process has taken --out over; nothing on the processes that do not write."""
        if self.lease:
            self.lease.check()

    def somebody_stops(self) -> bool:
        """Whether any process is asked to stop: a signal may have come to one rank alone. All ranks take part."""
        return bool(self.world.sum(torch.tensor(int(self.should_stop()))))
