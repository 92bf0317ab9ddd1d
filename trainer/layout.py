"""How a base's safetensors files hold its weights, so that what is trained can be written back the same way.

transformers renames, splits and fuses weights while it loads them (the experts of a layer become one tensor), ties
some of them, and passes over those that its class has no use for. In: the base's folder and the model loaded from it.
Out: a Layout, tried out before training: every weight, written back, must be what the file holds.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

State = dict[str, Tensor]


@dataclass(frozen=True)
class Stored:
    """A tensor of the base's files."""

    file: str
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """Where each weight of a loaded model stands in the files of its base.

    stored: what the files hold, by its name there. groups: the names in memory of weights that are written together,
    most of them one. renames: from the name that transformers would write to the one in the file, where they differ.
    carried_over: names in the files that the class does not load. frozen: weights in memory that no loss reaches.
    trained, kept_float32: names in memory; the latter are those that the class wants in float32. dtypes: of each name in memory, what its values are rounded to when they are written.
    is_tied, config_ties: whether the head is the embedding, in memory and by config.json.
    """

    folder: Path
    stored: dict[str, Stored]
    groups: tuple[tuple[str, ...], ...]
    renames: dict[str, str]
    carried_over: tuple[str, ...]
    frozen: tuple[str, ...]
    trained: frozenset[str]
    kept_float32: frozenset[str]
    dtypes: dict[str, torch.dtype]
    is_tied: bool
    config_ties: bool

    def rounding(self, export_dtype: str) -> dict[str, torch.dtype]:
        """The dtype to which each weight in memory is rounded by an export in "base", "float32" or "bfloat16".

        Only what is trained is exported in another dtype than the base's: router biases kept in float32 stay so.
        """
        if export_dtype == "base":
            return self.dtypes
        return self.dtypes | dict.fromkeys(self.recast(export_dtype), getattr(torch, export_dtype))

    def recast(self, export_dtype: str) -> frozenset[str]:
        """Names in memory of the weights that are exported in another dtype than the base's, if they have another."""
        if export_dtype == "base":
            return frozenset()
        return self.trained if export_dtype == "float32" else self.trained - self.kept_float32

    def as_stored(self, model: PreTrainedModel, state: State) -> State:
        """Weights in memory, of whole groups, under the names and in the shapes of the files."""
        return as_stored(model, state, self.renames)


def as_stored(model: PreTrainedModel, state: State, renames: Mapping[str, str]) -> State:
    written: State = revert_weight_conversion(model, dict(state))
    return {renames.get(name, name): tensor for name, tensor in written.items()}


def weight_files(folder: Path) -> list[str]:
    """Names of the files that transformers loads from `folder`, in order; ValueError where there are none."""
    if (folder / SINGLE).is_file():
        return [SINGLE]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder}: has neither {SINGLE} nor {INDEX}; write the folder again with save_pretrained")
    try:
        names = sorted(set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX}: damaged ({error}); copy it again from where the base is from") from None
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{folder / INDEX}: names {name!r}, expected files of its own folder")
    return names


def read_stored(folder: Path) -> dict[str, Stored]:
    """What the weight files of `folder` hold, by name."""
    stored = {}
    for file in weight_files(folder):
        with safe_open(folder / file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                part = tensors.get_slice(name)
                stored[name] = Stored(file, DTYPES.get(part.get_dtype(), torch.float32), tuple(part.get_shape()))
    return stored


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


Compare = Callable[
    [Path, PreTrainedModel, Mapping[str, Stored], Iterable[tuple[str, ...]], Mapping[str, str], State], set[str]
]
"""Like _require_equal, of weights that may have no values."""


def read_layout(folder: Path, model: PreTrainedModel, compare: Compare | None = None) -> Layout:
    """The layout of the files in `folder`, from which `model` was just loaded with float32 weights.

    compare: in place of the comparison of all weights with the files. ValueError where a trained weight could not be written back under the base's own names, or not with its own values.
    """
    stored = read_stored(folder)
    weights: State = model.state_dict(keep_vars=True)
    parameters = {id(parameter) for parameter in model.parameters()}
    groups, renames, left = _match(
        model, stored, {name: tensor.detach().to("meta") for name, tensor in weights.items()}
    )
    placed = {id(weights[name]) for group in groups for name in group}
    lost = sorted(name for name in left if id(weights[name]) in parameters - placed)
    if lost:
        raise ValueError(refusal(folder, lost[0], "is not found in its files under a name that could be written back"))
    covered = (compare or _require_equal)(folder, model, stored, groups, renames, weights)
    keep_float32 = [
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    ]
    trained = {name for name, tensor in weights.items() if id(tensor) in parameters and tensor.requires_grad}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return Layout(
        folder,
        stored,
        tuple(groups),
        renames,
        tuple(name for name in stored if name not in covered),
        tuple(name for name, tensor in weights.items() if id(tensor) in parameters and not tensor.requires_grad),
        frozenset(trained),
        frozenset(name for name in trained if any(part in name for part in keep_float32)),
        _dtypes(model, stored, groups, renames, weights),
        head is not None and head.weight is embedding.weight,
        any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config())),
    )


def refusal(folder: Path, name: str, what: str) -> str:
    return (
        f"{folder}: {name} {what}, so that an export would not be the base where nothing was trained; load it with "
        "transformers, write it with save_pretrained into a new folder and train that"
    )


def _match(
    model: PreTrainedModel, stored: Mapping[str, Stored], meta: State
) -> tuple[list[tuple[str, ...]], dict[str, str], list[str]]:
    """Groups of names in memory and renames, as in Layout, and the names in memory that no file has."""

    def fits(names: Iterable[str], renames: Mapping[str, str]) -> bool:
        try:
            written = as_stored(model, {name: meta[name] for name in names}, renames)
        except Exception:  # of transformers' conversions: a part of what it needs is not in the group
            return False
        return bool(written) and all(
            name in stored and stored[name].shape == tuple(tensor.shape) for name, tensor in written.items()
        )

    groups: list[tuple[str, ...]] = [(name,) for name in meta if fits([name], {})]
    left = [name for name in meta if (name,) not in set(groups)]
    for depth in (1, 2, 3):  # what is fused in the file stands in one module, or one layer, in memory
        together: dict[str, list[str]] = {}
        for name in left:
            together.setdefault(name.rsplit(".", depth)[0], []).append(name)
        found = [tuple(names) for names in together.values() if len(names) > 1 and fits(names, {})]
        groups += found
        left = [name for name in left if not any(name in group for group in found)]
    # a base that was saved without the prefix of the class that loads it, or with one more
    taken = {name for group in groups for name in as_stored(model, {name: meta[name] for name in group}, {})}
    renames: dict[str, str] = {}
    for name in left:
        for other in sorted(stored.keys() - taken):  # the same on all ranks
            if (name.endswith(f".{other}") or other.endswith(f".{name}")) and fits([name], {name: other}):
                renames[name] = other
                taken.add(other)
                groups.append((name,))
                break
    return groups, renames, [name for name in left if name not in renames]


@torch.no_grad()
def _require_equal(
    folder: Path,
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    groups: Iterable[tuple[str, ...]],
    renames: Mapping[str, str],
    weights: State,
) -> set[str]:
    """The names in the files that `groups` are written to; ValueError where their values are not those of the files."""
    covered: set[str] = set()
    with Files(folder) as files:
        for group in groups:
            for name, tensor in as_stored(model, {name: weights[name].detach() for name in group}, renames).items():
                value = files.read(stored[name].file, name).to(tensor.device, tensor.dtype)
                if not torch.equal(value.nan_to_num(), tensor.nan_to_num()):
                    raise ValueError(refusal(folder, name, "would not be written back with the values that were read"))
                covered.add(name)
    return covered


def _dtypes(
    model: PreTrainedModel,
    stored: Mapping[str, Stored],
    groups: Iterable[tuple[str, ...]],
    renames: Mapping[str, str],
    weights: State,
) -> dict[str, torch.dtype]:
    """By name in memory. A weight that is stored twice, as a tied head may be, has the values of the narrower dtype."""
    found: dict[int, torch.dtype] = {}
    for group in groups:
        meta = {name: weights[name].detach().to("meta") for name in group}
        dtypes = [stored[name].dtype for name in as_stored(model, meta, renames)]
        for name in group:
            own = reduce(torch.promote_types, dtypes)
            other = found.get(id(weights[name]), own)
            found[id(weights[name])] = min(own, other, key=lambda dtype: dtype.itemsize)
    return {name: found[id(tensor)] for name, tensor in weights.items() if id(tensor) in found}


class Files:
    """The weight files of a folder, each opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._open = folder, {}  # type: ignore[var-annotated]

    def __enter__(self) -> "Files":
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)

    def handle(self, file: str):  # type: ignore[no-untyped-def]
        if file not in self._open:
            self._open[file] = safe_open(self.folder / file, "pt").__enter__()
        return self._open[file]

    def close(self, file: str) -> None:
        if file in self._open:
            self._open.pop(file).__exit__(None, None, None)

    def read(self, file: str, name: str) -> Tensor:
        return self.handle(file).get_tensor(name)
