"""A base that is read in shares against transformers' own from_pretrained: every weight and buffer, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exporting import KINDS, edit_weights, make_base
from in_shares import on_ranks
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor

import trainer.model
from trainer.distributed import World
from trainer.layout import read_layout
from trainer.loss_model import LossModel
from trainer.model import Base, load_base
from trainer.noise import silence
from trainer.weight_map import Unmapped


def whole(folder: Path) -> Any:
    config = transformers.AutoConfig.from_pretrained(folder)
    silence(config)
    return transformers.AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)


def full(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def require_same(model: Any, want: Any, is_sharded: bool = True) -> None:
    """Names, ties, values and kinds of all parameters and buffers."""
    ours, theirs = model.state_dict(keep_vars=True), want.state_dict(keep_vars=True)
    assert list(ours) == list(theirs)
    for name, tensor in theirs.items():
        got = full(ours[name].detach())
        assert got.dtype == tensor.dtype, name
        assert torch.equal(got, tensor), name
        if isinstance(tensor, torch.nn.Parameter):
            assert isinstance(ours[name], DTensor) == is_sharded, name
    names = [
        {frozenset(name for name in state if state[name] is tensor) for tensor in state.values()}
        for state in (ours, theirs)
    ]
    assert names[0] == names[1]
    left, right = dict(model.named_buffers()), dict(want.named_buffers())
    assert left.keys() == right.keys()
    assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in right)


def load(
    folder: Path, world: World, dtype: str, sharding: str, notes: list[str] | None = None
) -> tuple[Base, LossModel]:
    """As a training does it."""
    base = load_base(
        folder, dtype, world.device, "packed", world, sharding, (notes if notes is not None else []).append
    )
    assert (base.shares is None) == bool(notes)
    base.prepare(False, "off")
    loss_model = LossModel(base)
    base.spread(loss_model, world)
    return base, loss_model


def compare(world: World, folders: list[Path], sharding: str) -> None:
    for folder in folders:
        base = load_base(folder, "bfloat16", world.device, "packed", world, sharding)
        want = whole(folder)
        assert base.shares is not None, folder
        require_same(base.model, want)
        layout = base.shares.layout
        assert layout == read_layout(folder, load_base(folder, "float32", world.device).model), folder
        base.prepare(False, "off")
        assert next(base.model.parameters()).is_meta  # nothing is held twice
        loss_model = LossModel(base)
        base.spread(loss_model, world)
        require_same(base.model, want)
        shares = world.local_size if sharding == "hybrid" else world.size
        for name, parameter in base.model.named_parameters():
            rows = parameter.shape[0]  # of 4 rows on 3 ranks the first two have 2 each
            assert parameter.to_local().numel() <= -(-rows // shares) * (parameter.numel() // rows), name


@pytest.mark.usefixtures("starts_processes")
@pytest.mark.parametrize(("size", "sharding", "machines"), [(3, "full", 1), (4, "hybrid", 2)])
def test_every_kind_is_read_as_transformers_reads_it(tmp_path: Path, size: int, sharding: str, machines: int) -> None:
    kinds = ["Qwen3", "Mixtral", "DeepseekV3"] if sharding == "hybrid" else [*KINDS]
    folders = [make_base(tmp_path / kind, kind) for kind in kinds]
    on_ranks(tmp_path, compare, size, folders, sharding, machines=machines)


def make_odd(folder: Path) -> dict[str, Path]:
    """Bases as they are found: a head beside the embedding that it is tied to, the same and another; no prefix; one file."""
    tied = {"tie_word_embeddings": True}
    same, other = (make_base(folder / name, "Llama", shard="1GB", **tied) for name in ("same", "other"))
    for place in (same, other):
        edit_weights(
            place, lambda tensors, place=place: tensors.update(
                {"lm_head.weight": tensors["model.embed_tokens.weight"].clone() + (place == other)}
            )
        )  # fmt: skip
    head = make_base(folder / "head", "Llama", shard="1GB", **tied)
    edit_weights(head, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    bare = make_base(folder / "bare", "Qwen3", shard="1GB", **tied)
    tensors = load_file(bare / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, bare / "model.safetensors")
    more = make_base(folder / "more", "Olmo2", torch.float32, shard="1GB")
    edit_weights(more, lambda tensors: tensors.update({"model.layers.9.mlp.up_proj.weight": torch.ones(3, 4)}))
    return {"same": same, "other": other, "head": head, "bare": bare, "more": more}


@pytest.mark.usefixtures("starts_processes")
def test_odd_files_are_read_as_transformers_reads_them(tmp_path: Path) -> None:
    on_ranks(tmp_path, compare, 2, list(make_odd(tmp_path).values()), "full")


def fall_back(world: World, folder: Path) -> None:
    def unmapped(*arguments: object) -> None:
        raise Unmapped("a.weight and b.weight are both meant for c.weight")

    trainer.model.load_sharded = unmapped  # type: ignore[assignment]
    notes: list[str] = []
    base, loss_model = load(folder, world, "float32", "full", notes)
    assert notes == [
        f"{folder}: each process holds all of its weights before they are sharded, since a.weight and b.weight are both meant for "
        "c.weight"
    ]
    assert all(isinstance(parameter, DTensor) for parameter in loss_model.parameters())
    require_same(base.model, whole(folder))


@pytest.mark.usefixtures("starts_processes")
def test_files_that_cannot_be_read_in_shares_are_read_whole(tmp_path: Path) -> None:
    on_ranks(tmp_path, fall_back, 2, make_base(tmp_path / "base", "SmolLM3"))


def refuse(world: World, folder: Path) -> None:
    with pytest.raises(ValueError, match=r"its weights lack model\.layers\.1\.mlp\.up_proj\.weight"):
        load_base(folder, "float32", world.device, "packed", world, "full")


@pytest.mark.usefixtures("starts_processes")
def test_files_that_lack_a_weight_are_refused_as_before(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "Olmo2", shard="1GB")
    edit_weights(base, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    on_ranks(tmp_path, refuse, 2, base)
