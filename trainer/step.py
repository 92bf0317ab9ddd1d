"""What one micro-batch costs: body, loss head, and the figures that a step reports."""

import math
import resource
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.data import MicroBatch
from trainer.head import HeadStatistics, weighted_cross_entropy
from trainer.model import Base
from trainer.objectives import Weigh


class LossModel(nn.Module):
    """Body and loss head as one module, so that FSDP2 gathers the output embedding like any other weight."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model = base.model
        self._base = base

    def forward(
        self, batch: MicroBatch, weigh: Weigh, normaliser: float, scale: float, statistics: HeadStatistics
    ) -> Tensor:
        """scale times Eq. 6 summed over the rows of `batch` and divided by normaliser, a scalar."""
        head = self._base.head
        loss = weighted_cross_entropy(
            self._base.hidden_states(batch.input_ids_BT, batch.position_ids_BT),
            head.weight,
            batch.input_ids_BT,
            batch.predicted_BT,
            weigh,
            normaliser,
            reference_BT=batch.reference_BT,
            bias_V=head.bias,
            statistics=statistics,
        )
        return loss if scale == 1 else loss * scale


def step_metrics(sums: dict[str, float], has_reference: bool) -> dict[str, float | None]:
    """Means over the predicted tokens of a step, from the sums of the loss head."""
    tokens = sums["tokens"]
    weight_mean = sums["weight"] / tokens
    return {
        "loss": sums["weighted_loss"] / tokens,
        "ntp_loss": sums["loss"] / tokens,
        "weight_mean": weight_mean,
        "weight_std": math.sqrt(max(0.0, sums["weight_squared"] / tokens - weight_mean**2)),
        "clipped_low": sums["clipped_low"] / tokens,
        "clipped_high": sums["clipped_high"] / tokens,
        "delta_mean": sums["delta"] / tokens if has_reference else None,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.exists():  # ru_maxrss carries over what the process that started this one once held
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
