"""What one micro-batch costs: body and loss head as one module; the memory that a step takes."""

import resource
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.batch import MicroBatch
from trainer.experts import Balancing
from trainer.head import objective_loss
from trainer.model import Base
from trainer.objectives.objective import Objective
from trainer.statistics import StepStatistics


class LossModel(nn.Module):
    """Body and loss head as one module, so that FSDP2 gathers the output embedding like any other weight."""

    def __init__(self, base: Base) -> None:
        super().__init__()
        self.model = base.model
        self._base = base

    def forward(
        self,
        batch: MicroBatch,
        objective: Objective,
        normaliser: float,
        scale: float,
        statistics: StepStatistics,
        balancing: Balancing | None = None,
    ) -> Tensor:
        """scale times Eq. 6 summed over the rows of `batch` and divided by normaliser, a scalar.

        With `balancing` its share of the loss that balances the experts is added before the scale.
        """
        head = self._base.head
        routed = balancing is not None and batch.tokens > 0
        hidden_BTH, router_logits = self._base.run_body(
            batch.input_ids_BT, batch.position_ids_BT, routed, batch.doc_lengths
        )
        loss = objective_loss(
            hidden_BTH, head.weight, batch, objective, normaliser, bias_V=head.bias, statistics=statistics
        )  # fmt: skip
        if balancing is not None and routed:
            loss = loss + balancing.share(router_logits, batch, statistics)
        return loss if scale == 1 else loss * scale


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
