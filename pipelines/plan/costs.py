"""Seconds and bytes of a project: arithmetic on two shapes, a machine, a layout and rates.

Times are wall seconds of all GPUs together, but for Rates and Step, which are those of one GPU.
"""

import math
from dataclasses import dataclass

from pipelines.plan.hardware import Machine
from pipelines.plan.layout import Job, exchange
from trainer.memory import Layout
from trainer.model_shape import ModelShape


@dataclass(frozen=True)
class Rates:
    """Seconds of one GPU per token: train of NTP, forward and backward; online of a reference inside of the step.

    remit_cost: ReMiT step from stored log-probs / NTP step; *_start_seconds: fixed costs.
    """

    score: float
    train: float
    online: float
    remit_cost: float
    score_start_seconds: float
    train_start_seconds: float


@dataclass(frozen=True)
class Step:
    """A training step of NTP: what the GPU with most rows computes, what it exchanges, and how much of that is hidden."""

    compute: float
    exchange: float
    overlapped: float

    @property
    def waits(self) -> float:
        """The part of the exchange that no computation hides."""
        return self.exchange - self.overlapped


@dataclass(frozen=True)
class Costs:
    """Scoring once, and a run of each kind; online_per_epoch: what the reference takes of an online run."""

    score: float
    ntp: float
    stored: float
    online: float
    online_per_epoch: float

    @property
    def break_even_epochs(self) -> float:
        """Epochs after which scoring has cost no more than a reference online."""
        return self.score / self.online_per_epoch

    def runs_until_paid(self, epochs: float) -> int:
        """Runs of so many epochs (restarts from the first step, ablations) until then."""
        return max(1, math.ceil(self.break_even_epochs / epochs - 1e-9))


def step_of(base: ModelShape, machine: Machine, rates: Rates, job: Job, layout: Layout) -> Step:
    """The step as the GPU with most rows sees it.

    Replicas exchange beside the backward of their last micro-batch, two thirds of its time, those of hybrid sharding too; sharded
    weights beside everything.
    """
    rows = job.rows_per_gpu(machine.num_gpus)
    micro_batches = math.ceil(rows / layout.micro_batch_size)
    compute = rows * job.row_tokens * rates.train
    within, between = exchange(base, machine, layout, micro_batches)
    seconds, last = (within / machine.link, between / machine.network), 2 / 3 * compute / micro_batches
    if layout.sharding == "hybrid":
        hidden = min(seconds[0], compute) + min(seconds[1], last)
    else:
        hidden = min(sum(seconds), last if layout.sharding == "replicate" else compute)
    return Step(compute, sum(seconds), hidden)


def costs(step: Step, machine: Machine, rates: Rates, job: Job) -> Costs:
    """Of scoring the corpus once and of one run of each kind."""
    steps = job.tokens * job.epochs / (job.row_tokens * job.global_batch_size)
    # a GPU with a row less waits for the others, beside a reference too
    online = steps * job.rows_per_gpu(machine.num_gpus) * job.row_tokens * rates.online
    stored = steps * (step.compute * rates.remit_cost + step.waits) + rates.train_start_seconds
    return Costs(
        score=job.tokens * rates.score / machine.num_gpus + rates.score_start_seconds,
        ntp=steps * (step.compute + step.waits) + rates.train_start_seconds,
        stored=stored,
        online=stored + online,
        online_per_epoch=online / job.epochs,
    )


def disk(tokens: int, bytes_per_token: dict[str, float]) -> dict[str, float]:
    """Bytes of the shard folders. bytes_per_token: of "packed", and of what scoring adds, by name; 0 for what it does not."""
    parts = {name: tokens * size for name, size in bytes_per_token.items() if size}
    scored = sum(parts.values())
    columns = ", ".join(name.removesuffix(" entries") for name in parts)
    return parts | {f"scored folder ({columns})": scored, "both folders": parts["packed"] + scored}
