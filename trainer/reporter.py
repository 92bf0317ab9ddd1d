"""The numbers of a step on their way from the device to metrics.jsonl.

One copy brings all of a step's numbers to the host. On a GPU it runs beside the next step and is read when that one is
under way, so that no step waits for the host; on a CPU it is read at once.
"""

import math
import re
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from shards.store import temporary_name
from trainer.batch import Row
from trainer.batches import GlobalBatch
from trainer.guard import Counts, Guard
from trainer.loggers import Loggers
from trainer.loss_model import peak_memory_bytes
from trainer.model_flops import speed
from trainer.session import Session
from trainer.statistics import Sources, StepStatistics

RECENT_STEPS = 20
GROWTH_OF_DIVERGENCE = 3.0
"""How many times the gradient norm of the steps before must have grown for a message to suspect the learning rate."""


@dataclass(frozen=True)
class StepNumbers:
    """What a step leaves on the device, and what the host knows of it. verdict_2: of trainer/guard.py. loss: the objective's,
    mean over the predicted tokens; began: when its batch was there, by perf_counter."""

    step: int
    batch: GlobalBatch
    statistics: StepStatistics
    loss: Tensor
    grad_norm: Tensor
    verdict_2: Tensor
    learning_rate: float
    tokens: int
    model_flops: float
    began: float


@dataclass(frozen=True)
class _OnItsWay:
    numbers: StepNumbers
    host: Tensor
    ready: Callable[[], None]


class Reporter:
    """Writes down the steps of a run in their order: counts, metrics, progress.

    log: None on the processes that write nothing. shown: options whose figures belong to the metrics, by the metric's name.
    patience: steps in a row that may be not finite. peak: bfloat16 FLOP/s of all devices, None where it is not known. passes: of a mixture, for each source what trained of it up to a step. lag:
    steps that a step's numbers may be read later.
    """

    def __init__(
        self,
        session: Session,
        log: Loggers | None,
        sources: Sources,
        guard: Guard,
        num_steps: int,
        patience: int,
        shown: frozenset[str],
        prometheus: Path | None = None,
        passes: Callable[[int], dict[str, Any]] | None = None,
        peak: float | None = None,
    ) -> None:
        self.session, self.log, self.sources, self.guard = session, log, sources, guard
        self.num_steps, self.patience, self.shown, self.prometheus = num_steps, patience, shown, prometheus
        self.passes, self.peak, self._told = passes, peak, False
        self.lag = 1 if session.world.device.type == "cuda" else 0
        self._waiting: deque[_OnItsWay] = deque()
        self._norms: deque[float] = deque(maxlen=RECENT_STEPS)
        self._last_read = -math.inf
        self._to_show: list[dict[str, Any]] = []

    def add(self, numbers: StepNumbers) -> None:
        """Send a step's numbers to the host; FloatingPointError where those of an earlier step, or on a CPU its own, end the run."""
        statistics = numbers.statistics
        parts = (numbers.loss, numbers.grad_norm, numbers.verdict_2, statistics.auxiliary, statistics.table)
        packed = torch.cat([part.double().flatten() for part in parts])
        self._waiting.append(_OnItsWay(numbers, *_to_host(packed)))
        while len(self._waiting) > self.lag:
            self._read(self._waiting.popleft())

    def settle(self) -> None:
        """Read what is on its way; then the guard's counts are those of all steps so far."""
        while self._waiting:
            self._read(self._waiting.popleft())

    def show(self) -> None:
        """Tell the caller of the steps that were read: when what is done after a step, as a checkpoint, is under way."""
        shown, self._to_show = self._to_show, []
        for metrics in shown:
            self.session.progress(metrics["step"], self.num_steps, metrics)

    def _read(self, sent: _OnItsWay) -> None:
        sent.ready()
        numbers, statistics = sent.numbers, sent.numbers.statistics
        loss, grad_norm, nonfinite, spike, router_loss, z_loss = sent.host[:6].tolist()
        statistics.table = sent.host[6:].view_as(statistics.table)
        counts = self.guard.counts
        counts.tokens += numbers.tokens
        self.guard.count(bool(nonfinite), bool(spike))
        if nonfinite:
            self._leave_out_or_stop(numbers, loss, grad_norm)
            return
        if spike:
            self.session.note(
                f"step {numbers.step:,}: loss {loss:.4g}, gradient norm {grad_norm:.4g} are a spike: the update is left out "
                f"({counts.skipped_spikes:,} so far)"
            )
        self._norms.append(grad_norm)
        now = perf_counter()
        seconds = now - max(numbers.began - numbers.batch.data_wait_seconds, self._last_read)
        self._last_read = now
        metrics: dict[str, Any] = {"step": numbers.step, "tokens": counts.tokens} | statistics.metrics(self.sources)
        metrics |= {"grad_norm": grad_norm, "lr": numbers.learning_rate, "tokens_per_second": numbers.tokens / seconds}
        if numbers.model_flops:
            metrics["model_flops_per_token"] = numbers.model_flops / numbers.tokens
            if self.peak is not None:
                metrics["mfu"] = numbers.model_flops / seconds / self.peak
        metrics |= {"data_wait_seconds": numbers.batch.data_wait_seconds}
        metrics |= {"peak_memory_bytes": peak_memory_bytes(self.session.world.device)}
        if self.passes is not None:
            metrics["mixture"] = self.passes(numbers.step)
        if metrics.get("gate_without_topk") and not self._told:
            self.session.note(without_topk(numbers.step, metrics))
            self._told = True
        more = {"router_aux_loss": router_loss, "z_loss": z_loss / metrics["predicted_tokens"], **skipped(counts)}
        metrics |= {name: value for name, value in more.items() if name in self.shown}
        if self.log and self.session.lease:
            self.session.lease.check_often()
            self.log.write(metrics)
            if self.prometheus is not None:
                write_prometheus(self.prometheus, metrics, self.num_steps)
        self._to_show.append(metrics)

    def _leave_out_or_stop(self, numbers: StepNumbers, loss: float, grad_norm: float) -> None:
        in_a_row = self.guard.counts.nonfinite_in_a_row
        what = f"step {numbers.step}: loss {loss}, gradient norm {grad_norm}, expected finite numbers"
        if in_a_row <= self.patience:
            self.session.note(f"{what}; the update is left out ({in_a_row} in a row, up to {self.patience} may be)")
            return
        raise FloatingPointError(
            f"{what}; the optimizer step was not taken; rows of the batch: {where(numbers.batch.rows)}; "
            f"{remedy(numbers.step, grad_norm, list(self._norms), self.patience)}"
        )


def skipped(counts: Counts) -> dict[str, int]:
    return {
        "skipped_steps": counts.skipped_steps,
        "skipped_nonfinite": counts.skipped_nonfinite,
        "skipped_spikes": counts.skipped_spikes,
    }


def without_topk(step: int, metrics: dict[str, Any]) -> str:
    """A line about tokens that the gate wants and the store has no top k of."""
    share, tokens = metrics["gate_without_topk"], metrics["predicted_tokens"]
    return (
        f"step {step}: {round(share * tokens):,} of {tokens:,} tokens at or below the gate's {metrics['gate_entropy']:.4g} nat have "
        "no most probable tokens stored, since the folder keeps them for lower entropies alone; they train on next-token loss, "
        "here and in later steps (gate_without_topk in metrics.jsonl)"
    )


def _to_host(packed: Tensor) -> tuple[Tensor, Callable[[], None]]:
    """A copy on the host, and what to wait with until it is there."""
    if packed.device.type != "cuda":
        return packed, lambda: None
    host = torch.empty(packed.shape, dtype=packed.dtype, pin_memory=True)
    host.copy_(packed, non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    return host, arrived.synchronize


def remedy(step: int, grad_norm: float, norms_before: list[float], patience: int) -> str:
    """Which option helps where a step is not finite: one batch is bad, or the training diverges.

    norms_before: gradient norms of the newest steps, oldest first.
    """
    half = len(norms_before) // 2
    grows = half >= 2 and norms_before[-1] > GROWTH_OF_DIVERGENCE * sorted(norms_before[:half])[half // 2]
    skip = f"the same command with --skip-steps {step}..{step} goes on past this batch"
    other = "a lower --learning-rate, or --dtype float32, in another --out"
    if patience:
        return f"{patience + 1} in a row is more than --on-nonfinite skip:{patience} leaves out; most likely the run needs {other}"
    if grows:
        return f"the gradient norm had grown before, to {norms_before[-1]:.3g}, so the run most likely needs {other}; {skip}"
    seen = "the steps before it were sound" if norms_before else "it is the first step of this process"
    return f"{seen}: {skip}, and with --on-nonfinite skip:3 a run leaves out such updates by itself; where it comes back, {other}"


def where(rows: list[Row]) -> str:
    """Names of rows for a message."""
    return ", ".join(row.where for row in rows) or "none on this rank"


def write_prometheus(path: Path, metrics: dict[str, Any], num_steps: int) -> None:
    """The numbers of a step as gauges `remit_train_NAME`, whole or not at all; sources as a label."""
    lines: list[str] = []
    flat = {name: value for name, value in metrics.items() if isinstance(value, int | float)}
    flat |= speed(metrics) | {"steps_planned": num_steps}
    sources = metrics["sources"] if len(metrics["sources"]) > 1 else {}
    for name, value in flat.items():
        metric = "remit_train_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
        lines += [f"# TYPE {metric} gauge", f"{metric} {float(value)!r}"]
        for source, figures in sources.items():
            if isinstance(figures.get(name), int | float):
                label = source.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
                lines.append(f'{metric}{{source="{label}"}} {float(figures[name])!r}')
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(path)
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(path)
