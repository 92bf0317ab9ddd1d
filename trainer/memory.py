"""Memory of a process at the fullest moment of a training step, and the sharding that fits: what --sharding auto goes by, and
what remit plan says of machines that are not there.

S = processes that share the weights. B = rows of a micro-batch, T = tokens of a row.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from operator import itemgetter
from typing import Protocol

import torch

from trainer.distributed import World
from trainer.head import LOGITS_BUDGET_BYTES
from trainer.model_shape import ModelShape

DDP_PARAMETERS = 1_500_000_000
"""auto shards models above this: with AdamW in float32 a replica of it takes 24 GB."""
USABLE_SHARE = 0.9
"""Of a device's memory; allocator, kernels and communication take the rest."""


@dataclass(frozen=True)
class Layout:
    """Sharding, processes that share the weights, rows per forward, checkpointing."""

    sharding: str
    shards: int
    micro_batch_size: int
    activation_checkpointing: bool


class Products(Protocol):
    """What the matrix products of a process are made in."""

    @property
    def dtype(self) -> str: ...

    @property
    def element_bytes(self) -> int: ...


@dataclass(frozen=True)
class Precision:
    """Products in a dtype by its name."""

    dtype: str

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


def memory(base: ModelShape, products: Products, layout: Layout, seq_len: int) -> dict[str, float]:
    """Bytes per process at the fullest moment of a training step, by what holds them."""
    element, tokens = products.element_bytes, layout.micro_batch_size * seq_len
    embeddings = base.head_parameters * (1 if base.tied else 2)
    layer_parameters = (base.parameters - embeddings) / max(1, base.num_layers)
    gathered = 0.0
    if layout.shards > 1:
        gathered = element * (2 * layer_parameters + embeddings)
    elif element < 4:  # autocast keeps a copy of each matrix until its backward
        gathered = element * (base.parameters - embeddings + base.head_parameters)
    kept = tokens * base.kept_bytes
    if layout.activation_checkpointing:  # the input of each layer, which is float32, and one layer at a time
        kept = tokens * 4 * base.hidden_size * base.num_layers + kept / max(1, base.num_layers)
    return {
        "weights, float32": 4 * base.parameters / layout.shards,
        "gradients, float32": 4 * base.parameters / layout.shards,
        "AdamW moments, float32": 8 * base.parameters / layout.shards,
        f"gathered or cast weights, {products.dtype}": gathered,
        "activations": kept,
        "logits of one row": min(4 * seq_len * base.vocab_size, LOGITS_BUDGET_BYTES),
        # in float32; of 16-bit products the sum, and what comes next to it
        "gradient of the output embedding": (4 if element == 4 else 8) * base.head_parameters,
    }


def shardings(parameters: int, processes: int, replicas: int) -> list[str]:
    """What --sharding auto tries, in this order. replicas: machines that hybrid sharding replicates over."""
    if processes == 1:
        return ["replicate"]
    few = ["replicate"] if parameters <= DDP_PARAMETERS else []
    return [*few, *(["hybrid"] if replicas > 1 else []), "full"]


def shards_of(sharding: str, processes: int, replicas: int) -> int:
    """Processes that share the weights."""
    if sharding == "replicate":
        return 1
    return processes // replicas if sharding == "hybrid" else processes


def first_fitting(
    base: ModelShape, products: Products, layouts: Iterable[Layout], seq_len: int, usable_bytes: float
) -> tuple[Layout, float]:
    """The first layout that fits, or the leanest where none does, and its memory in bytes."""
    needed = [(layout, sum(memory(base, products, layout, seq_len).values())) for layout in layouts]
    return next((entry for entry in needed if entry[1] <= usable_bytes), min(needed, key=itemgetter(1)))


def device_bytes(world: World) -> int:
    """Memory of this process's GPU, or its part of this machine's."""
    if world.device.type == "cuda":
        return torch.cuda.get_device_properties(world.device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // world.local_size
