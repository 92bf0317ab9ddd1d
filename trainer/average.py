"""Averages of the weights of several steps, in float32, spread over the ranks as the weights are.

`last:N` is the plain mean of the weights after each of the last N steps of a run, `ema:DECAY` an exponential moving average
that begins with the weights after the first step (as torch.optim.swa_utils.AveragedModel, which needs whole weights).
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.option_text import parse_average


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a weight."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Average:
    """The average that --average asks for, of the weights of `model` that train.

    num_steps: of the run, which says where the last N steps begin. count: steps that it is the mean of so far.
    """

    def __init__(self, text: str, model: nn.Module, num_steps: int) -> None:
        self.text, self.option, self.num_steps = text, parse_average(text), num_steps
        self._weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self._model = model
        self.count = 0
        self.tensors: dict[str, Tensor] = {}

    @property
    def first_step(self) -> int:
        """The first step whose weights belong to the average."""
        return 1 if self.option.kind == "ema" else max(1, self.num_steps - self.option.last + 1)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step`."""
        if step < self.first_step:
            return
        self.count += 1
        if self.count == 1:
            self.tensors = {name: weight.detach().clone() for name, weight in self._weights.items()}
            return
        share = 1 / self.count if self.option.kind == "last" else 1 - self.option.decay
        means = [local(tensor) for tensor in self.tensors.values()]
        torch._foreach_lerp_(means, [local(weight.detach()) for weight in self._weights.values()], share)

    def state(self) -> dict[str, Any]:
        """What a checkpoint says of the average beside its tensors, as JSON."""
        return {"average": self.text, "count": self.count, "first_step": self.first_step}

    def tensors_to_load(self, state: dict[str, Any] | None) -> dict[str, Tensor]:
        """Room for the tensors of a checkpoint with that state, which this average goes on from; none where it begins anew.

        A run that has become longer averages other steps, and so begins again.
        """
        fits = state is not None and (state["average"], state["first_step"]) == (self.text, self.first_step)
        self.count = state["count"] if fits and state is not None else 0
        self.tensors = {name: torch.empty_like(weight) for name, weight in self._weights.items()} if self.count else {}
        return self.tensors

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """The model with the averaged weights; afterwards it has its own again, bit for bit.

        The two change places one tensor at a time, so nothing is held twice.
        """
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._model.state_dict()  # has FSDP2 give up what it gathered
        for name, mean in self.tensors.items():
            own, other = local(self._weights[name].detach()), local(mean)
            kept = own.clone()
            own.copy_(other)
            other.copy_(kept)
