"""remit plan --measure: time training steps and scoring on this machine with random weights, and turn them into rates.

In: configs of base and reference. Out: a calibration, the JSON object that --calibration keeps. The steps are those of
remit train (same body, head and optimizer), the scoring is remit score on random rows, or a transformers forward where
vLLM is not installed. A model that is too large for the time or the memory is timed at two depths with fewer layers, and
a line through both gives the time of all its layers.

T = tokens of a row, B = rows of a forward, L = layers.
"""

import importlib.util
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from pipelines.plan.calibration import VERSION
from pipelines.plan.costs import assume
from pipelines.plan.measure_score import PARTS, time_scoring
from pipelines.plan.model import ModelShape, reduced
from pipelines.plan.planner import GPUS, Job, Layout, Machine, memory, propose
from pipelines.plan.settings import PlanConfig
from trainer.batch import MicroBatch
from trainer.checks import check_plain_head
from trainer.config import TrainConfig
from trainer.head import token_losses
from trainer.loss_model import LossModel
from trainer.model import Base, resolve_dtype
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.statistics import Sources, StepStatistics
from trainer.train import make_optimizer

ROUNDS = 4  # of each kind of step, at least
FIRST_GUESS = 0.2  # of the peak, to choose depth and rows by
MEMORY_SHARE = 0.5  # of this machine's memory that a measurement may take
Tick = Callable[[str], None]


@dataclass
class Times:
    """Seconds of one micro-batch: forward and backward of NTP and of ReMiT, the reference's forward; of one update."""

    ntp: float
    remit: float
    forward: float
    update: float

    def line_through(self, other: "Times", layers: int, other_layers: int, all_layers: int) -> "Times":
        """Times at all_layers, by the line through these and those at other_layers; never less than the larger."""
        share = (all_layers - layers) / (layers - other_layers)
        pairs = zip(asdict(self).items(), asdict(other).values())
        return Times(**{name: max(mine, mine + share * (mine - theirs)) for (name, mine), theirs in pairs})


def this_machine(config: PlanConfig, tick: Tick) -> tuple[dict[str, Any], torch.device]:
    """Name, peak and memory of one GPU here, or of the CPU with all its cores."""
    dtype_name = config.dtype
    device = torch.device("cuda" if torch.cuda.is_available() and config.gpu != "cpu" else "cpu")
    dtype = resolve_dtype(dtype_name, device)
    name, memory_bytes = "cpu", os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        words = properties.name.lower().replace(" ", "")
        name = next((key for key in GPUS if key in words), words)
        memory_bytes = properties.total_memory
    if config.gpu not in (None, name):
        raise ValueError(f"--gpu is {config.gpu}, but --measure times this machine, {name}; leave --gpu out")
    found: dict[str, Any] = {"gpu": name, "dtype": str(dtype).removeprefix("torch.")}
    found["gpu_memory_gb"] = config.gpu_memory_gb or memory_bytes / 1e9
    if config.peak_tflops is not None:
        found["peak_tflops"] = config.peak_tflops
    elif name == "cpu" or name not in GPUS:
        tick("peak of matrix products")
        found["peak_tflops"] = matrix_product_flops(device, dtype) / 1e12
    return found, device


def matrix_product_flops(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of several large matrix products."""
    size = 8192 if device.type == "cuda" else 1536
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    for _ in range(8):
        _synchronize(device)
        began = perf_counter()
        torch.mm(left, right)
        _synchronize(device)
        best = min(best, perf_counter() - began)
    return 2 * size**3 / best


def measure(
    config: PlanConfig, configs: tuple[Any, Any], shapes: tuple[ModelShape, ModelShape], tick: Tick = lambda what: None
) -> dict[str, Any]:
    """The calibration. configs: transformers' configs of base and reference; tick(what) is told what comes next."""
    here, device = this_machine(config, tick)
    defaults = replace(config, calibration=None, gpu=here["gpu"], mfu_train=None, mfu_score=None, mfu_online=None)
    machine, rates, job, _, _ = assume(replace(defaults, num_gpus=1), here)
    base, reference = shapes
    layout = propose(
        base, machine, job, "replicate", config.micro_batch_size, config.activation_checkpointing
    ).layout  # fmt: skip
    rows, layers = fitting(base, reference, machine, job, layout, config.measure_seconds)
    times = time_steps(configs, layers, job, rows, layout.activation_checkpointing, device, machine, config, tick)
    fewer = layers[0] // 2, layers[1] // 2
    if layers != (base.num_layers, reference.num_layers) and min(fewer) >= 1:
        less = time_steps(configs, fewer, job, rows, layout.activation_checkpointing, device, machine, config, tick)
        trained = times.line_through(less, layers[0], fewer[0], base.num_layers)
        times = replace(trained, forward=times.line_through(less, layers[1], fewer[1], reference.num_layers).forward)
        timed = base, reference
    else:
        timed = cut(base, layers[0]), cut(reference, layers[1])
    tokens = rows * job.seq_len
    recomputed = timed[0].layers_flops(job.seq_len) if layout.activation_checkpointing else 0
    train_flops = tokens * (timed[0].train_flops(job.seq_len) + recomputed)
    forward_flops = tokens * timed[1].forward_flops(job.seq_len)
    peak = machine.peak_flops
    found = here | {
        "mfu_train": train_flops / times.ntp / peak,
        "mfu_online": forward_flops / times.forward / peak,
        "mfu_score": forward_flops / times.forward / peak,
        "remit_cost": times.remit / times.ntp,
        "update_seconds": times.update,
    }
    expected = {
        "NTP, forward and backward": (times.ntp, train_flops / (peak * rates.mfu_train)),
        "ReMiT, stored log-probs": (times.remit, train_flops * rates.remit_cost / (peak * rates.mfu_train)),
        "forward of the reference": (times.forward, forward_flops / (peak * rates.mfu_online)),
    }
    engine = config.measure_engine
    has_vllm = importlib.util.find_spec("vllm") is not None
    if engine == "vllm" and not has_vllm:
        raise ValueError(
            "--measure-engine is vllm, which is not installed; in your checkout of remit: pip install '.[gpu]', or '.[cpu]' without a GPU"
        )
    if engine == "auto":
        engine = "vllm" if has_vllm else "transformers"
    if engine == "vllm":
        tick("remit score on random rows, engines start")
        depth = layers[1]
        count = max(4 * PARTS, int(config.measure_seconds * tokens / times.forward / job.seq_len))
        scored, start_seconds, seconds = time_scoring(configs[1], depth, job.seq_len, count)
        flops = scored * cut(reference, depth).forward_flops(job.seq_len)
        found |= {"mfu_score": flops / seconds / peak, "score_start_seconds": start_seconds}
        expected[f"remit score, {scored:,} tokens"] = (seconds, flops / (peak * rates.mfu_score))
        expected["start of its engines"] = (start_seconds, rates.score_start_seconds)
    return {
        "version": VERSION,
        **found,
        "seq_len": job.seq_len,
        "measured": [
            {"what": what, "measured_seconds": seen, "predicted_seconds": plan, "ratio": seen / plan}
            for what, (seen, plan) in expected.items()
        ],
        "how": {
            "engine": engine,
            "rows_per_forward": rows,
            "layers": dict(zip(("base", "reference"), layers)),
            "activation_checkpointing": layout.activation_checkpointing,
            "base": base.name,
            "reference": reference.name,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
        },
    }


def cut(shape: ModelShape, layers: int) -> ModelShape:
    """The shape with fewer layers, all of them alike."""
    if layers >= shape.num_layers:
        return shape
    embeddings = shape.head_parameters * (1 if shape.tied else 2)
    share = layers / shape.num_layers
    return replace(
        shape,
        parameters=round(embeddings + (shape.parameters - embeddings) * share),
        matrix_parameters=round(shape.matrix_parameters * share),
        attention=shape.attention[:layers],
    )


def fitting(
    base: ModelShape, reference: ModelShape, machine: Machine, job: Job, layout: Layout, seconds: float
) -> tuple[int, tuple[int, int]]:
    """Rows per forward and layers of base and reference that this machine holds and times within `seconds`."""

    def fits(rows: int, share: float) -> bool:
        smaller = [cut(shape, max(1, int(shape.num_layers * share))) for shape in (base, reference)]
        held = sum(memory(smaller[0], machine, replace(layout, micro_batch_size=rows), job.seq_len).values())
        held += 4 * smaller[1].parameters
        flops = rows * job.seq_len * (3 * smaller[0].train_flops(job.seq_len) + smaller[1].forward_flops(job.seq_len))
        round_seconds = flops / (FIRST_GUESS * machine.peak_flops)
        return held <= MEMORY_SHARE * machine.memory_bytes and ROUNDS * round_seconds <= 3 * seconds

    rows, share = layout.micro_batch_size, 1.0
    while not fits(rows, share) and (rows > 1 or share > 1 / 64):
        # rows first: a row more changes the rate less than a layer less
        rows, share = (max(1, rows // 2), share) if rows > 1 else (rows, share / 2)
    return rows, (max(1, int(base.num_layers * share)), max(1, int(reference.num_layers * share)))


def random_model(config: Any, layers: int, device: torch.device, dtype: str) -> Base:
    """A model of that config with `layers` layers and random weights, as remit train would hold it."""
    from transformers import AutoModelForCausalLM

    smaller = reduced(config, layers)
    with torch.device(device):
        model: Any = AutoModelForCausalLM.from_config(smaller, dtype=torch.float32)
    base = Base(model, resolve_dtype(dtype, device))
    model.train()
    return base


def time_steps(
    configs: tuple[Any, Any],
    layers: tuple[int, int],
    job: Job,
    rows: int,
    recompute: bool,
    device: torch.device,
    machine: Machine,
    config: PlanConfig,
    tick: Tick,
) -> Times:
    """Medians of several rounds, in which NTP, ReMiT and the reference's forward take turns."""
    tick(f"build random models with {layers[0]} and {layers[1]} layers")
    base = random_model(configs[0], layers[0], device, machine.dtype)
    check_plain_head(base)
    base.prepare(recompute, "auto")
    reference = random_model(configs[1], layers[1], device, machine.dtype)
    reference.prepare(False, "auto")
    model = LossModel(base)
    optimizer = make_optimizer(model, TrainConfig("", "", Path("."), learning_rate=1e-6))
    shape = rows, job.seq_len
    vocabulary = min(base.num_embeddings, reference.num_embeddings)
    predicted = torch.ones(shape, dtype=torch.bool)
    predicted[:, 0] = False
    logprobs = -10 * torch.rand(shape, device=device)
    batch = MicroBatch(torch.randint(0, vocabulary, shape, device=device), predicted, {"logprobs": logprobs})
    objectives = {name: make_objective(ObjectiveSettings(objective=name)) for name in ("ntp", "remit")}  # type: ignore[arg-type]
    seconds: dict[str, list[float]] = {"ntp": [], "remit": [], "forward": [], "update": []}

    def timed(name: str, call: Callable[[], None]) -> None:
        _synchronize(device)
        began = perf_counter()
        call()
        _synchronize(device)
        seconds[name].append(perf_counter() - began)

    def train(name: str) -> None:
        statistics = StepStatistics(device, figures=objectives[name].figures)
        model(batch, objectives[name], rows * (job.seq_len - 1), 1, statistics).backward()
        _ = statistics.metrics(Sources(()))  # once per step in training, and it is little

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    tick(f"training steps of {rows} rows of {job.seq_len} tokens")
    until = math.inf
    while len(seconds["ntp"]) <= ROUNDS or perf_counter() < until:
        kinds = ("ntp", "remit") if len(seconds["ntp"]) % 2 else ("remit", "ntp")
        for name in kinds:
            timed(name, lambda: train(name))  # noqa: B023
            timed("update", update)
        timed("forward", lambda: reference_forward(reference, batch))
        if until == math.inf:  # the first round warms up and compiles
            until = perf_counter() + config.measure_seconds
        tick("")
    return Times(**{name: median(values[1:]) for name, values in seconds.items()})


@torch.no_grad()
def reference_forward(reference: Base, batch: MicroBatch) -> None:
    """Log-probs of the batch, row by row, as a reference inside of the training step has to compute them."""
    hidden_BTH = reference.hidden_states(batch.input_ids_BT)
    weight_VH = reference.head.weight.to(hidden_BTH.dtype)
    for hidden_TH, ids_T in zip(hidden_BTH, batch.input_ids_BT):
        token_losses(torch.nn.functional.linear(hidden_TH[:-1], weight_VH).float(), ids_T[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()
