"""How the tensors of a base's files become the weights in memory, asked of transformers without reading a value.

In: a model without values (on the meta device, nothing tied yet) and what the files hold. Out: a WeightMap. Most weights are
a tensor of the files under another name or the same one, so that a process can read its share of the rows alone. Of the
others (experts that are kept one by one and become one weight) all parts have to be read, and transformers converts them.
"""

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from trainer.layout import Files, State, Stored


class Unmapped(ValueError):
    """The weights cannot be read in shares; says why."""


@dataclass(frozen=True)
class Merged:
    """Tensors of the files that transformers makes other ones of.

    parts: name in the files and the pattern of the conversion that it matches; target: the first name in memory; names: all.
    """

    target: str
    conversion: WeightConverter
    parts: tuple[tuple[str, str], ...]
    names: tuple[str, ...]

    def convert(self, model: PreTrainedModel, read: Callable[[str], Tensor]) -> State:
        """The weights, whole. read: gives a tensor of the files in the dtype of the weight."""
        conversion: Any = deepcopy(self.conversion)
        for name, pattern in self.parts:
            conversion.add_tensor(self.target, name, pattern, read(name))
        made: Mapping[str, Any] = conversion.convert(self.target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}


@dataclass(frozen=True)
class WeightMap:
    """plain: the tensor of the files that is the weight, by the weight's name in memory. merged: the others."""

    plain: dict[str, str]
    merged: tuple[Merged, ...]

    @property
    def present(self) -> set[str]:
        """Names in memory that the files have values for."""
        return {*self.plain, *(name for merged in self.merged for name in merged.names)}


def read_map(model: Any, stored: Mapping[str, Stored]) -> WeightMap:
    """The map for a model on the meta device, by the names that transformers' own loading would give the tensors.

    The model then knows which conversions were used, as after from_pretrained. Unmapped where two tensors are meant for one
    weight or the shapes differ.
    """
    memory: State = model.state_dict()
    conversions = get_model_conversion_mapping(model)
    renamings = [each for each in conversions if isinstance(each, WeightRenaming)]
    converters = [each for each in conversions if isinstance(each, WeightConverter)]
    by_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    plain: dict[str, str] = {}
    parts: dict[str, list[tuple[str, str]]] = {}
    for name in sorted(stored, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, memory)
        if target not in memory and name in memory:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, memory)
        if target not in memory:
            continue  # the class has no use for it
        if pattern is not None:
            parts.setdefault(target, []).append((name, pattern))
        elif target in plain:
            raise Unmapped(f"{name} and {plain[target]} are both meant for {target}")
        elif stored[name].shape != tuple(memory[target].shape):
            raise Unmapped(f"{name} has shape {list(stored[name].shape)}, {target} {list(memory[target].shape)}")
        else:
            plain[target] = name
    merged = []
    for target, found in parts.items():
        each = Merged(target, by_pattern[found[0][1]], tuple(found), ())
        made = each.convert(model, lambda name: torch.empty(stored[name].shape, device="meta"))
        for name, value in made.items():
            if name in plain or name not in memory or value.shape != memory[name].shape:
                raise Unmapped(f"{found[0][0]} and others become {name}, which is not one weight of that shape")
        merged.append(Merged(target, each.conversion, each.parts, tuple(made)))
    model._weight_conversions = [each for each in conversions if each.was_used()]
    return WeightMap(plain, tuple(merged))


def tie(model: PreTrainedModel, weight_map: WeightMap, files: Files, stored: Mapping[str, Stored]) -> None:
    """Tie weights as from_pretrained does: where the files have both with other values, they stay two.

    Unmapped where a weight has no value then.
    """
    missing = set(model.state_dict()) - weight_map.present
    for target, source in list(model.all_tied_weights_keys.items()):
        if target in weight_map.present and source in weight_map.present:
            one, other = (weight_map.plain.get(name) for name in (target, source))
            if one is None or other is None:
                raise Unmapped(f"{target} and {source} are tied, and one of them is converted")
            if torch.equal(files.read(stored[one].file, one), files.read(stored[other].file, other)):
                missing.add(target)
            else:
                model.all_tied_weights_keys.pop(target)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    if missing:
        raise Unmapped(f"the files have no {min(missing)}")


@torch.no_grad()
def fill_buffers(model: Any) -> None:
    """What no file holds (inverse frequencies of rotary positions and the like), computed as from_pretrained does, on the CPU."""
    for tensor in model.state_dict(keep_vars=True).values():
        tensor._is_hf_initialized = True  # transformers' mark of what is not to be made anew
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    model._initialize_missing_keys(False)
