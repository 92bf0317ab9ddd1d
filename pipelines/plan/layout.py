"""How a process trains and what it sends: the layout that fits, the size of an engine.

B = rows of a micro-batch, T = tokens of a row, S = processes that share the weights.
"""

import math
from dataclasses import dataclass
from itertools import product

from pipelines.plan.hardware import Machine
from trainer.memory import Layout, first_fitting, shardings, shards_of
from trainer.model_shape import ModelShape

LARGEST_MICRO_BATCH = 64
SCORE_WEIGHTS_SHARE = 0.6  # of an engine's memory; keys, values and logits need the rest


@dataclass(frozen=True)
class Job:
    """tokens of the corpus; global_batch_size in rows; steps: optimizer steps of a run; row_tokens: tokens of a row, on average
    over the run."""

    tokens: int
    epochs: float
    seq_len: int
    global_batch_size: int
    steps: int
    row_tokens: float

    @classmethod
    def of_full_rows(cls, tokens: int, epochs: float, seq_len: int, global_batch_size: int) -> "Job":
        """A run over rows that all have seq_len tokens."""
        steps = math.ceil(math.ceil(tokens * epochs / seq_len) / global_batch_size)
        return cls(tokens, epochs, seq_len, global_batch_size, steps, float(seq_len))

    def rows_per_gpu(self, num_gpus: int) -> int:
        """Rows of a step on the GPU that has most; the others wait for it."""
        return math.ceil(self.global_batch_size / num_gpus)


def exchange(base: ModelShape, machine: Machine, layout: Layout, micro_batches: int) -> tuple[float, float]:
    """Bytes that each GPU sends per step: (within its machine, between machines). trainer/distributed.py does it so.

    Replicas sum their float32 gradients once per step. Sharded weights are gathered for the forward and for the backward of
    each micro-batch, and their gradients are summed after it; hybrid sharding sums them between machines once per step.
    """

    def ring(members: int) -> float:
        return (members - 1) / members

    if layout.sharding == "replicate":
        within, between = 2 * ring(machine.num_gpus) * 4 * base.parameters, 0.0
    else:
        sharded = (2 * machine.element_bytes + 4) * base.parameters * micro_batches
        within = ring(layout.shards) * sharded
        replicas = machine.num_gpus // layout.shards
        between = 2 * ring(replicas) * 4 * base.parameters / layout.shards
    together = machine.num_gpus if layout.sharding == "replicate" else layout.shards
    if machine.nodes > 1 and together > machine.gpus_per_node:  # a ring is as fast as its slowest link
        within, between = 0.0, within + between
    return within, between


def propose(
    base: ModelShape,
    machine: Machine,
    job: Job,
    sharding: str = "auto",
    micro_batch_size: int | None = None,
    checkpointing: str = "auto",
) -> tuple[Layout, float]:
    """The first layout that fits, or the leanest where none does, and its memory per GPU in bytes.

    Sharding as remit train chooses it comes before more of it, no checkpointing before it, more rows per forward before fewer.
    What is given is kept.
    """
    kinds = [sharding] if sharding != "auto" else shardings(base.parameters, machine.num_gpus, machine.replicas)
    recomputes = {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]
    most = min(job.rows_per_gpu(machine.num_gpus), LARGEST_MICRO_BATCH)
    sizes = [micro_batch_size] if micro_batch_size else powers_down(most)
    layouts = [
        Layout(kind, shards_of(kind, machine.num_gpus, machine.replicas), size, recompute)
        for kind, recompute, size in product(kinds, recomputes, sizes)
    ]
    return first_fitting(base, machine, layouts, job.seq_len, machine.usable_bytes)


def chosen_by_train(base: ModelShape, machine: Machine, job: Job, layout: Layout) -> str:
    """What --sharding auto of remit train chooses on these GPUs with the other options of a layout."""
    checkpointing = "on" if layout.activation_checkpointing else "off"
    return propose(base, machine, job, "auto", layout.micro_batch_size, checkpointing)[0].sharding


def powers_down(largest: int) -> list[int]:
    """largest itself, then the powers of two below it."""
    return [largest] + [2**power for power in range(largest.bit_length() - 1, -1, -1) if 2**power < largest]


def engine_size(reference: ModelShape, machine: Machine) -> int | None:
    """GPUs of one scoring engine (--tensor-parallel-size), a power of two; None where a machine is too small."""
    weights = machine.element_bytes * reference.parameters
    size = 1
    while weights > SCORE_WEIGHTS_SHARE * machine.memory_bytes * size:
        size *= 2
    return size if size <= min(machine.num_gpus, machine.gpus_per_node) else None
