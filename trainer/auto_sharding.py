"""What --sharding auto means for a run: the first kind that fits by the formula of remit plan (trainer/memory.py)."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import TrainConfig
from trainer.memory import USABLE_SHARE, Layout, Precision, device_bytes, first_fitting, memory, shardings, shards_of
from trainer.mixed_shards import MixedShards
from trainer.model import resolve_dtype
from trainer.model_shape import count
from trainer.session import Session


def choose_sharding(config: TrainConfig, session: Session, mixed: MixedShards) -> str:
    """--sharding, or where it is auto the first kind that fits by remit plan's formula, the leanest where none does."""
    world = session.world
    if config.sharding != "auto" or world.size == 1:
        return config.sharding if world.size > 1 else "replicate"
    chosen: str = world.from_first(fitting_sharding(config, session, mixed) if world.first else None)
    return chosen


def fitting_sharding(config: TrainConfig, session: Session, mixed: MixedShards) -> str:
    """What auto means, on the first process; a note says so where replicas, or one machine's GPUs, would have been enough
    by the number of weights, and do not fit."""
    world, folder = session.world, Path(config.model)
    seq_len = mixed.first.manifest.seq_len
    replicas = world.size // world.local_size
    products = Precision(str(resolve_dtype(config.dtype, world.device)).removeprefix("torch."))
    settings = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    try:
        shape = count("--model", settings, str(folder), seq_len, products.dtype)
    except ValueError:  # cannot be run without values: by the number of weights alone
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        return shardings(model.num_parameters(), world.size, replicas)[0]
    kinds = shardings(shape.parameters, world.size, replicas)
    layouts = [
        Layout(kind, shards_of(kind, world.size, replicas), config.micro_batch_size, config.activation_checkpointing)
        for kind in kinds
    ]
    usable = USABLE_SHARE * device_bytes(world)
    layout, needed = first_fitting(shape, products, layouts, seq_len, usable)
    if layout.sharding != kinds[0] or needed > usable:
        first = sum(memory(shape, products, layouts[0], seq_len).values())
        session.note(
            f"--sharding auto: {layout.sharding}, which takes {needed / 1e9:,.3g} GB per process by the formula of remit plan; "
            f"{kinds[0]} takes {first / 1e9:,.3g} GB, and {usable / 1e9:,.3g} GB may be filled"
        )
    return layout.sharding
