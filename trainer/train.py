"""remit train: mid-train a base model from annotated shards.

In: a complete shard folder and a base model folder. Out: OUT/metrics.jsonl (one object per step),
OUT/tensorboard/, OUT/checkpoints/ and, at the end, OUT/model, a Hugging Face folder (with --export-every some in
OUT/exports before). The reference model is not loaded: its log-probs come from the shards. The same command again goes on
from the newest valid checkpoint.
"""

import contextlib
import math
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch

from shards.output_folder import MODEL, writing_run
from trainer.batch import Row
from trainer.batches import GlobalBatch
from trainer.checkpoint import whole_weights
from trainer.config import TrainConfig, learning_rate_at
from trainer.deterministic import deterministic
from trainer.distributed import World, accumulate_only, connect, scalar
from trainer.experts import Balancing
from trainer.export import EXPORTS, Rounding, export
from trainer.exported import Exported, rounding_notes
from trainer.first_pass import first_pass
from trainer.loggers import open_loggers
from trainer.loss_model import peak_memory_bytes
from trainer.run_folder import TrainResult, run_result
from trainer.session import Progress, Session
from trainer.setup import Run, prepare
from trainer.statistics import StepStatistics


def train(
    config: TrainConfig,
    progress: Progress = lambda done, total, metrics: None,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda line: None,
    phase: Callable[[str], None] = lambda name: None,
) -> TrainResult:
    """Run or resume the run that `config` describes.

    progress: called on the first process after each step. should_stop: asked after each step; when true, the state is
    saved and the result is not finished. note: told, on the first process alone, what a user should know of the base or
    the run. phase: told `evaluate` or `train` as it begins.

    Raises ValueError with value, expectation and remedy for input that does not fit together, RuntimeError where another
    process trains into --out, LeaseLost where one has taken it over, and FloatingPointError, before the optimizer step,
    where a loss or gradient is not finite.
    """
    with (
        connect(config.timeout_seconds) as world,
        deterministic(world.device, config.deterministic),
        writing_run(config.out, "a run of remit train", world.first, note) as lease,
    ):
        if not world.first:
            progress, note, phase = lambda done, total, metrics: None, lambda line: None, lambda name: None
        return train_in(Session(world, lease, progress, should_stop, note, phase), config)


def train_in(session: Session, config: TrainConfig) -> TrainResult:
    """`train` as one of the processes of a session; all of them read the same folders and return the same.

    A function of its own, so that the model is gone before the processes part (see trainer/distributed.py).
    """
    run = prepare(config, session)
    if run is not None and train_steps(run, session):
        export_last(run, session)
    return session.world.from_first(run_result(config.out) if session.world.first else None)


def train_steps(run: Run, session: Session) -> bool:
    """Train to the last step; False where the caller asked to stop before it, after a checkpoint."""
    config, world = run.config, session.world
    tokens, told = run.tokens, False
    if run.first_step == 0:
        run.evaluation.write(0, of_export=False)
    with (
        open_loggers(config, run.first_step, run.settings, session.lease is not None) as log,
        run.checkpoints,
        contextlib.closing(run.batches),
    ):
        for step, batch in enumerate(run.batches, start=run.first_step + 1):
            began = perf_counter()
            learning_rate = learning_rate_at(step, config, run.num_steps)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate
            statistics = StepStatistics(world.device, run.sources.group, run.objective.figures, run.objective.per)
            # Eq. 6 divides by the predicted tokens of the whole global batch, so micro-batches and ranks just add up
            predicted, step_tokens = count_tokens(step, batch, world)
            balancing = run.balance and Balancing(run.balance, config.router_aux_loss or 0.0, step_tokens)
            micro_batches = batch.micro_batches(config.micro_batch_size, world.size)
            micro_batches, objective = first_pass(run.model, run.objective, micro_batches, run.collate, world)
            for index, rows in enumerate(micro_batches):
                is_last = index == len(micro_batches) - 1
                with contextlib.nullcontext() if is_last else accumulate_only(run.model):
                    # both kinds of spreading average over the ranks, which the factor makes a sum
                    loss = run.model(run.collate(rows), objective, predicted, world.size, statistics, balancing)
                    loss.backward()
            grad_norm = scalar(torch.nn.utils.clip_grad_norm_(run.loss_model.parameters(), config.max_grad_norm))
            world.sum(statistics.table)
            world.sum(statistics.router_loss)
            require_finite(step, statistics.sums["objective_loss"] / predicted, grad_norm, batch)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

            tokens += step_tokens
            seconds = perf_counter() - began + batch.data_wait_seconds
            metrics = {"step": step, "tokens": tokens} | statistics.metrics(run.sources)
            metrics |= {"grad_norm": grad_norm, "lr": learning_rate, "tokens_per_second": step_tokens / seconds}
            metrics |= {"data_wait_seconds": batch.data_wait_seconds}
            metrics |= {"peak_memory_bytes": peak_memory_bytes(world.device)}
            if config.mixture.is_mixed:
                metrics["mixture"] = passes(run, step)
            if metrics.get("gate_without_topk") and not told:
                session.note(without_topk(step, metrics))
                told = True
            if balancing:
                metrics["router_aux_loss"] = statistics.router_loss.item()
            if log and session.lease:
                session.lease.check_often()
                log.write(metrics)

            is_last_step = step == run.num_steps
            is_exported = is_last_step or is_due(step, config.export_every)
            if is_exported or is_due(step, config.eval_every):
                run.evaluation.write(step, is_exported)
            if is_exported and not is_last_step:
                export_model(run, session, f"{EXPORTS}/step-{step:06d}", step)
            stopping = session.somebody_stops() and not is_last_step
            # after the last step too, so that an export that fails need not train again
            if stopping or is_due(step, config.checkpoint_every) or (config.checkpoint_every and is_last_step):
                if log:
                    log.flush()  # a resume from this checkpoint does not write these steps again
                run.checkpoints.save(step, step * config.global_batch_size)
            session.progress(step, run.num_steps, metrics)
            if stopping:
                return False
    return True


def passes(run: Run, step: int) -> dict[str, Any]:
    """Of each source of a mixture the rows that trained so far, and how often that is all of them."""
    rows = run.order.counts(step * run.config.global_batch_size).tolist()
    return {
        name: {"rows": count, "epochs": count / order.num_rows}
        for name, count, order in zip(run.sources.names, rows, run.order.orders)
    }


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps, 0 for never, is done after this one."""
    return bool(every) and step % every == 0


def count_tokens(step: int, batch: GlobalBatch, world: World) -> tuple[int, int]:
    """Predicted tokens and tokens of a global batch, over all ranks; ValueError where nothing is predicted."""
    own = [sum(int(row.predicted.sum()) for row in batch.rows), sum(len(row.input_ids) for row in batch.rows)]
    predicted, tokens = world.sum(torch.tensor(own)).tolist()
    if not predicted:
        raise ValueError(
            f"step {step}: no row of the batch has a token to predict ({where(batch.rows)}); raise --global-batch-size"
        )
    return predicted, tokens


def without_topk(step: int, metrics: dict[str, Any]) -> str:
    """A line about tokens that the gate wants and the store has no top k of."""
    share, tokens = metrics["gate_without_topk"], metrics["predicted_tokens"]
    return (
        f"step {step}: {round(share * tokens):,} of {tokens:,} tokens at or below the gate's {metrics['gate_entropy']:.4g} nat have "
        "no most probable tokens stored, since the folder keeps them for lower entropies alone; they train on next-token loss, "
        "here and in later steps (gate_without_topk in metrics.jsonl)"
    )


def require_finite(step: int, loss: float, grad_norm: float, batch: GlobalBatch) -> None:
    """FloatingPointError where a step cannot be taken."""
    if not math.isfinite(grad_norm) or not math.isfinite(loss):
        raise FloatingPointError(
            f"step {step}: loss {loss}, gradient norm {grad_norm}, expected finite "
            f"numbers; the optimizer step was not taken; rows of the batch: {where(batch.rows)}; "
            "try a lower --learning-rate or --dtype float32"
        )


def where(rows: list[Row]) -> str:
    """Names of rows for a message."""
    return ", ".join(row.where for row in rows) or "none on this rank"


def export_model(run: Run, session: Session, name: str, step: int) -> Rounding | None:
    """Write the model of this step to OUT/name; None on the processes that do not write. All ranks take part."""
    state = whole_weights(run.loss_model)
    if not session.lease:
        return None
    session.check_lease()
    out, dtype = run.config.out, run.config.export_dtype
    record = partial(Exported(out, session.lease).add, name, step, dtype)
    return export(run.base.model, run.layout, state, out / name, dtype, run.shards, record)


def export_last(run: Run, session: Session) -> None:
    """Write OUT/model, which makes the run finished, and note what its rounding costs."""
    run.evaluation.require_of_export(run.num_steps)
    rounding = export_model(run, session, MODEL, run.num_steps)
    if rounding:
        for line in rounding_notes(rounding, *run.evaluation.first_and_last()):
            session.note(line)
