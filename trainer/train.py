"""remit train: mid-train a base model from annotated shards.

In: a complete shard folder and a base model folder. Out: OUT/metrics.jsonl (one object per step),
OUT/tensorboard/, OUT/checkpoints/ and, at the end, OUT/model, a Hugging Face folder (with --export-every some in
OUT/exports before). The reference model is not loaded: its log-probs come from the shards. The same command again goes on
from the newest valid checkpoint.
"""

import contextlib
import json
import math
import os
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from shards.folder import ShardFolder
from shards.part import sha256_file
from trainer.batch import Row, collate
from trainer.board import Board
from trainer.checkpoint import Checkpoints, whole_weights
from trainer.checks import check_document_attention, check_fits
from trainer.config import TrainConfig, learning_rate_at
from trainer.data import RowReader, global_batches
from trainer.deterministic import deterministic
from trainer.distributed import World, accumulate_only, connect, scalar, spread
from trainer.evaluation import Evaluation
from trainer.experts import Balancing, check_experts, describe, router_loss
from trainer.export import EXPORTS, MODEL, Rounding, export
from trainer.exported import Exported, rounding_notes, untrained_notes
from trainer.first_pass import global_weights, second_pass
from trainer.layout import read_layout
from trainer.model import load_base
from trainer.objectives import make_objective
from trainer.order import RowOrder
from trainer.run import (
    CHECKPOINTS,
    EVALUATION,
    METRICS,
    RUN,
    TENSORBOARD,
    TrainResult,
    drop_exports,
    keep_lines,
    open_run,
    prepare_out,
    references_left_out,
    run_result,
    run_settings,
)
from trainer.statistics import Sources, StepStatistics
from trainer.step import LossModel, peak_memory_bytes
from trainer.tokenizer import check_tokenizer
from trainer.wandb_run import WandbRun, require_wandb

Progress = Callable[[int, int, dict[str, Any]], None]
"""Called as progress(steps done, steps in all, metrics of the step)."""


def train(
    config: TrainConfig,
    progress: Progress = lambda done, total, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda line: None,
) -> TrainResult:
    """Run or resume the run that `config` describes.

    should_stop: asked after each step; when true, the state is saved and the result is not finished. note: told, on the
    first process alone, what a user should know of the base or the run.

    Raises ValueError with value, expectation and remedy for input that does not fit together, and
    FloatingPointError, before the optimizer step, where a loss or gradient is not finite.
    """
    with connect(config.timeout_seconds) as world, deterministic(world.device, config.deterministic):
        return train_in(world, config, progress, should_stop, note if world.first else lambda line: None)


def train_in(
    world: World,
    config: TrainConfig,
    progress: Progress,
    should_stop: Callable[[], bool],
    note: Callable[[str], None],
) -> TrainResult:
    """`train` as one of the processes of `world`; all of them read the same folders and return the same."""
    if config.wandb_project is not None:
        require_wandb()  # before minutes of loading
    torch.manual_seed(config.seed)
    shards = ShardFolder(config.shards)
    shards.require_complete()
    objective = make_objective(config)
    reference = config.reference if objective.columns else None
    context = choose_context(config, shards, reference)

    differences = check_tokenizer(Path(config.model), shards, note)
    settings = world.from_first(run_settings(config, shards, context, world.size) if world.first else None)
    if differences:
        settings["tokenizer_differences"] = differences
    if world.first:
        prepare_out(config.out, settings)
        Exported(config.out).require_dtype(config.export_dtype)
    if world.from_first((config.out / MODEL).exists()):
        return world.from_first(run_result(config.out) if world.first else None)
    check_experts(Path(config.model), config.router_aux_loss)
    base = load_base(Path(config.model), config.dtype, world.device, context)
    check_fits(base, Path(config.model), shards)
    if context == "document":
        check_document_attention(base, shards.manifest.seq_len)
    if base.dropout:
        note(f"off while training, kept in the export: {', '.join(f'{k} {v:g}' for k, v in base.dropout.items())}")
    balance = None if config.router_aux_loss is None else router_loss(base.model)
    if config.router_aux_loss and balance is None:
        raise ValueError(
            f"{config.model}: the balancing loss of {type(base.model).__name__} is not found in this release of transformers, "
            "expected one for --router-aux-loss above 0; give --router-aux-loss 0, or another release"
        )
    if line := describe(base.model.config.to_dict(), config.router_aux_loss):
        note(line)
    layout = world.from_first(read_layout(Path(config.model), base.model) if world.first else None)
    for line in untrained_notes(layout, type(base.model).__name__):
        note(line)
    left_out = references_left_out(config, shards)
    reader = RowReader(shards, context, reference, base.num_embeddings, objective.columns, left_out)
    if settings["rows_left_out"]["rows"]:
        by_reference = settings["rows_left_out"]["by_reference"]
        counts = ", ".join(f"{name} {by_reference[name]:,}" for name in left_out)
        note(f"{settings['rows_left_out']['rows']:,} rows train on nothing, since they could not be scored ({counts})")
    if line := reader.require_top_k_fits():
        note(line)
    sources = Sources(shards.manifest.corpus)
    order = RowOrder(reader.block_rows, config.seed)
    last_row = None if config.max_steps else math.ceil(config.epochs * order.num_rows)
    num_steps = config.max_steps or math.ceil(last_row / config.global_batch_size)  # type: ignore[operator]

    base.prepare(config.activation_checkpointing, config.compile, static=config.deterministic)
    pad_to = shards.manifest.seq_len if config.deterministic else None  # few shapes, since each is compiled
    loss_model = LossModel(base)
    model = spread(loss_model, base.layers, world, config.sharding, base.dtype)
    optimizer = make_optimizer(loss_model, config)
    dtypes = layout.rounding(config.export_dtype)
    evaluation = Evaluation(config, base, loss_model, model, world, context, dtypes, shards, note)
    if world.first:
        open_run(config.out, settings)
    fingerprint = world.from_first(sha256_file(config.out / RUN) if world.first else None)
    checkpoints = Checkpoints(
        config.out / CHECKPOINTS, loss_model, optimizer, world, fingerprint, config.keep_checkpoints
    )  # fmt: skip
    first_step, problems = checkpoints.load_newest()
    tokens = 0
    if world.first:
        for problem in problems:
            note(f"passed over a damaged checkpoint: {problem}")
        tokens = keep_lines(config.out / METRICS, first_step).get("tokens", 0)
        drop_exports(config.out, first_step)
        Exported(config.out).begin(layout)
        keep_lines(config.out / EVALUATION, first_step or -1)  # the evaluation before step 1 is made again

    def export_model(name: str, step: int) -> Rounding | None:
        state = whole_weights(loss_model)  # all ranks take part
        if not world.first:
            return None
        record = partial(Exported(config.out).add, name, step, config.export_dtype)
        return export(base.model, layout, state, config.out / name, config.export_dtype, shards, record)

    if first_step == 0:
        evaluation.write(0, of_export=False)

    stopping = False
    batches = global_batches(
        reader, order, config.global_batch_size, first_step, num_steps, last_row, world.rank, world.size
    )  # fmt: skip
    lines = config.out / METRICS if world.first else os.devnull
    board = Board(config.out / TENSORBOARD if world.first else None, first_step)
    wandb_run = WandbRun(config.wandb_project if world.first else None, config.out, settings)
    with open(lines, "a", encoding="utf-8") as metrics_file, board, wandb_run, checkpoints:
        for step, batch in enumerate(batches, start=first_step + 1):
            began = perf_counter()
            learning_rate = learning_rate_at(step, config, num_steps)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            statistics = StepStatistics(world.device, sources.group, objective.figures)
            # Eq. 6 divides by the predicted tokens of the whole global batch, so micro-batches and ranks just add up
            own = [sum(int(row.predicted.sum()) for row in batch.rows), sum(len(row.input_ids) for row in batch.rows)]
            predicted, step_tokens = world.sum(torch.tensor(own)).tolist()
            if not predicted:
                raise ValueError(f"step {step}: no row of the batch has a token to predict ({where(batch.rows)})")
            balancing = balance and Balancing(balance, config.router_aux_loss or 0.0, step_tokens)
            micro_batches = batch.micro_batches(config.micro_batch_size, world.size)
            minimised = objective
            if objective.scope == "global" and len(micro_batches) * world.size == 1:
                minimised = replace(objective, scope="micro")  # the micro-batch is the global batch
            elif objective.scope == "global":
                micro_batches = global_weights(model, objective, micro_batches, context, world, pad_to)
                minimised = second_pass(objective)
            for index, rows in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last else accumulate_only(model):
                    micro_batch = collate(rows, context, world.device, pad_to)
                    # both kinds of spreading average over the ranks, which the factor makes a sum
                    loss = model(micro_batch, minimised, predicted, world.size, statistics, balancing)
                    loss.backward()
            grad_norm = scalar(torch.nn.utils.clip_grad_norm_(loss_model.parameters(), config.max_grad_norm))
            world.sum(statistics.table)
            world.sum(statistics.router_loss)
            loss_sum = statistics.sums["objective_loss"]
            if not math.isfinite(grad_norm) or not math.isfinite(loss_sum):
                raise FloatingPointError(
                    f"step {step}: loss {loss_sum / predicted}, gradient norm {grad_norm}, expected finite "
                    f"numbers; the optimizer step was not taken; rows of the batch: {where(batch.rows)}; "
                    "try a lower --learning-rate or --dtype float32"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            tokens += step_tokens
            seconds = perf_counter() - began + batch.data_wait_seconds
            metrics = statistics.metrics(sources) | {
                "grad_norm": grad_norm,
                "lr": learning_rate,
                "tokens_per_second": step_tokens / seconds,
                "data_wait_seconds": batch.data_wait_seconds,
                "peak_memory_bytes": peak_memory_bytes(world.device),
            }
            if balancing:
                metrics["router_aux_loss"] = statistics.router_loss.item()
            metrics = {"step": step, "tokens": tokens} | metrics
            metrics_file.write(json.dumps(metrics) + "\n")
            metrics_file.flush()
            board.write(metrics)
            wandb_run.write(metrics)
            is_exported = step == num_steps or bool(config.export_every and step % config.export_every == 0)
            if is_exported or (config.eval_every and step % config.eval_every == 0):
                evaluation.write(step, is_exported)
            if is_exported and step < num_steps:
                export_model(f"{EXPORTS}/step-{step:06d}", step)
            # a signal may have come to one rank alone
            stopping = bool(world.sum(torch.tensor(int(should_stop())))) and step < num_steps
            # after the last step too, so that an export that fails need not train again
            if stopping or (config.checkpoint_every and (step % config.checkpoint_every == 0 or step == num_steps)):
                board.flush()  # a resume from this checkpoint does not write these steps again
                checkpoints.save(step, step * config.global_batch_size)
            if world.first:
                progress(step, num_steps, metrics)
            if stopping:
                break
    if not stopping:
        evaluation.require_of_export(num_steps)
        rounding = export_model(MODEL, num_steps)
        if rounding:
            for line in rounding_notes(rounding, *evaluation.first_and_last()):
                note(line)
    return world.from_first(run_result(config.out) if world.first else None)


def where(rows: list[Row]) -> str:
    """Names of rows for a message."""
    return ", ".join(row.where for row in rows) or "none on this rank"


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW. Decay pulls matrices towards zero; norms and biases have their own scale."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


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
        shards.require_scored(reference, context)
    return context
