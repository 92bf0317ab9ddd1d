"""Load a base so that each process reads and holds its share of the weights alone, and one whole tensor at most.

The model is built without values (on the meta device), spread over the ranks by FSDP2, and each process fills its rows of
each weight from the safetensors files. What is asked of a base before it trains (trainer/checks.py) is asked of all ranks
together: it is spread over them with weights gathered in float32, and again, with the same shares, in the dtype that it trains in.
"""

import copy
import gc
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import meta_device_safe_creation_ops, no_tie_weights

from trainer.distributed import World, make_mesh, shard
from trainer.layout import Files, Layout, State, Stored, as_stored, read_layout, read_stored, refusal
from trainer.weight_map import Unmapped, WeightMap, fill_buffers, read_map, tie

Reader = Callable[[str], Tensor]
"""Gives a tensor of the files by its name."""

PREFIX = "model."
"""Of the base's names in a module that has it as its attribute `model`."""


class Asked(nn.Module):
    """The root of a base that is spread over the ranks while it is asked what it is: gathers what is not in a layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, question: Callable[[], Any]) -> Any:
        return question()


class Slots:
    """The parameters and buffers of a root by their names in the base; those that are tied get their value together."""

    def __init__(self, root: nn.Module) -> None:
        self.root = root
        state = root.state_dict(keep_vars=True)  # has FSDP2 give up what it gathered
        self._held: dict[str, Tensor] = {name.removeprefix(PREFIX): tensor for name, tensor in state.items()}
        self._places: dict[int, list[tuple[nn.Module, str]]] = defaultdict(list)
        for module in root.modules():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is not None:
                    self._places[id(tensor)].append((module, name))

    @property
    def names(self) -> list[str]:
        return list(self._held)

    def dtype(self, name: str) -> torch.dtype:
        return self._held[name].dtype

    def is_empty(self, name: str) -> bool:
        """Whether nothing was put here yet, under this name or one that is tied to it."""
        return id(self._held[name]) in self._places

    def rows(self, name: str) -> tuple[int, int]:
        """First row of this process's share, and the one after its last, as FSDP2 divides them."""
        held = self._held[name]
        if not isinstance(held, DTensor):
            return 0, held.shape[0] if held.ndim else 1
        last = held.device_mesh.ndim - 1  # before it: replicas
        size = -(-held.shape[0] // held.device_mesh.size(last))
        first = min(held.device_mesh.get_local_rank(last) * size, held.shape[0])
        return first, min(first + size, held.shape[0])

    def room(self, name: str, device: torch.device) -> Tensor:
        """An empty tensor for this process's share."""
        held, (first, end) = self._held[name], self.rows(name)
        return torch.empty((end - first, *held.shape[1:]) if held.ndim else (), dtype=held.dtype, device=device)

    def put(self, name: str, share: Tensor) -> None:
        """Have the share be what the root holds."""
        held = self._held[name]
        value: Tensor = share
        if isinstance(held, DTensor):
            value = DTensor.from_local(
                share, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
            )
        if isinstance(held, nn.Parameter):
            value = nn.Parameter(value, requires_grad=held.requires_grad)
        for module, attribute in self._places.pop(id(held)):
            setattr(module, attribute, value)

    def share(self, name: str) -> Tensor:
        """What this process holds."""
        held = self._held[name].detach()
        return held.to_local() if isinstance(held, DTensor) else held


@dataclass
class Shares:
    """A base of which each process holds its share, spread over the ranks to be asked what it is.

    layout: of the files, as an export writes them. skeleton: builds the model without values. mesh: of the ranks.
    """

    layout: Layout
    mesh: DeviceMesh
    skeleton: Callable[[], PreTrainedModel]
    asked: Asked

    def ask(self, question: Callable[[], Any]) -> Any:
        """The answer to a question that runs the model without gradients. All ranks ask the same."""
        with torch.no_grad():
            return self.asked(question)

    def settle(self, root: nn.Module) -> None:
        """Move the shares to `root`, which has a skeleton as its `model` and is spread over the same mesh. Only once."""
        before, slots = Slots(self.asked), Slots(root)
        for name in before.names:
            if slots.is_empty(name):
                slots.put(name, before.share(name))
        root.load_state_dict({}, strict=False)  # loads nothing: FSDP2 takes note of its new parameters
        del self.asked, before, slots
        gc.collect()  # hooks and modules refer to each other


def load_sharded(
    folder: Path,
    config: Any,
    attention: str | None,
    world: World,
    sharding: str,
    freeze: Callable[[Any], None],
    layers_of: Callable[[Any], list[nn.Module]],
) -> Shares:
    """The base in `folder` with float32 weights, spread over the ranks. All ranks take part.

    attention: attn_implementation of transformers. freeze: takes the gradients from weights of a model that no text goes through.
    layers_of: its decoder layers. Unmapped where the files cannot be read in shares, ValueError where an export could not be
    written back.
    """
    stored = read_stored(folder)
    first = build(config, attention)
    weight_map = read_map(first, stored)
    with Files(folder) as files:
        tie(first, weight_map, files, stored)
    ties, conversions = dict(first.all_tied_weights_keys), first._weight_conversions
    held = first.state_dict(keep_vars=True)
    names = {id(tensor): name for name, tensor in reversed(held.items())}
    tied = {name: names[id(tensor)] for name, tensor in held.items() if names[id(tensor)] != name}

    def skeleton() -> PreTrainedModel:
        model = build(config, attention)
        fill_buffers(model)
        for name, other in tied.items():
            module, _, attribute = name.rpartition(".")
            setattr(model.get_submodule(module), attribute, model.get_parameter(other))
        model.all_tied_weights_keys, model._weight_conversions = dict(ties), conversions
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and buffer.device.type != "meta":
                    module._buffers[name] = buffer.to(world.device)
        freeze(model)
        return model

    model = skeleton()
    inverse = Inverse(weight_map)
    layout = read_layout(folder, model, inverse.require_equal)
    asked, mesh = Asked(model), make_mesh(world, sharding)
    shard(asked, [*layers_of(model), *embeddings_of(model)], mesh, torch.float32)
    problem = world.first_problem(read_shares(folder, stored, weight_map, Slots(asked), inverse, world))
    if problem is not None:
        raise ValueError(problem)
    asked.load_state_dict({}, strict=False)
    return Shares(layout, mesh, skeleton, asked)


def embeddings_of(model: PreTrainedModel) -> list[nn.Module]:
    """Input and output embedding where each is a weight of its own, so that one of them is gathered at a time."""
    found: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    is_plain = isinstance(found[0], nn.Embedding) and isinstance(found[1], nn.Linear)
    return found if is_plain and found[0].weight is not found[1].weight else []


def build(config: Any, attention: str | None) -> Any:
    """The model of a config on the meta device, its weights not tied."""
    with torch.device("meta"), no_tie_weights(), meta_device_safe_creation_ops():
        return AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=torch.float32, attn_implementation=attention, trust_remote_code=False
        )


class Inverse:
    """Makes sure that what is read would be written back as the files have it (see trainer/layout.py).

    Where writing gives back the very tensor, under the name that it was read from, nothing has to be compared.
    """

    def __init__(self, weight_map: WeightMap) -> None:
        self._map = weight_map
        self._groups: list[tuple[str, ...]] = []
        self._renames: Mapping[str, str] = {}

    def require_equal(
        self,
        folder: Path,
        model: PreTrainedModel,
        stored: Mapping[str, Stored],
        groups: Iterable[tuple[str, ...]],
        renames: Mapping[str, str],
        weights: State,
    ) -> set[str]:
        """The names in the files that `groups` are written to; those with values to compare are kept for `problem`."""
        covered: set[str] = set()
        self._renames = renames
        for group in groups:
            meta = {name: weights[name].detach() for name in group}
            written = as_stored(model, meta, renames)
            covered |= written.keys()
            if any(meta.get(name) is not written.get(self._map.plain.get(name, "")) for name in group):
                self._groups.append(group)
                if not any({*group} <= {*merged.names} for merged in self._map.merged):
                    raise Unmapped(f"{group[0]} is written otherwise than it is read")
        return covered

    def problem(self, folder: Path, model: PreTrainedModel, made: State, read: Reader) -> str | None:
        """What is wrong with weights that were made of several tensors, or None."""
        for group in self._groups:
            if {*group} <= made.keys():
                for name, value in as_stored(model, {name: made[name] for name in group}, self._renames).items():
                    if not torch.equal(read(name).to(value.dtype).nan_to_num(), value.nan_to_num()):
                        return refusal(folder, name, "would not be written back with the values that were read")
        return None


@torch.no_grad()
def read_shares(
    folder: Path, stored: Mapping[str, Stored], weight_map: WeightMap, slots: Slots, inverse: Inverse, world: World
) -> str | None:
    """Fill this process's share of each weight, one file open at a time; what is wrong with the files, or None.

    Merged weights are made whole by each process, one after the other, and compared by one of them.
    """
    by_file: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for name, source in weight_map.plain.items():
        by_file[stored[source].file].append((name, source))
    for file, names in by_file.items():
        with Files(folder) as files:
            for name, source in names:
                if slots.is_empty(name):
                    share, (first, end) = slots.room(name, world.device), slots.rows(name)
                    if share.numel():
                        part = files.handle(file).get_slice(source)
                        share.copy_(part[first:end] if share.ndim else files.read(file, source))
                    slots.put(name, share)
    model: Any = slots.root.get_submodule("model")
    problem = None
    for index, merged in enumerate(weight_map.merged):
        with Files(folder) as files:
            made = merged.convert(model, _reader(files, stored, slots.dtype(merged.target)))
            for name, value in made.items():
                first, end = slots.rows(name)
                share = slots.room(name, world.device)
                share.copy_(value[first:end] if share.ndim else value)
                slots.put(name, share)
            if problem is None and index % world.size == world.rank:
                problem = inverse.problem(folder, model, made, _reader(files, stored))
    return problem


def _reader(files: Files, stored: Mapping[str, Stored], dtype: torch.dtype | None = None) -> Reader:
    return lambda name: files.read(stored[name].file, name).to(dtype)
