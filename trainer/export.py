"""Write a trained model as its base was: the same files, tensor names, dtypes, config and everything beside them.

In: the weights of a run by their names in memory, and the Layout of the base. Out: a Hugging Face folder, renamed into
place, and a Rounding, which says what the dtypes of the export did to the training.
"""

import contextlib
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from shards.folder import ShardFolder
from shards.store import fsync_folder, temporary_name
from trainer.layout import INDEX, SINGLE, Files, Layout, State
from trainer.safetensors_writer import SafetensorsWriter
from trainer.tokenizer import make_faithful

EXPORTS = "exports"

COPIED = (".json", ".jinja", ".txt", ".model", ".tiktoken", ".yaml", ".yml")
TEMPLATES = "additional_chat_templates"
NAMES_COPIED = ("license", "licence", "notice", "use_policy")
PIECE = 1 << 24
"""Values of a weight that are rounded and compared at a time."""


@dataclass(frozen=True)
class Rounding:
    """What rounding did: how many weights were updated by the training, and how many of them have the base's value again."""

    updated_weights: int = 0
    returned_weights: int = 0

    @property
    def returned_share(self) -> float:
        return self.returned_weights / max(1, self.updated_weights)


class Weights(Protocol):
    """Weights by their names in memory: a dict, or what gathers one at a time (trainer/gathered.py)."""

    def pop(self, name: str, /) -> Tensor: ...

    def clear(self) -> None: ...


def export(
    model: PreTrainedModel,
    layout: Layout,
    state: Weights,
    final: Path,
    export_dtype: str = "base",
    shards: ShardFolder | None = None,
    record: Callable[[Rounding], None] = lambda rounding: None,
) -> Rounding:
    """Write the model to `final`, whole or not at all, and empty `state`, its weights by name.

    shards: whose tokenizer the model gets where the base has none. record: called when all is written, before `final`
    is there. OSError where the disk is full or the base is gone, ValueError where a weight is too large for its dtype.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    for leftover in final.parent.glob(f".{final.name}.*.tmp"):
        shutil.rmtree(leftover)  # of an export that was cut off
    temporary = temporary_name(final)
    temporary.mkdir()
    copy_files(layout.folder, temporary)
    write_config(layout, temporary, export_dtype)
    rounding = write_weights(model, layout, state, temporary, export_dtype)
    if shards is not None and not any((layout.folder / name).exists() for name in _TOKENIZERS):
        shards.copy_tokenizer(temporary)
    make_faithful(temporary)
    for file in temporary.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":  # those are on the disk by now
            with open(file, "rb") as written:
                os.fsync(written.fileno())
    record(rounding)
    os.rename(temporary, final)
    fsync_folder(final.parent)
    return rounding


_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json")


def copy_files(base: Path, folder: Path) -> None:
    """Copy what stands beside the weights: configs, tokenizer, templates, processors, licence. Not the model card, which
    is about the base, and no folders but that of templates: one of them may be the run."""
    for path in sorted([*base.iterdir(), *(base / TEMPLATES).glob("*")]):
        is_wanted = path.suffix in COPIED or path.stem.lower().startswith(NAMES_COPIED)
        if is_wanted and path.is_file() and not path.name.startswith(".") and not path.name.endswith(".index.json"):
            copy = folder / path.relative_to(base)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def write_config(layout: Layout, folder: Path, export_dtype: str) -> None:
    """config.json, of which only what is no longer true of the weights is changed; else it stays byte for byte."""
    config = json.loads((layout.folder / "config.json").read_text(encoding="utf-8"))
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    changed = False
    if layout.config_ties and not layout.is_tied:
        for part in parts:
            if part is config or "tie_word_embeddings" in part:
                part["tie_word_embeddings"], changed = False, True
    if export_dtype != "base":
        for part in parts:
            names = [name for name in ("dtype", "torch_dtype") if name in part]
            for name in names or (["dtype"] if part is config else []):
                changed |= part[name] != export_dtype if name in part else True
                part[name] = export_dtype
    if changed:
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def write_weights(model: PreTrainedModel, layout: Layout, state: Weights, folder: Path, export_dtype: str) -> Rounding:
    """The base's weight files with the weights of `state`, which is emptied on the way; one weight in memory at a time."""
    rounding = layout.rounding(export_dtype)
    dtypes = export_dtypes(model, layout, export_dtype)
    missing: dict[str, set[str]] = {stored.file: set() for stored in layout.stored.values()}
    for name, stored in layout.stored.items():
        missing[stored.file].add(name)
    updated = returned = 0
    with Files(layout.folder) as files:
        writers = {
            file: SafetensorsWriter(
                folder / file,
                {name: (dtypes[name], layout.stored[name].shape) for name in names},
                files.handle(file).metadata() or {"format": "pt"},
            )
            for file, names in missing.items()
        }

        def done(name: str) -> None:
            file = layout.stored[name].file
            missing[file].remove(name)
            if not missing[file]:
                writers[file].close()
                files.close(file)

        for name in layout.carried_over:
            file = layout.stored[name].file
            writers[file].write(name, files.read(file, name))
            done(name)
        for group in layout.groups:
            part = {name: state.pop(name).to("cpu") for name in group}
            for name, tensor in layout.as_stored(model, part).items():
                file, dtype = layout.stored[name].file, dtypes[name]
                before, values = files.read(file, name).reshape(-1), tensor.reshape(-1)
                for first in range(0, values.numel(), PIECE):
                    piece, old = values[first : first + PIECE], before[first : first + PIECE]
                    value = piece.to(rounding[group[0]]).to(dtype)
                    is_updated = piece != old.to(piece.dtype)
                    updated += int(is_updated.sum())
                    returned += int((is_updated & (value == old)).sum())
                    if not value.isfinite().all() and piece.isfinite().all():
                        raise ValueError(
                            f"{name}: has values of up to {tensor.abs().max():.4g}, more than {dtype} holds; "
                            "run the same command again with --export-dtype float32"
                        )
                    # what is as it was has the base's own bits: a zero with a sign, digits beyond float32
                    same = old.to(dtype)
                    writers[file].write(name, torch.where(is_updated & (value != same), value, same), first)
                done(name)
    state.clear()
    write_index(layout, folder, sum(writer.nbytes for writer in writers.values()))
    return Rounding(updated, returned)


def export_dtypes(model: PreTrainedModel, layout: Layout, export_dtype: str) -> dict[str, torch.dtype]:
    """Of each tensor of the exported files: the base's, or `export_dtype` for what is exported in another one."""
    recast = layout.recast(export_dtype)
    dtypes = {name: stored.dtype for name, stored in layout.stored.items()}
    if recast:
        memory: State = model.state_dict()
        for group in layout.groups:
            if recast & {*group}:
                meta = {
                    name: torch.empty(memory[name].shape, dtype=memory[name].dtype, device="meta") for name in group
                }
                dtypes |= dict.fromkeys(layout.as_stored(model, meta), getattr(torch, export_dtype))
    return dtypes


def write_index(layout: Layout, folder: Path, size: int) -> None:
    """The base's index; byte for byte, unless the weights now take another number of bytes."""
    source = layout.folder / INDEX
    if not source.is_file() or {stored.file for stored in layout.stored.values()} == {SINGLE}:
        return
    index = json.loads(source.read_text(encoding="utf-8"))
    before = sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in layout.stored.values())
    if size == before or not isinstance(index.get("metadata"), dict):
        shutil.copyfile(source, folder / INDEX)
        return
    index["metadata"]["total_size"] = size
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def rounded(module: nn.Module, dtypes: Mapping[str, torch.dtype]) -> Iterator[None]:
    """The weights of `module` as an export in `dtypes` has them, by their names in memory; afterwards as they were.

    The copy takes the room of the gradients, of which there are none between two steps.
    """
    kept: list[tuple[Tensor, Tensor]] = []
    seen: set[int] = set()
    with torch.no_grad():
        # asking for the state also makes FSDP2 give up what it gathered
        for name, tensor in module.state_dict().items():
            dtype = dtypes.get(name.removeprefix("model."))
            own = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if dtype in (None, torch.float32, torch.float64) or not own.is_floating_point() or not own.numel():
                continue
            if own.data_ptr() not in seen:  # tied weights have two names
                seen.add(own.data_ptr())
                kept.append((own, own.clone()))
                own.copy_(own.to(dtype))
        try:
            yield
        finally:
            module.state_dict()
            for own, before in kept:
                own.copy_(before)


def rounds(dtypes: Mapping[str, torch.dtype]) -> bool:
    """Whether an export in `dtypes` can differ from weights in float32."""
    return any(dtype.is_floating_point and dtype.itemsize < 4 for dtype in dtypes.values())
