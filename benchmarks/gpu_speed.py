"""Speed of the trainer on a GPU at the shapes of OLMo-2-1B, in variants, and where the time of a step goes.

In: a folder for model and shards, and how long it may take. Out: tables, and claims for the result file. Part of
`python -m benchmarks.gpu_check`; small shapes on a CPU, where only the ratios of one dtype say something.
"""

import contextlib
import gc
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

import trainer.head
from benchmarks.common import Claim, claim
from benchmarks.training import Steps, synchronize
from shards import ShardFolder
from trainer.deterministic import deterministic
from trainer.float8 import CAPABILITY
from trainer.gpu_peaks import bfloat16_peak
from trainer.model import load_base
from trainer.model_flops import count_model_flops
from trainer.objectives.objective import exponentiate

PROFILED_STEPS = 2
KINDS = (
    ("attention", r"flash|fmha|attention|sdpa|_mha_"),
    ("matrix products", r"gemm|nvjet|cutlass|xmma|scaled_mm|aten::(mm|addmm|bmm)$"),
    ("optimizer, clipping", r"multi_tensor|adam|foreach|lpnorm"),
    ("compiled kernels of the layers", r"triton"),
    ("copies and casts", r"copy|memcpy|memset|fill|zero_"),
    ("softmax and gradient of the head, other elementwise", r"elementwise|reduce|softmax|scatter|gather|index|aten::"),
)
"""Kinds of kernels by their names; the first that matches counts."""


@dataclass(frozen=True)
class Variant:
    """One way to train: an objective with settings of the step. rows: of a forward pass."""

    name: str
    objective: str = "ntp"
    rows: int = 2
    float8: bool = False
    deterministic: bool = False
    online: bool = False
    compiled_softmax: bool = False


NTP = Variant("NTP")
FLOAT8 = Variant("NTP, --float8", float8=True)
DETERMINISTIC = Variant("NTP, --deterministic", deterministic=True)
STORED, ONLINE = Variant("ReMiT, stored", "remit"), Variant("ReMiT, online", "remit", online=True)
VARIANTS = (
    NTP, FLOAT8, DETERMINISTIC, STORED, ONLINE, Variant("NTP, four rows in a forward", rows=4),
    Variant("NTP, softmax of the head compiled", compiled_softmax=True),
)  # fmt: skip
"""In the order of their worth: the last ones are left out where time is short."""


@dataclass(frozen=True)
class Measured:
    """tokens and model FLOPs per second of each step; peak memory in bytes."""

    tokens: list[float]
    flops: list[float]
    peak_bytes: float


@dataclass(frozen=True)
class Bench:
    """Where and what is timed. ends_at: by perf_counter, after which no variant begins."""

    model: Path
    shards: ShardFolder
    device: torch.device
    dtype: str
    rows: int
    steps: int
    ends_at: float

    @contextlib.contextmanager
    def trainer(self, variant: Variant) -> Iterator[Steps]:
        """A trainer after its first steps."""
        gc.collect()  # compiled layers are cycles of references
        with deterministic(self.device, variant.deterministic), softmax_compiled(variant.compiled_softmax):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            online = load_base(self.model, self.dtype, self.device) if variant.online else None
            if online is not None:
                online.prepare(False, "auto")
                online.model.to(online.dtype)
            steps = Steps(
                self.shards, self.model, variant.objective, self.rows, min(variant.rows, self.rows),
                self.steps + 3 + PROFILED_STEPS, self.device, self.dtype, online, float8="on" if variant.float8 else "",
            )  # fmt: skip
            for _ in range(3):
                steps.step()
            yield steps

    def skips(self, variant: Variant) -> str:
        """Why a variant is not run; empty where it is."""
        if variant.float8 and (self.device.type != "cuda" or torch.cuda.get_device_capability() < CAPABILITY):
            return "no float8 products here"
        # the others are ratios to the first one
        return "no time left" if variant != NTP and perf_counter() > self.ends_at else ""

    def measure(self) -> tuple[dict[str, Measured], list[tuple[str, float, float]]]:
        """Of each variant that is run its figures, and of the first one what its time goes to."""
        flops = count_model_flops(transformers.AutoConfig.from_pretrained(self.model))
        found, parts = dict[str, Measured](), []
        for variant in VARIANTS:
            if reason := self.skips(variant):
                print(f"{variant.name}: left out, {reason}", flush=True)
                continue
            with self.trainer(variant) as steps:
                seconds = [steps.step() for _ in range(self.steps)]
                work = flops.of_step(steps.rows, "packed")
                peak = float(torch.cuda.max_memory_allocated()) if self.device.type == "cuda" else float("nan")
                tokens = [steps.tokens / value for value in seconds]
                found[variant.name] = Measured(tokens, [work / value for value in seconds], peak)
                if variant == NTP:
                    parts = profiled(steps, self.device)
                del steps
        return found, parts


@contextlib.contextmanager
def softmax_compiled(wanted: bool) -> Iterator[None]:
    """The head's passes over float32 logits as the compiler fuses them: whether that wins is what is asked."""
    if not wanted:
        yield
        return
    before: Any = trainer.head.exponentiate
    trainer.head.exponentiate = torch.compile(exponentiate, dynamic=False)
    try:
        yield
    finally:
        trainer.head.exponentiate = before


def kind_of(name: str) -> str:
    """What a kernel, or on a CPU an operation, of this name does."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name, re.IGNORECASE)), "others")


def profiled(steps: Steps, device: torch.device) -> list[tuple[str, float, float]]:
    """(kind or kernel, seconds per step, share of the step) of some steps: kinds first, then the longest kernels."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
    synchronize(device)
    with profile(activities=activities) as trace:
        seconds = sum(steps.step() for _ in range(PROFILED_STEPS)) / PROFILED_STEPS
    is_gpu = device.type == "cuda"
    names: dict[str, float] = {}
    for event in trace.events():
        on_device = event.device_type == torch.autograd.DeviceType.CUDA
        if on_device == is_gpu and not event.is_user_annotation:
            spent = event.time_range.elapsed_us() if is_gpu else event.self_cpu_time_total
            names[event.name] = names.get(event.name, 0.0) + spent / 1e6 / PROFILED_STEPS
    kinds: dict[str, float] = {}
    for name, spent in names.items():
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + spent
    kinds["nothing runs"] = max(0.0, seconds - sum(names.values()))
    longest = sorted(names.items(), key=lambda entry: -entry[1])[:12]
    rows = [
        *sorted(kinds.items(), key=lambda entry: -entry[1]),
        *((f"  {kind_of(n)}: {n[:70]}", s) for n, s in longest),
    ]
    return [(name, spent, spent / seconds) for name, spent in rows]


def show(found: dict[str, Measured], parts: list[tuple[str, float, float]], ceiling: float, where: str) -> None:
    """Tables for the reader. ceiling: FLOP/s of a plain matrix product."""
    peak = bfloat16_peak(where)
    table = Table(
        "", "tokens/s", "TFLOP/s", "of the matrix product's", "of the bf16 peak (MFU)", "peak GB", title=where
    )
    for name, figures in found.items():
        flops = median(figures.flops)
        share = f"{flops / peak:.1%}" if peak else "-"
        table.add_row(
            name, f"{median(figures.tokens):,.0f}", f"{flops / 1e12:,.3g}", f"{flops / ceiling:.1%}", share,
            f"{figures.peak_bytes / 1e9:.1f}",
        )  # fmt: skip
    Console(width=130, highlight=False).print(table)
    table = Table("NTP: what the time of a step goes to", "ms per step", "share", title="profile")
    for name, seconds, share in parts:
        table.add_row(name, f"{1e3 * seconds:,.1f}", f"{share:.1%}")
    Console(width=130, highlight=False).print(table)
    print(
        f"ceiling: {ceiling / 1e12:.2f} TFLOP/s of a plain matrix product"
        + (f", peak {peak / 1e12:,.0f}" if peak else "")
    )


def claims_of(
    found: dict[str, Measured], parts: list[tuple[str, float, float]], ceiling: float, where: str
) -> list[Claim]:
    """What the result file says; targets hold on a GPU whose peak is known."""
    peak, ntp = bfloat16_peak(where), median(found[NTP.name].tokens)
    targets = {FLOAT8.name: 1.15, DETERMINISTIC.name: 0.97} if peak else {}
    targets |= {STORED.name: 0.99}
    claims = [claim("share of the matrix product's ceiling, NTP", [v / ceiling for v in found[NTP.name].flops])]
    if peak:
        claims.append(claim("model FLOPs of the bf16 peak, NTP", [v / peak for v in found[NTP.name].flops], 0.5))
    for name, figures in found.items():
        if name != NTP.name:
            ratios = [value / ntp for value in figures.tokens]
            claims.append(claim(f"tokens/s, {name} / NTP", ratios, targets.get(name)))
    claims += [claim(f"share of an NTP step: {name}", [share]) for name, _, share in parts if not name.startswith(" ")]
    return claims
