"""The figures of remit plan: shapes, a table of assumptions each of which an option replaces, and what follows from them.

In: PlanConfig, shapes of base and reference. Out: one JSON object; pipelines/plan/tables.py prints it.
"""

import math
from dataclasses import asdict
from typing import Any

from pipelines.plan.costs import Rates, Step, costs, disk, step_of
from pipelines.plan.hardware import GPU, GPUS, Machine, compute_dtype
from pipelines.plan.layout import Job, Layout, Proposal, default_sharding, engine_size, memory, propose
from pipelines.plan.model_shape import ModelShape
from pipelines.plan.settings import PlanConfig
from pipelines.terminal import counted

RUNS = (1, 2, 3, 5, 10)
OURS = "measured by this project"
NETWORK = (
    "400 Gb/s for each GPU between machines; replicas exchange beside the backward of their last micro-batch, sharded weights "
    "beside everything"
)
MEASURED_TOKENS = 8192
"""Of a forward at which --mfu-train was measured: two rows of 4,096."""


class Assumptions:
    """Values with where they come from: an option, else a default."""

    def __init__(self, config: PlanConfig) -> None:
        self._config = config
        self.entries: list[dict[str, Any]] = []

    def take(self, name: str, default: Any, unit: str, source: str) -> Any:
        """The value of the setting `name`, written down."""
        given = getattr(self._config, name)
        value, source = (default, source) if given is None else (given, "given")
        if value is not None:
            self.entries.append(
                {"option": f"--{name.replace('_', '-')}", "value": value, "unit": unit, "source": source}
            )
        return value


def machine_of(config: PlanConfig, notes: Assumptions) -> Machine:
    """The GPUs of the plan."""
    name = config.gpu
    known = GPUS.get(name) or GPU(math.nan, math.nan, math.nan, 32, "PCIe 4.0 x16")  # peak and memory are given
    dtype = compute_dtype(name, config.dtype)
    peak, source = getattr(known, dtype), f"{name}, {dtype}: {known.source}"
    return Machine(
        gpu=name,
        num_gpus=config.num_gpus or (1 if name == "cpu" else 8),
        gpus_per_node=notes.take("gpus_per_node", 8, "GPUs", "usual machine"),
        dtype=dtype,
        peak_flops=1e12 * notes.take("peak_tflops", peak, "TFLOP/s per GPU", source),
        memory_bytes=1e9 * notes.take("gpu_memory_gb", known.memory_gb, "GB per GPU", f"{name}: {known.source}"),
        memory_share=notes.take("memory_share", 0.9, "of it", "allocator, kernels, communication take the rest"),
        link=1e9 * notes.take("link", known.link_gbps, "GB/s per GPU", f"inside of a machine, {name}: {known.source}"),
        network=1e9 * notes.take("network", 50, "GB/s per GPU", NETWORK),
    )


def rates_of(
    config: PlanConfig, notes: Assumptions, base: ModelShape, reference: ModelShape, machine: Machine, layout: Layout
) -> Rates:
    """A measured rate where one is given, else FLOPs at a share of the peak."""
    is_cpu = machine.gpu == "cpu"
    train_flops = base.train_flops + layout.activation_checkpointing * base.layers_flops  # the layers once more
    train_rate = notes.take("train_rate", None, "tokens/s per GPU", "")
    if train_rate is None:
        usual, source = 0.4, "usual on GPUs (0.38 to 0.43 in the Llama 3 report)"
        if machine.gpu in GPUS and not is_cpu:
            usual, source = 0.45, "one H100 and H200 at the shapes of OLMo-2-1B (make gpu-check)"
        mfu_train, online_source = notes.take("mfu_train", usual, "of the peak", source), "as --mfu-train"
        train_rate = machine.peak_flops * mfu_train / train_flops
    else:
        mfu_train, online_source = train_rate * train_flops / machine.peak_flops, "as --train-rate comes to"
    score_rate = notes.take("score_rate", None, "tokens/s per GPU", "")
    if score_rate is None:
        mfu_score = notes.take("mfu_score", 0.4, "of the peak", "a guess for prefill with log-probs; give --score-rate")
        score_rate = machine.peak_flops * mfu_score / reference.forward_flops
    mfu_online = notes.take("mfu_online", mfu_train, "of the peak", online_source)
    start_source = OURS if is_cpu else "a guess"
    return Rates(
        score=1 / score_rate,
        train=1 / train_rate,
        online=reference.forward_flops / (machine.peak_flops * mfu_online),
        remit_cost=notes.take("remit_cost", 1.01, "x an NTP step", "bound of make bench-train"),
        score_start_seconds=notes.take("score_start_seconds", 18 if is_cpu else 180, "s", start_source),
        train_start_seconds=notes.take("train_start_seconds", 5 if is_cpu else 120, "s", start_source),
    )


def disk_of(config: PlanConfig, notes: Assumptions, job: Job) -> dict[str, float]:
    """Bytes of the shard folders."""
    packed = notes.take("packed_bytes", 2.1, "B per token", "zstd of Zipf-distributed ids, V = 100,000")
    logprob = notes.take("logprob_bytes", 1.4, "B per token", f"{OURS}, steps of 1/64 nat; exact ones take 3.8")
    entry = notes.take("topk_entry_bytes", 4.3, "B per entry", "make bench-topk") if config.top_k else 0.0
    return disk(job, packed, logprob, entry, config.top_k)


def plan_costs(config: PlanConfig, base: ModelShape, reference: ModelShape) -> dict[str, Any]:
    """The figures, as --json writes them."""
    notes = Assumptions(config)
    machine = machine_of(config, notes)
    batch = notes.take("global_batch_size", 512, "rows per step", "as in the paper, there rows of 4,096")
    job = Job(config.num_tokens, config.epochs, config.seq_len, batch)
    proposal = propose(base, machine, job, config.sharding, config.micro_batch_size, config.activation_checkpointing)
    layout = proposal.layout
    rates = rates_of(config, notes, base, reference, machine, layout)
    step = step_of(base, machine, rates, job, layout)
    found = costs(step, machine, rates, job)
    runs = {
        "train NTP": found.ntp,
        "train ReMiT, stored log-probs": found.stored,
        "train ReMiT, reference online": found.online,
    }
    trained = job.tokens * job.epochs
    timed = {"score once": (found.score, job.tokens)} | {name: (seconds, trained) for name, seconds in runs.items()}
    gpu_hours = machine.num_gpus / 3600
    engine = engine_size(reference, machine)
    return {
        "models": {"base": _model(base), "reference": _model(reference)},
        "job": asdict(job) | {"steps": job.steps},
        "machine": asdict(machine) | {"nodes": machine.nodes},
        "assumptions": notes.entries,
        "costs": {
            name: {"wall_seconds": seconds, "gpu_hours": seconds * gpu_hours, "tokens_per_second": tokens / seconds}
            for name, (seconds, tokens) in timed.items()
        },
        "step": {
            "rows_per_gpu": job.rows_per_gpu(machine.num_gpus),
            "compute_seconds": step.compute,
            "exchange_seconds": step.exchange,
            "exchange_overlapped_seconds": step.overlapped,
        },
        "break_even": {
            "epochs": found.break_even_epochs,
            "runs": found.runs_until_paid(job.epochs),
            "gpu_hours_saved_per_epoch": found.online_per_epoch * gpu_hours,
            "totals": [
                {
                    "runs": number,
                    "stored_gpu_hours": (found.score + number * found.stored) * gpu_hours,
                    "online_gpu_hours": number * found.online * gpu_hours,
                }
                for number in RUNS
            ],
        },
        "disk_bytes": disk_of(config, notes, job),
        "memory_bytes": memory(base, machine, layout, job.seq_len) | {"in all": proposal.bytes},
        "proposal": asdict(layout)
        | {
            "fits": proposal.fits,
            "usable_bytes": machine.usable_bytes,
            "remit_train_chooses": default_sharding(base, machine),
            "engine_gpus": engine,
            "online_reference_bytes": machine.element_bytes * reference.parameters,
        },
        "warnings": _warnings(config, base, reference, machine, job, proposal, engine, step),
    }


def _model(shape: ModelShape) -> dict[str, Any]:
    return {
        "name": shape.name,
        "parameters": shape.parameters,
        "non_embedding_parameters": round(shape.matrix_flops / 2),  # those that a token is multiplied with
        "head_parameters": shape.head_parameters,
        "tied": shape.tied,
        "layers": shape.num_layers,
        "forward_flops_per_token": shape.forward_flops,
        "train_flops_per_token": shape.train_flops,
    }


def _warnings(
    config: PlanConfig,
    base: ModelShape,
    reference: ModelShape,
    machine: Machine,
    job: Job,
    proposal: Proposal,
    engine: int | None,
    step: Step,
) -> list[str]:
    lines = []
    if not proposal.fits:
        lines.append(
            f"training does not fit: the leanest layout needs {proposal.bytes / 1e9:,.4g} GB per GPU, of "
            f"{machine.usable_bytes / 1e9:,.4g} GB that may be filled; take more GPUs to shard over, GPUs with more memory, "
            "shorter rows, or leave --sharding, --micro-batch-size and --activation-checkpointing to the plan"
        )
    if engine is None:
        lines.append(
            f"scoring does not fit: the weights of {reference.name} alone are "
            f"{machine.element_bytes * reference.parameters / 1e9:,.4g} GB, too much for an engine on the GPUs of one machine; "
            "take more of them or larger ones"
        )
    limits = {shape.name: shape.max_position for shape in (base, reference)}  # one line for two models of one name
    for name, most in limits.items():
        if most is not None and job.seq_len > most:
            lines.append(
                f"{name} takes rows of at most {most:,} tokens, --seq-len is {job.seq_len:,}; remit would refuse these rows"
            )
    rows = job.rows_per_gpu(machine.num_gpus)
    idle = 1 - job.global_batch_size / (rows * machine.num_gpus)
    if idle > 0:
        lines.append(
            f"{idle:.0%} of the GPUs' time is lost: --global-batch-size {job.global_batch_size} gives some of "
            f"{machine.num_gpus} GPUs {counted(rows, 'row')} and others fewer; take a multiple of {machine.num_gpus}"
        )
    if step.exchange > step.compute:
        lines.append(
            f"the GPUs exchange gradients for {step.exchange:.3g} s of a step and compute for {step.compute:.3g} s; take a larger "
            "--global-batch-size, fewer GPUs or a faster --network"
        )
    tokens = rows * job.seq_len
    if tokens < MEASURED_TOKENS and config.train_rate is None and config.mfu_train is None and machine.gpu != "cpu":
        lines.append(
            f"{tokens:,} tokens per GPU and step are few: --mfu-train was measured with {MEASURED_TOKENS:,} and more; take a "
            "larger --global-batch-size or fewer GPUs"
        )
    if machine.gpu == "cpu" and None in (config.train_rate, config.score_rate):
        lines.append("the figures of cpu are a guess that may be off several times; give --train-rate and --score-rate")
    return lines
