"""Which steps leave out their update: those that are not finite, and spikes. Decided where the numbers are, on the device.

A GPU runs on while the numbers of a step travel to the host, so the host cannot decide before the update. The fused
optimizer takes a tensor `found_inf` and leaves weights, moments and its count of steps as they are where it is 1.

The rule for spikes is that of OLMo-core (SkipStepOptimizer in olmo_core/optim/skip_step_optimizer.py, which trained Olmo 3):
loss and gradient norm of a step against mean and standard deviation of the 128 steps before it, whether or not these were
left out, from the 64th step on.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from trainer.distributed import World

WINDOW = 128
"""Steps that a step is compared with, at most."""
FEWEST = 63
"""Earlier steps without which no step is a spike."""


def is_spike(window_W2: Tensor, latest_2: Tensor, sigma: float) -> Tensor:
    """Whether the latest loss or gradient norm is more than `sigma` standard deviations above the mean of the window, bool.

    window_W2, latest_2: loss and gradient norm, float64. Rows with a number that is not finite do not count; fewer than
    FEWEST rows decide nothing. The standard deviation is the one over n - 1.
    """
    counted_W = window_W2.isfinite().all(1)
    count = counted_W.sum()
    values_W2 = window_W2.where(counted_W[:, None], 0.0)
    mean_2 = values_W2.sum(0) / count
    squares_W2 = (values_W2 - mean_2).square().where(counted_W[:, None], 0.0)
    std_2 = (squares_W2.sum(0) / (count - 1)).sqrt()
    return ((latest_2 - mean_2) > sigma * std_2).any() & (count >= FEWEST)


@dataclass
class Counts:
    """Of a run so far: tokens of the batches that were read; steps without an update, by cause; the newest steps in a row
    that were not finite."""

    tokens: int = 0
    skipped_steps: int = 0
    skipped_nonfinite: int = 0
    skipped_spikes: int = 0
    nonfinite_in_a_row: int = 0


class Guard:
    """Judges each step of a run and counts what it left out; its state belongs to the checkpoint.

    sigma: of --skip-spikes, None: no step is a spike.
    """

    def __init__(self, world: World, sigma: float | None) -> None:
        self.world, self.sigma = world, sigma
        self.counts = Counts()
        self._window_W2 = torch.zeros(0, 2, dtype=torch.float64, device=world.device)

    def judge(self, loss: Tensor, grad_norm: Tensor) -> Tensor:
        """bool [2]: the step is not finite; it is a spike. loss, grad_norm: of the global batch, scalars.

        All ranks take part and get the same answer: what one of them would leave out is left out by all.
        """
        latest_2 = torch.stack([loss.double(), grad_norm.double()])
        finite = latest_2.isfinite().all()
        spike = torch.zeros_like(finite)
        if self.sigma is not None:
            spike = is_spike(self._window_W2, latest_2, self.sigma) & finite
            self._window_W2 = torch.cat([self._window_W2, latest_2[None]])[-WINDOW:]
        verdict_2 = torch.stack([~finite, spike])
        return self.world.sum(verdict_2.int()) > 0

    def count(self, nonfinite: bool, spike: bool) -> None:
        """Write down the verdict of the next step, once it has come to the host."""
        self.counts.skipped_nonfinite += nonfinite
        self.counts.skipped_spikes += spike
        self.counts.nonfinite_in_a_row = self.counts.nonfinite_in_a_row + 1 if nonfinite else 0

    def state(self) -> dict[str, Any]:
        """All that a resume needs, as JSON."""
        rows = [[value if value == value else None for value in row] for row in self._window_W2.tolist()]
        return {"counts": asdict(self.counts), "window": rows}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a `state`."""
        self.counts = Counts(**state["counts"])
        rows = [[float("nan") if value is None else value for value in row] for row in state["window"]]
        self._window_W2 = torch.tensor(rows, dtype=torch.float64, device=self.world.device).reshape(-1, 2)


def leave_out(optimizer: Optimizer, verdict_2: Tensor) -> None:
    """Have the next optimizer.step() change nothing where one of the verdicts is true. The optimizer is fused."""
    optimizer.found_inf = verdict_2.any().float()  # type: ignore[attr-defined]
