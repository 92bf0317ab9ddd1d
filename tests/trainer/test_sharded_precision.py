"""What 16 bits change where the weights are sharded: the weights that a layer multiplies by, and nothing that layers add to."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from exporting import make_base
from in_shares import on_ranks

from trainer.distributed import World
from trainer.loss_model import LossModel
from trainer.model import load_base

KINDS = ("Olmo2", "Gemma3Text", "Llama")  # whose norms give back what they are given, whatever their weight has
IDS_BT = torch.randint(0, 32, (2, 24), generator=torch.Generator().manual_seed(4))


def rounded(folder: Path) -> Any:
    """transformers' own model, whose weights have the values that bfloat16 has, in float32."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


def compare(world: World, folders: list[Path], sharding: str) -> None:
    for folder in folders:
        base = load_base(folder, "bfloat16", world.device, "packed", world, sharding)
        base.prepare(False, "off")
        model = base.spread(LossModel(base), world)
        inputs: list[torch.dtype] = []
        base.layers[-1].register_forward_pre_hook(lambda _, given, seen=inputs: seen.append(given[0].dtype))
        model.forward = lambda base=base: base.hidden_states(IDS_BT)  # FSDP2 gathers the root's weights at a call
        hidden_BTH = model().float()
        assert inputs == [torch.float32], folder
        with torch.autocast("cpu", torch.bfloat16):
            want_BTH = rounded(folder).get_decoder()(input_ids=IDS_BT, use_cache=False).last_hidden_state
        assert torch.equal(hidden_BTH, want_BTH.bfloat16().float()), folder
        hidden_BTH.sum().backward()
        assert base.model.get_input_embeddings().weight.grad is not None


@pytest.mark.usefixtures("starts_processes")
@pytest.mark.parametrize(("size", "sharding", "machines"), [(2, "full", 1), (4, "hybrid", 2)])
def test_layers_add_in_float32(tmp_path: Path, size: int, sharding: str, machines: int) -> None:
    folders = [make_base(tmp_path / kind, kind) for kind in (KINDS if size == 2 else KINDS[:1])]
    on_ranks(tmp_path, compare, size, folders, sharding, machines=machines)
