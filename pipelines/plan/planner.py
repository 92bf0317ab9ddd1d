"""What scoring and training cost and hold: arithmetic on shapes and rates, without a model or a clock.

In: ModelShape of base and reference, a Machine, Rates, a Job. Out: seconds, bytes, break-even, a sharding that fits.
T = tokens of a row, B = rows of a micro-batch, H = hidden size, V = vocabulary, L = layers, P = parameters, S = processes
that share the weights.
"""

import math
from dataclasses import dataclass

from pipelines.plan.model import ModelShape, steps_of

LOGITS_BYTES = 3 << 30  # trainer/head.py, LOGITS_BUDGET_BYTES
LARGEST_MICRO_BATCH = 64
SCORE_WEIGHTS_SHARE = 0.6  # of an engine's memory; keys, values and logits need the rest


@dataclass(frozen=True)
class GPU:
    """Dense peaks in TFLOP/s, memory in GB (10^9 bytes)."""

    bfloat16: float
    float32: float
    memory_gb: float
    source: str


GPUS = {
    "h200": GPU(989, 67, 141, "NVIDIA H200 SXM data sheet, dense"),
    "h100": GPU(989, 67, 80, "NVIDIA H100 SXM data sheet, dense"),
    "a100": GPU(312, 19.5, 80, "NVIDIA A100 80 GB SXM data sheet, dense"),
    "b200": GPU(2250, 80, 180, "NVIDIA B200 data sheet, dense"),
    "l40s": GPU(362, 91.6, 48, "NVIDIA L40S data sheet, dense"),
    "rtx4090": GPU(165, 82.6, 24, "NVIDIA Ada architecture paper, dense, float32 accumulation"),
    "cpu": GPU(0.15, 0.15, 16, "a guess for two cores of a laptop; calibrate it with --measure"),
}


@dataclass(frozen=True)
class Machine:
    """gpu: its name; dtype: of the matrix products; peak_flops: per second, and memory_bytes: each of one GPU."""

    gpu: str
    num_gpus: int
    gpus_per_node: int
    dtype: str
    peak_flops: float
    memory_bytes: float
    memory_share: float

    @property
    def nodes(self) -> int:
        return math.ceil(self.num_gpus / self.gpus_per_node)

    @property
    def replicas(self) -> int:
        """Machines that hybrid sharding replicates over: 1 where they have different numbers of GPUs."""
        return 1 if self.num_gpus % self.gpus_per_node else self.nodes

    @property
    def usable_bytes(self) -> float:
        return self.memory_bytes * self.memory_share

    @property
    def element_bytes(self) -> int:
        return 4 if self.dtype == "float32" else 2


@dataclass(frozen=True)
class Rates:
    """mfu_*: share of the peak; remit_cost: ReMiT step from stored log-probs / NTP step; seconds: fixed costs."""

    mfu_score: float
    mfu_train: float
    mfu_online: float
    remit_cost: float
    update_seconds: float
    score_start_seconds: float
    train_start_seconds: float


@dataclass(frozen=True)
class Job:
    """tokens of the corpus; global_batch_size in rows."""

    tokens: int
    epochs: float
    seq_len: int
    global_batch_size: int


@dataclass(frozen=True)
class Costs:
    """Seconds on all GPUs together. online_seconds: what the reference takes of an online run, of one epoch."""

    score: float
    ntp: float
    stored: float
    online: float
    online_per_epoch: float

    @property
    def break_even_epochs(self) -> float:
        """Epochs after which scoring has cost no more than a reference online."""
        return self.score / self.online_per_epoch


def costs(base: ModelShape, reference: ModelShape, machine: Machine, rates: Rates, job: Job, recompute: bool) -> Costs:
    """Wall time of scoring the corpus once and of one run of each kind. recompute: activations are checkpointed."""
    flops_per_second = machine.peak_flops * machine.num_gpus
    reference_flops = reference.forward_flops(job.seq_len)
    train_flops = base.train_flops(job.seq_len) + (base.layers_flops(job.seq_len) if recompute else 0)
    trained = job.tokens * job.epochs
    updates = steps_of(trained, job.seq_len, job.global_batch_size) * rates.update_seconds
    passes = trained * train_flops / (flops_per_second * rates.mfu_train)
    online_per_epoch = job.tokens * reference_flops / (flops_per_second * rates.mfu_online)
    stored = passes * rates.remit_cost + updates + rates.train_start_seconds
    return Costs(
        score=job.tokens * reference_flops / (flops_per_second * rates.mfu_score) + rates.score_start_seconds,
        ntp=passes + updates + rates.train_start_seconds,
        stored=stored,
        online=stored + online_per_epoch * job.epochs,
        online_per_epoch=online_per_epoch,
    )


def runs_until_paid(costs: Costs, epochs: float) -> int:
    """Runs of so many epochs (restarts from the first step, ablations) until scoring has cost no more than online."""
    return max(1, math.ceil(costs.break_even_epochs / epochs - 1e-9))


@dataclass(frozen=True)
class Layout:
    """How a process trains: sharding, processes that share its weights, rows per forward, checkpointing."""

    sharding: str
    shards: int
    micro_batch_size: int
    activation_checkpointing: bool


def memory(base: ModelShape, machine: Machine, layout: Layout, seq_len: int) -> dict[str, float]:
    """Bytes per GPU at the fullest moment of a training step, by what holds them."""
    element, tokens = machine.element_bytes, layout.micro_batch_size * seq_len
    embeddings = base.head_parameters * (1 if base.tied else 2)
    layer_parameters = (base.parameters - embeddings) / max(1, base.num_layers)
    gathered = 0.0
    if layout.shards > 1:
        gathered = element * (2 * layer_parameters + embeddings)
    elif element < 4:  # autocast keeps a copy of each matrix until its backward
        gathered = element * (base.parameters - embeddings + base.head_parameters)
    in_float32, in_dtype = base.activation_width
    layer = tokens * (4 * in_float32 + element * in_dtype)
    layer_input = tokens * element * base.hidden_size
    kept = layer * base.num_layers
    if layout.activation_checkpointing:
        kept = layer_input * base.num_layers + layer
    return {
        "weights, float32": 4 * base.parameters / layout.shards,
        "gradients, float32": 4 * base.parameters / layout.shards,
        "AdamW moments, float32": 8 * base.parameters / layout.shards,
        f"gathered or cast weights, {machine.dtype}": gathered,
        "activations": kept,
        "logits of one row": min(4 * seq_len * base.vocab_size, LOGITS_BYTES),
        "gradient of the output embedding": 4 * base.head_parameters,
    }


def default_sharding(base: ModelShape, machine: Machine) -> str:
    """What --sharding auto of remit train chooses."""
    from trainer.distributed import DDP_PARAMETERS

    if machine.num_gpus == 1 or base.parameters <= DDP_PARAMETERS:
        return "replicate"
    return "hybrid" if machine.replicas > 1 else "full"


def shards_of(sharding: str, machine: Machine) -> int:
    """Processes that share the weights."""
    if sharding == "replicate":
        return 1
    return machine.num_gpus // machine.replicas if sharding == "hybrid" else machine.num_gpus


@dataclass(frozen=True)
class Proposal:
    """The layout that fits, or the leanest where none does; bytes: its memory per GPU in all."""

    layout: Layout
    fits: bool
    bytes: float


def propose(
    base: ModelShape,
    machine: Machine,
    job: Job,
    sharding: str = "auto",
    micro_batch_size: int | None = None,
    checkpointing: str = "auto",
) -> Proposal:
    """The first layout that fits: sharding as remit train chooses it before more, no checkpointing before it, the most
    rows per forward. What is given is kept."""
    shardings = [sharding]
    if sharding == "auto":
        first = default_sharding(base, machine)
        more = ["hybrid"] * (machine.replicas > 1) + ["full"] * (machine.num_gpus > 1)
        shardings = list(dict.fromkeys([first, *more]))
    rows_per_gpu = max(1, math.ceil(job.global_batch_size / machine.num_gpus))
    sizes = [micro_batch_size] if micro_batch_size else powers_down(min(rows_per_gpu, LARGEST_MICRO_BATCH))
    leanest: Proposal | None = None
    for kind in shardings:
        for recompute in {"auto": (False, True), "on": (True,), "off": (False,)}[checkpointing]:
            for size in sizes:
                layout = Layout(kind, shards_of(kind, machine), size, recompute)
                needed = sum(memory(base, machine, layout, job.seq_len).values())
                if needed <= machine.usable_bytes:
                    return Proposal(layout, True, needed)
                if leanest is None or needed < leanest.bytes:
                    leanest = Proposal(layout, False, needed)
    assert leanest is not None
    return leanest


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


def disk(job: Job, packed_bytes: float, logprob_bytes: float, topk_entry_bytes: float, top_k: int) -> dict[str, float]:
    """Bytes of the shard folders."""
    packed = job.tokens * packed_bytes
    logprobs, entries = job.tokens * logprob_bytes, job.tokens * top_k * topk_entry_bytes
    return {
        "packed": packed,
        "log-probs": logprobs,
        "top-k entries": entries,
        "scored folder (packed, log-probs, top-k)": packed + logprobs + entries,
        "both folders": 2 * packed + logprobs + entries,
    }
