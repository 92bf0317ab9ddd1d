"""The weights of a run, whole one at a time, however they are spread over the ranks."""

from collections.abc import Iterable

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from trainer.distributed import World, whole


class Gathered:
    """The weights of a LossModel's model by the model's own names. All ranks pop the same ones in the same order."""

    def __init__(self, module: nn.Module, world: World) -> None:
        self._world = world
        self._state = {name.removeprefix("model."): tensor for name, tensor in module.state_dict().items()}

    def pop(self, name: str) -> Tensor:
        """The weight, whole; it is not asked for again. The ranks wait for each other as long as one of them writes."""
        tensor = self._state.pop(name).detach()
        if isinstance(tensor, DTensor):
            self._world.meet()
        return whole(tensor)

    def clear(self) -> None:
        self._state.clear()

    def follow(self, groups: Iterable[tuple[str, ...]]) -> None:
        """Take part in what the first rank pops, which writes all of these groups."""
        for group in groups:
            for name in group:
                self.pop(name)
