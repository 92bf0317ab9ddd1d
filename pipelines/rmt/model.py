"""The model of a step: TRL's forward and the trainer's loss head over the same weights, as one module."""

import inspect
from typing import Any

import torch
from torch import Tensor

from trainer.loss_model import LossModel
from trainer.model import Base


class RmtModel(LossModel):
    """What DDP wraps. Called with a micro-batch it is the trainer's LossModel; called by TRL, with the keywords of a
    transformers model, it is that model."""

    def __init__(self, base: Base) -> None:
        super().__init__(base)
        self.config, self.base = base.model.config, base
        count_positions_from_the_mask(base.model)

    def forward(self, *inputs: Any, **named: Any) -> Any:
        return super().forward(*inputs, **named) if inputs else self.model(**named)


def count_positions_from_the_mask(model: Any) -> None:
    """Let a transformers model number its tokens from the first that the attention mask shows. TRL pads prompts on the left
    and gives no positions, and a model that has learned them (GPT-2) would count the padding."""
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return

    def number(_: Any, inputs: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        mask_BT = named.get("attention_mask")
        if mask_BT is None or mask_BT.ndim != 2 or named.get("position_ids") is not None:
            return inputs, named
        return inputs, named | {"position_ids": (mask_BT.long().cumsum(-1) - 1).clamp(min=0)}

    model.register_forward_pre_hook(number, with_kwargs=True)


@torch.no_grad()
def target_logprobs(base: Base, sequences: list[list[int]], micro_batch_size: int) -> list[float]:
    """log p of the last token of each sequence given those before it, at temperature 1, in nats."""
    found: list[float] = []
    for first in range(0, len(sequences), micro_batch_size):
        batch = sequences[first : first + micro_batch_size]
        longest = max(map(len, batch))
        ids_BT = torch.zeros(len(batch), longest, dtype=torch.int64, device=base.device)
        for row, sequence in enumerate(batch):
            ids_BT[row, : len(sequence)] = torch.tensor(sequence)
        last_B = torch.tensor([len(sequence) - 1 for sequence in batch], device=base.device)
        rows_B = torch.arange(len(batch), device=base.device)
        hidden_BH = base.hidden_states(ids_BT)[rows_B, last_B - 1]  # position t is predicted from the state at t - 1
        logits_BV: Tensor = torch.nn.functional.linear(
            hidden_BH.float(), base.head.weight.float(), None if base.head.bias is None else base.head.bias.float()
        )
        found += logits_BV.log_softmax(-1)[rows_B, ids_BT[rows_B, last_B]].tolist()
    return found
