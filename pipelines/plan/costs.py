"""remit plan: what a project costs, from two configs and a table of assumptions, each of which an option replaces.

In: PlanConfig, shapes of base and reference, a calibration. Out: one JSON object; pipelines/plan/tables.py prints it.
"""

from dataclasses import asdict
from typing import Any

from pipelines.plan.model import ModelShape, steps_of
from pipelines.plan.planner import (
    GPU,
    GPUS,
    Job,
    Machine,
    Proposal,
    Rates,
    costs,
    default_sharding,
    disk,
    engine_size,
    memory,
    propose,
    runs_until_paid,
)
from pipelines.plan.settings import PlanConfig
from pipelines.plan.tables import in_bytes

RUNS = (1, 2, 3, 5, 10)
LOGPROB_BYTES, EXACT_LOGPROB_BYTES = 1.4, 3.8
OURS = "measured by this project"


class Assumptions:
    """Values with where they come from: an option, else the calibration, else a default."""

    def __init__(self, config: PlanConfig, calibration: dict[str, Any]) -> None:
        self._config, self._calibration = config, calibration
        self.entries: list[dict[str, Any]] = []

    def take(self, name: str, default: Any, unit: str, source: str) -> Any:
        """The value of the setting `name`, written down."""
        given, measured = getattr(self._config, name), self._calibration.get(name)
        default_setting = PlanConfig.__dataclass_fields__[name].default
        option = f"--{name.replace('_', '-')}"
        if given is not None:
            value, source = given, source if given == default_setting else "given"
        elif measured is not None:
            value, source = measured, "calibration"
        else:
            value = default
        self.entries.append({"option": option, "value": value, "unit": unit, "source": source})
        return value


def assume(
    config: PlanConfig, calibration: dict[str, Any]
) -> tuple[Machine, Rates, Job, dict[str, float], Assumptions]:
    """Everything that a plan takes as given; the dict has bytes per token. ValueError for a GPU that is not known."""
    notes = Assumptions(config, calibration)
    name = config.gpu or calibration.get("gpu") or "h200"
    known = GPUS.get(name) or _custom(name, config, calibration)
    is_cpu = name == "cpu"
    dtype = config.dtype
    if dtype == "auto":
        dtype = calibration.get("dtype") or ("float32" if is_cpu else "bfloat16")
    for option, asked in (("gpu", name), ("dtype", dtype)):
        if calibration.get(option, asked) != asked:
            raise ValueError(
                f"the calibration was measured with {option} {calibration[option]}, the plan is for {asked}; leave --{option} "
                "or the calibration out"
            )
    whose = f"{name}, {dtype}: {known.source}"
    num_gpus = config.num_gpus or (1 if is_cpu or config.measure else 8)
    peak = notes.take("peak_tflops", getattr(known, dtype), "TFLOP/s per GPU", whose)
    machine = Machine(
        gpu=name,
        num_gpus=num_gpus,
        gpus_per_node=notes.take("gpus_per_node", None, "GPUs", "usual machine"),
        dtype=dtype,
        peak_flops=peak * 1e12,
        memory_bytes=1e9 * notes.take("gpu_memory_gb", known.memory_gb, "GB per GPU", f"{name}: {known.source}"),
        memory_share=notes.take("memory_share", None, "of it", "allocator, kernels, communication take the rest"),
    )
    usual = "usual on GPUs (0.38 to 0.43 in the Llama 3 report); measure yours"
    mfu_train = notes.take("mfu_train", 0.4, "of the peak", usual)
    rates = Rates(
        mfu_score=notes.take("mfu_score", 0.4, "of the peak", "a guess for prefill with log-probs; measure yours"),
        mfu_train=mfu_train,
        mfu_online=notes.take("mfu_online", mfu_train, "of the peak", "as --mfu-train"),
        remit_cost=notes.take("remit_cost", 1.01, "x an NTP step", "bound of make bench-train"),
        update_seconds=notes.take("update_seconds", 0.0, "s per step", "within --mfu-train"),
        score_start_seconds=notes.take(
            "score_start_seconds", 18.0 if is_cpu else 180.0, "s", OURS if is_cpu else "a guess"
        ),
        train_start_seconds=notes.take(
            "train_start_seconds", 5.0 if is_cpu else 120.0, "s", OURS if is_cpu else "a guess"
        ),
    )
    job = Job(
        tokens=config.num_tokens,
        epochs=notes.take("epochs", None, "passes", "default"),
        seq_len=notes.take("seq_len", None, "tokens per row", "default"),
        global_batch_size=notes.take("global_batch_size", None, "rows per step", "default"),
    )
    rounded = config.logprob_step > 0
    notes.take("logprob_step", None, "nat", "default")
    per_token = {
        "packed_bytes": notes.take("packed_bytes", None, "B per token", "zstd of Zipf-distributed ids, V = 100,000"),
        "logprob_bytes": notes.take(
            "logprob_bytes", LOGPROB_BYTES if rounded else EXACT_LOGPROB_BYTES, "B per token", OURS
        ),
        "topk_entry_bytes": notes.take("topk_entry_bytes", None, "B per entry", "make bench-topk"),
    }
    notes.take("top_k", None, "entries per token", "default")
    return machine, rates, job, per_token, notes


def _custom(name: str, config: PlanConfig, calibration: dict[str, Any]) -> GPU:
    peak = config.peak_tflops or calibration.get("peak_tflops")
    memory_gb = config.gpu_memory_gb or calibration.get("gpu_memory_gb")
    if not peak or not memory_gb:
        raise ValueError(
            f"--gpu is {name!r}, expected one of {', '.join(GPUS)}; for another one give --peak-tflops and "
            "--gpu-memory-gb too"
        )
    return GPU(peak, peak, memory_gb, "given")


def plan_costs(
    config: PlanConfig, base: ModelShape, reference: ModelShape, calibration: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The figures, as --json writes them. calibration: what pipelines/plan/measure.py found, or {}."""
    machine, rates, job, per_token, notes = assume(config, calibration or {})
    proposal = propose(
        base, machine, job, config.sharding, config.micro_batch_size, config.activation_checkpointing
    )  # fmt: skip
    layout = proposal.layout
    found = costs(base, reference, machine, rates, job, layout.activation_checkpointing)
    seconds = {
        "score once": found.score,
        "train NTP": found.ntp,
        "train ReMiT, stored log-probs": found.stored,
        "train ReMiT, reference online": found.online,
    }
    gpu_hours = machine.num_gpus / 3600
    engine = engine_size(reference, machine)
    return {
        "models": {
            role: {
                "name": shape.name,
                "parameters": shape.parameters,
                "non_embedding_parameters": shape.matrix_parameters,
                "head_parameters": shape.head_parameters,
                "tied": shape.tied,
                "layers": shape.num_layers,
                "forward_flops_per_token": shape.forward_flops(job.seq_len),
                "train_flops_per_token": shape.train_flops(job.seq_len),
            }
            for role, shape in (("base", base), ("reference", reference))
        },
        "job": asdict(job) | {"steps": steps_of(job.tokens * job.epochs, job.seq_len, job.global_batch_size)},
        "machine": asdict(machine) | {"nodes": machine.nodes},
        "assumptions": notes.entries,
        "costs": {
            name: {"wall_seconds": value, "gpu_hours": value * gpu_hours, "tokens_per_second": tokens / value}
            for name, value in seconds.items()
            for tokens in [job.tokens * (1 if name == "score once" else job.epochs)]
        },
        "break_even": {
            "epochs": found.break_even_epochs,
            "runs": runs_until_paid(found, job.epochs),
            "gpu_hours_saved_per_epoch": found.online_per_epoch * gpu_hours,
            "totals": [
                {
                    "runs": runs,
                    "stored_gpu_hours": (found.score + runs * found.stored) * gpu_hours,
                    "online_gpu_hours": runs * found.online * gpu_hours,
                }
                for runs in RUNS
            ],
        },
        "disk_bytes": disk(job, **per_token, top_k=config.top_k),
        "memory_bytes": memory(base, machine, layout, job.seq_len) | {"in all": proposal.bytes},
        "proposal": asdict(layout)
        | {
            "fits": proposal.fits,
            "usable_bytes": machine.usable_bytes,
            "remit_train_chooses": default_sharding(base, machine),
            "engine_gpus": engine,
            "online_reference_bytes": machine.element_bytes * reference.parameters,
        },
        "warnings": _warnings(base, reference, machine, job, proposal, engine, bool(calibration)),
        "measured": (calibration or {}).get("measured", []),
    }


def _warnings(
    base: ModelShape,
    reference: ModelShape,
    machine: Machine,
    job: Job,
    proposal: Proposal,
    engine: int | None,
    calibrated: bool,
) -> list[str]:
    lines = []
    if not proposal.fits:
        lines.append(
            f"training does not fit: the leanest layout needs {in_bytes(proposal.bytes)} per GPU, of "
            f"{in_bytes(machine.usable_bytes)} that may be filled; take more GPUs to shard over, GPUs with more memory, shorter "
            "rows, or leave --sharding, --micro-batch-size and --activation-checkpointing to the plan"
        )
    if engine is None:
        lines.append(
            f"scoring does not fit: the weights of {reference.name} alone are "
            f"{in_bytes(machine.element_bytes * reference.parameters)}, too much for an engine on the GPUs of one machine; take "
            "more of them or larger ones"
        )
    for shape in (base, reference):
        if shape.max_position is not None and job.seq_len > shape.max_position:
            lines.append(
                f"{shape.name} takes rows of at most {shape.max_position:,} tokens, --seq-len is {job.seq_len:,}; remit would "
                "refuse these rows"
            )
    if machine.num_gpus > job.global_batch_size:
        lines.append(
            f"{machine.num_gpus} GPUs share --global-batch-size {job.global_batch_size}: some have no row in a step; raise it"
        )
    if machine.gpu == "cpu" and not calibrated:
        lines.append("the figures of cpu are a guess that may be off several times; --measure times this machine")
    return lines
