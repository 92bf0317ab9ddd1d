"""remit train: mid-train a base model from annotated shards.

In: a complete shard folder and a base model folder. Out: OUT/metrics.jsonl (one object per step),
OUT/checkpoints/ and, at the end, OUT/model, a Hugging Face folder. The reference model is not loaded: its
log-probs come from the shards. The same command again goes on from the newest valid checkpoint.
"""

import json
import math
import resource
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from shards.folder import ShardFolder
from trainer.checkpoint import load_newest, save_checkpoint
from trainer.config import TrainConfig, learning_rate_at
from trainer.data import Row, RowReader, collate, global_batches
from trainer.head import HeadStatistics, weighted_cross_entropy
from trainer.model import Base, check_document_attention, check_fits, load_base
from trainer.objectives import NEEDS_REFERENCE, Weigh, make_weigh, ntp_weights
from trainer.order import RowOrder
from trainer.run import (
    CHECKPOINTS,
    EVALUATION,
    METRICS,
    MODEL,
    TrainResult,
    export,
    keep_lines,
    open_run,
    prepare_out,
    run_result,
    run_settings,
)

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called as progress(steps done, steps in all, metrics of the step)."""


def train(
    config: TrainConfig,
    progress: Progress = lambda done, total, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> TrainResult:
    """Run or resume the run that `config` describes.

    should_stop: asked after each step; when true, the state is saved and the result is not finished.

    Raises ValueError with value, expectation and remedy for input that does not fit together, and
    FloatingPointError, before the optimizer step, where a loss or gradient is not finite.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)
    shards = ShardFolder(config.shards)
    shards.require_complete()
    reference = config.reference if NEEDS_REFERENCE[config.objective] else None
    context = choose_context(config, shards, reference)

    settings = run_settings(config, shards, context)
    prepare_out(config.out, settings)
    if (config.out / MODEL).exists():
        return run_result(config.out)
    base = load_base(Path(config.model), config.dtype, device)
    check_fits(base, Path(config.model), shards)
    if context == "document":
        check_document_attention(base)
    reader = RowReader(shards, context, reference, base.num_embeddings)
    order = RowOrder(reader.block_rows, config.seed)
    last_row = None if config.max_steps else math.ceil(config.epochs * order.num_rows)
    num_steps = config.max_steps or math.ceil(last_row / config.global_batch_size)  # type: ignore[operator]
    weigh = make_weigh(config.objective, config.epsilon)
    evaluation = open_evaluation(config, base, context)

    model = base.model
    # decay pulls matrices towards zero; norms and biases have their own scale
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
    open_run(config.out, settings)
    first_step, problems = load_newest(config.out / CHECKPOINTS, model, optimizer)
    for problem in problems:
        print(f"remit train: passed over a damaged checkpoint: {problem}")
    tokens = keep_lines(config.out / METRICS, first_step).get("tokens", 0)
    keep_lines(config.out / EVALUATION, first_step or -1)  # the evaluation before step 1 is made again
    if first_step == 0 and evaluation:
        evaluation(0)

    batches = global_batches(reader, order, config.global_batch_size, first_step, num_steps, last_row)
    with open(config.out / METRICS, "a", encoding="utf-8") as metrics_file:
        for step, (rows, data_wait_seconds) in enumerate(batches, start=first_step + 1):
            began = perf_counter()
            learning_rate = learning_rate_at(step, config, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            statistics = HeadStatistics.zeros(device)
            # Eq. 6 divides by the predicted tokens of the whole global batch, so micro-batches just add up
            predicted = sum(int(row.predicted.sum()) for row in rows)
            if not predicted:
                raise ValueError(f"step {step}: no row of the batch has a token to predict (first: {rows[0].where})")
            for start in range(0, len(rows), config.micro_batch_size):
                loss = micro_batch_loss(
                    base, rows[start : start + config.micro_batch_size], context, weigh, predicted, statistics
                )
                loss.backward()
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm).item()
            sums = statistics.as_dict()
            if not math.isfinite(grad_norm) or not math.isfinite(sums["weighted_loss"]):
                raise FloatingPointError(
                    f"step {step}: loss {sums['weighted_loss'] / predicted}, gradient norm {grad_norm}, expected finite "
                    f"numbers; the optimizer step was not taken; rows of the batch: {rows[0].where} and {len(rows) - 1} "
                    "more; try a lower --learning-rate or --dtype float32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            tokens += sum(len(row.input_ids) for row in rows)
            seconds = perf_counter() - began + data_wait_seconds
            metrics = step_metrics(sums, reference is not None) | {
                "grad_norm": grad_norm,
                "lr": learning_rate,
                "tokens_per_second": sum(len(row.input_ids) for row in rows) / seconds,
                "data_wait_seconds": data_wait_seconds,
                "peak_memory_bytes": peak_memory_bytes(device),
            }
            metrics = {"step": step, "tokens": tokens} | metrics
            metrics_file.write(json.dumps(metrics) + "\n")
            metrics_file.flush()
            if evaluation and (step == num_steps or (config.eval_every and step % config.eval_every == 0)):
                evaluation(step)
            stopping = should_stop() and step < num_steps
            if stopping or (config.checkpoint_every and step % config.checkpoint_every == 0 and step < num_steps):
                save_checkpoint(config.out / CHECKPOINTS, step, model, optimizer)
            progress(step, num_steps, metrics)
            if stopping:
                return run_result(config.out)

    export(base, shards, Path(config.model), config.out / MODEL)
    return run_result(config.out)


def choose_context(config: TrainConfig, shards: ShardFolder, reference: str | None) -> str:
    """The context to train in; ValueError where the reference is missing or was scored in another one.

    auto: as the reference was scored; without one as all references of the folder were, so that NTP and ReMiT
    runs from the same shards compare like with like, and packed where they differ or there are none.
    """
    contexts = {entry["context"] for entry in shards.manifest.references.values()}
    context: str = config.context
    if context == "auto" and reference is not None:
        context = shards.require_reference(reference)["context"]
    elif context == "auto":
        context = contexts.pop() if len(contexts) == 1 else "packed"
    if reference is not None:
        shards.require_logprobs_of(reference, context)
        if shards.require_reference(reference).get("engine") == "fake":
            raise ValueError(
                f"{shards.path}: its log-probs of {reference!r} come from the fake engine, a hash, and not from a model; "
                "score again without --engine fake"
            )
    return context


def micro_batch_loss(
    base: Base, rows: list[Row], context: str, weigh: Weigh, normaliser: float, statistics: HeadStatistics
) -> torch.Tensor:
    """Forward of the base and the loss head over a few rows."""
    batch = collate(rows, context, base.device)
    return weighted_cross_entropy(
        base.hidden_states(batch.input_ids_BT, batch.position_ids_BT),
        base.head.weight,
        batch.input_ids_BT,
        batch.predicted_BT,
        weigh,
        normaliser,
        reference_BT=batch.reference_BT,
        bias_V=base.head.bias,
        statistics=statistics,
    )


def step_metrics(sums: dict[str, float], has_reference: bool) -> dict[str, float | None]:
    """Means over the predicted tokens of a step, from the sums of the loss head."""
    tokens = sums["tokens"]
    weight_mean = sums["weight"] / tokens
    return {
        "loss": sums["weighted_loss"] / tokens,
        "ntp_loss": sums["loss"] / tokens,
        "weight_mean": weight_mean,
        "weight_std": math.sqrt(max(0.0, sums["weight_squared"] / tokens - weight_mean**2)),
        "clipped_low": sums["clipped_low"] / tokens,
        "clipped_high": sums["clipped_high"] / tokens,
        "delta_mean": sums["delta"] / tokens if has_reference else None,
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory held so far: on the GPU by tensors, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def open_evaluation(config: TrainConfig, base: Base, context: str) -> Callable[[int], None] | None:
    """A function that appends the mean loss over --eval-shards to evaluation.jsonl, or None."""
    if config.eval_shards is None:
        return None
    shards = ShardFolder(config.eval_shards)
    check_fits(base, Path(config.model), shards)
    reader = RowReader(shards, context, None, base.num_embeddings)

    def evaluate(step: int) -> None:
        statistics = HeadStatistics.zeros(base.device)
        base.model.eval()
        with torch.no_grad():
            for block, num_rows in enumerate(reader.block_rows):
                rows = reader.rows(np.array([(block, row) for row in range(num_rows)]))
                for start in range(0, len(rows), config.micro_batch_size):
                    micro_batch_loss(
                        base,
                        rows[start : start + config.micro_batch_size],
                        context,
                        ntp_weights,
                        1,
                        statistics,
                    )
        base.model.train()
        sums = statistics.as_dict()
        with open(config.out / EVALUATION, "a", encoding="utf-8") as file:
            file.write(
                json.dumps({"step": step, "loss": sums["loss"] / sums["tokens"], "tokens": sums["tokens"]}) + "\n"
            )

    return evaluate
