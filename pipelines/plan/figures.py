"""The figures of remit plan: what is assumed, and what follows from it for two shapes.

In: PlanConfig, shapes of base and reference. Out: one JSON object; pipelines/plan/tables.py prints it.
"""

from dataclasses import asdict
from typing import Any

from pipelines.plan.costs import Rates, Step, costs, disk, step_of
from pipelines.plan.hardware import GPUS, UNKNOWN_GPU, Machine, compute_dtype
from pipelines.plan.layout import Job, chosen_by_train, engine_size, propose
from pipelines.plan.mixture import mixture_job
from pipelines.plan.rmt import rmt_assumptions, rmt_figures, rmt_warnings
from pipelines.plan.settings import PlanConfig
from pipelines.terminal import counted
from trainer.memory import memory
from trainer.mixed_shards import MixedShards
from trainer.model_shape import ModelShape

RUNS = (1, 2, 3, 5, 10)
SAMPLE_BYTES = 1.1
NETWORK = (
    "400 Gb/s for each GPU between machines; replicas exchange beside the backward of their last micro-batch, sharded weights "
    "beside everything"
)
MEASURED_TOKENS = 8192
"""Of a forward at which --mfu-train was measured: two rows of 4,096."""


def assume(config: PlanConfig) -> list[dict[str, Any]]:
    """name, option (None where none replaces it), value, unit and source of each assumption."""
    gpu, dtype = GPUS.get(config.gpu, UNKNOWN_GPU), compute_dtype(config.gpu, config.dtype)
    is_cpu, maker = config.gpu == "cpu", f"{config.gpu}: {gpu.source}"
    mfu_train, measured = 0.4, "usual on GPUs (0.38 to 0.43 in the Llama 3 report)"
    if config.gpu in GPUS and not is_cpu:
        mfu_train, measured = 0.45, "one H100 and H200 at the shapes of OLMo-2-1B (make gpu-check)"
    start = "the sample project" if is_cpu else "a guess"
    entries = []
    for name, default, unit, source in (
        ("gpus_per_node", 8, "GPUs", "usual machine"),
        ("peak_tflops", getattr(gpu, dtype), "TFLOP/s per GPU", f"{config.gpu}, {dtype}: {gpu.source}"),
        ("gpu_memory_gb", gpu.memory_gb, "GB per GPU", maker),
        ("memory_share", 0.9, "of it", "allocator, kernels, communication take the rest"),
        ("link", gpu.link_gbps, "GB/s per GPU", f"inside of a machine, {maker}"),
        ("network", 50, "GB/s per GPU", NETWORK),
        ("global_batch_size", 512, "rows per step", "as in the paper, there rows of 4,096"),
        ("train_rate", None, "tokens/s per GPU", "--mfu-train"),
        ("mfu_train", mfu_train if config.train_rate is None else None, "of the peak", measured),
        ("score_rate", None, "tokens/s per GPU", "--mfu-score"),
        ("mfu_score", 0.4 if config.score_rate is None else None, "of the peak",
         "a guess for prefill with log-probs; give --score-rate"),
        ("online_rate", None, "tokens/s per GPU", "--mfu-train"),
        ("remit_cost", 1.01, "x an NTP step", "bound of make bench-train"),
        ("score_start_seconds", 18 if is_cpu else 180, "s", start),
        ("train_start_seconds", 5 if is_cpu else 120, "s", start),
        ("packed_bytes", 2.1, "B per token", "zstd of Zipf-distributed ids, V = 100,000"),
        ("logprob_bytes", 1.4, "B per token", "measured by this project, steps of 1/64 nat; exact ones take 3.8"),
        ("topk_entry_bytes", 4.3 if config.top_k else None, "B per entry", "make bench-topk"),
        ("top_k_share", 1.0 if config.top_k else None, "of the tokens have top k", "--top-k-below-entropy"),
        ("sample_bytes", SAMPLE_BYTES if config.sample_k else None, "B per drawn token", "make bench-topk"),
        ("entropy_bytes", 1.4 if config.entropy else None, "B per token and column", "the sample project: 0.8 to 1.4"),
        *rmt_assumptions(config),
    ):  # fmt: skip
        option = f"--{name.replace('_', '-')}" if hasattr(config, name) else None
        given = getattr(config, name, None)
        value, source = (default, source) if given is None else (given, "given")
        if value is not None:
            entries.append({"name": name, "option": option, "value": value, "unit": unit, "source": source})
    return entries


def plan_costs(
    config: PlanConfig, base: ModelShape, reference: ModelShape, mixed: MixedShards | None = None
) -> dict[str, Any]:
    """The figures, as --json writes them. mixed: the folders that the run draws from, None for a corpus of full rows."""
    assumptions = assume(config)
    value = {entry["name"]: entry["value"] for entry in assumptions}
    machine = Machine(
        gpu=config.gpu,
        num_gpus=config.num_gpus or (1 if config.gpu == "cpu" else 8),
        gpus_per_node=value["gpus_per_node"],
        dtype=compute_dtype(config.gpu, config.dtype),
        peak_flops=1e12 * value["peak_tflops"],
        memory_bytes=1e9 * value["gpu_memory_gb"],
        memory_share=value["memory_share"],
        link=1e9 * value["link"],
        network=1e9 * value["network"],
    )
    job = Job.of_full_rows(config.num_tokens, config.epochs, config.seq_len, value["global_batch_size"])
    if mixed is not None:
        job = mixture_job(job, mixed)
    layout, needed = propose(
        base, machine, job, config.sharding, config.micro_batch_size, config.activation_checkpointing
    )
    train_flops = base.train_flops + layout.activation_checkpointing * base.layers_flops  # the layers once more
    train_rate = value.get("train_rate") or machine.peak_flops * value["mfu_train"] / train_flops
    score_rate = value.get("score_rate") or machine.peak_flops * value["mfu_score"] / reference.forward_flops
    rates = Rates(
        score=1 / score_rate,
        train=1 / train_rate,
        # at the utilisation of training, unless measured
        online=1 / config.online_rate if config.online_rate else reference.forward_flops / train_flops / train_rate,
        remit_cost=value["remit_cost"],
        score_start_seconds=value["score_start_seconds"],
        train_start_seconds=value["train_start_seconds"],
    )
    step = step_of(base, machine, rates, job, layout)
    found = costs(step, machine, rates, job)
    trained = job.tokens * job.epochs
    gpu_hours = machine.num_gpus / 3600
    engine = engine_size(reference, machine)
    rmt: dict[str, Any] = {}
    if config.rmt_steps is not None:
        ntp_epoch = (found.ntp - rates.train_start_seconds) / job.epochs
        rmt = {"rmt": rmt_figures(config, value, base, machine, rates, ntp_epoch)}
    return {
        "models": {"base": _model(base), "reference": _model(reference)},
        "job": asdict(job),
        "machine": asdict(machine) | {"nodes": machine.nodes},
        "assumptions": assumptions,
        "costs": {
            name: {"wall_seconds": seconds, "gpu_hours": seconds * gpu_hours, "tokens_per_second": tokens / seconds}
            for name, seconds, tokens in (
                ("score once", found.score, job.tokens),
                ("train NTP", found.ntp, trained),
                ("train ReMiT, stored log-probs", found.stored, trained),
                ("train ReMiT, reference online", found.online, trained),
            )
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
        "disk_bytes": disk(
            job.tokens,
            {
                "packed": value["packed_bytes"],
                "log-probs": value["logprob_bytes"],
                "top-k entries": config.top_k * value.get("topk_entry_bytes", 0) * value.get("top_k_share", 1.0),
                "drawn tokens": config.sample_k * value.get("sample_bytes", 0),
                "entropy": config.num_entropies * value.get("entropy_bytes", 0),
            },
        ),
        "memory_bytes": memory(base, machine, layout, job.seq_len) | {"in all": needed},
        "proposal": asdict(layout)
        | {
            "fits": needed <= machine.usable_bytes,
            "usable_bytes": machine.usable_bytes,
            "remit_train_chooses": chosen_by_train(base, machine, job, layout),
            "engine_gpus": engine,
            "online_reference_bytes": machine.element_bytes * reference.parameters,
        },
        "warnings": [
            *_does_not_fit(machine, needed, engine, reference),
            *_too_long(job.seq_len, base, reference),
            *_waits(config, machine, job, step),
            *(rmt_warnings(config, base, machine, value) if rmt else []),
        ],
        **rmt,
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


def _does_not_fit(machine: Machine, needed: float, engine: int | None, reference: ModelShape) -> list[str]:
    lines = []
    if needed > machine.usable_bytes:
        lines.append(
            f"training does not fit: the leanest layout needs {needed / 1e9:,.4g} GB per GPU, of "
            f"{machine.usable_bytes / 1e9:,.4g} GB that may be filled; take more GPUs to shard over, GPUs with more memory, "
            "shorter rows, or leave --sharding, --micro-batch-size and --activation-checkpointing to the plan"
        )
    if engine is None:
        lines.append(
            f"scoring does not fit: the weights of {reference.name} alone are "
            f"{machine.element_bytes * reference.parameters / 1e9:,.4g} GB, too much for an engine on the GPUs of one machine; "
            "take more of them or larger ones"
        )
    return lines


def _too_long(seq_len: int, *shapes: ModelShape) -> list[str]:
    limits = {shape.name: shape.max_position for shape in shapes}  # one line for two models of one name
    return [
        f"{name} takes rows of at most {most:,} tokens, --seq-len is {seq_len:,}; remit would refuse these rows"
        for name, most in limits.items()
        if most is not None and seq_len > most
    ]


def _waits(config: PlanConfig, machine: Machine, job: Job, step: Step) -> list[str]:
    """What keeps GPUs from computing, and guesses."""
    lines = []
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
    tokens, is_cpu = round(rows * job.row_tokens), machine.gpu == "cpu"
    if tokens < MEASURED_TOKENS and config.train_rate is None and config.mfu_train is None and not is_cpu:
        lines.append(
            f"{tokens:,} tokens per GPU and step are few: --mfu-train was measured with {MEASURED_TOKENS:,} and more; take a "
            "larger --global-batch-size or fewer GPUs"
        )
    if is_cpu and None in (config.train_rate, config.score_rate):
        lines.append("the figures of cpu are a guess that may be off several times; give --train-rate and --score-rate")
    return lines
