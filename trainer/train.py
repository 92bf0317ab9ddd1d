"""remit train: mid-train a base model from annotated shards.

In: a complete shard folder and a base model folder. Out: OUT/metrics.jsonl (one object per step),
OUT/tensorboard/, OUT/checkpoints/ and, at the end, OUT/model, a Hugging Face folder (with --export-every some in
OUT/exports before). The reference model is not loaded: its log-probs come from the shards. The same command again goes on
from the newest valid checkpoint.
"""

import contextlib
import shutil
from collections.abc import Callable
from functools import partial
from time import perf_counter
from typing import Any

import torch

from shards.output_folder import MODEL, writing_run
from trainer.batches import GlobalBatch
from trainer.config import TrainConfig, learning_rate_at
from trainer.deterministic import deterministic
from trainer.distributed import World, accumulate_only, connect, whole
from trainer.experts import Balancing
from trainer.export import EXPORTS, Rounding, export
from trainer.exported import FOR_TASKS, Exported, rounding_notes
from trainer.first_pass import first_pass
from trainer.gathered import Gathered
from trainer.going_on import AVERAGE_MODEL, has_other_length, is_left_out, left_out_steps
from trainer.guard import leave_out
from trainer.heap import frugal_heap
from trainer.loggers import Loggers, open_loggers
from trainer.mirror import mirroring
from trainer.option_text import parse_on_nonfinite
from trainer.profiling import profiled
from trainer.reporter import Reporter, StepNumbers
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
    """Run or resume the run that `config` describes. Of --eval-tasks it writes the models; remit train evaluates them.

    progress: called on the first process after each step. should_stop: asked after each step; when true, the state is
    saved and the result is not finished. note: told, on the first process alone, what a user should know of the base or
    the run. phase: told `evaluate` or `train` as it begins.

    Raises ValueError with value, expectation and remedy for input that does not fit together, RuntimeError where another
    process trains into --out, LeaseLost where one has taken it over, and FloatingPointError where a loss or gradient is not
    finite; the weights are those before that step.
    """
    with (
        connect(config.timeout_seconds) as world,
        deterministic(world.device, config.deterministic),
        writing_run(config.out, "a run of remit train", world.first, note, has_other_length(config)) as lease,
    ):
        if not world.first:
            progress, note, phase = lambda done, total, metrics: None, lambda line: None, lambda name: None
        with mirroring(config, world, note) as mirror:
            return train_in(Session(world, lease, progress, should_stop, note, phase, mirror), config)


def train_in(session: Session, config: TrainConfig) -> TrainResult:
    """`train` as one of the processes of a session; all of them read the same folders and return the same.

    A function of its own, so that the model is gone before the processes part (see trainer/distributed.py).
    """
    with frugal_heap():
        run = prepare(config, session)
    is_finished = run is None or train_steps(run, session)
    if run is not None and is_finished:
        export_last(run, session)
    session.world.meet()  # the first process may still save
    if session.mirror:
        session.mirror.finish(session, is_finished)
        if run is not None and session.lease:
            run.checkpoints.prune(run.num_steps)
    return session.world.from_first(run_result(config.out) if session.world.first else None)


def train_steps(run: Run, session: Session) -> bool:
    """Train to the last step; False where the caller asked to stop before it, after a checkpoint."""
    config, guard = run.config, run.guard
    if run.first_step == run.begin:
        run.evaluation.write(run.begin, of_export=False)
    with (
        open_loggers(config, run.first_step, run.settings, session.lease is not None) as log,
        run.checkpoints,
        contextlib.closing(run.batches),
    ):
        reporter = make_reporter(run, session, log)
        for step in range(run.first_step + 1, run.num_steps + 1):
            if is_left_out(run.changes, step):
                reporter.settle()
                guard.counts.skipped_steps += 1
            else:
                batch = next(run.batches)
                predicted, tokens, model_flops = count(batch, run, session.world)
                if predicted:
                    with profiled(config.profile == step and session.world.first, config.out, step):
                        numbers = train_step(run, session, step, batch, predicted, tokens, model_flops)
                    reporter.add(numbers)
                else:
                    reporter.settle()
                    guard.counts.tokens += tokens
                    session.note(f"step {step:,}: none of its rows has a token to predict, so there is no update")
            if run.average:
                run.average.update(step)

            is_last_step = step == run.num_steps
            is_exported = is_last_step or is_due(step, config.export_every) or is_due(step, config.eval_tasks_every)
            stopping = session.somebody_stops() and not is_last_step
            # after the last step too, so that an export that fails need not train again
            is_saved = (
                stopping or is_due(step, config.checkpoint_every) or (bool(config.checkpoint_every) and is_last_step)
            )
            if is_exported or is_saved or is_due(step, config.eval_every):
                reporter.settle()
            if is_exported or is_due(step, config.eval_every):
                run.evaluation.write(step, is_exported)
            if is_exported and not is_last_step:
                about = None if is_due(step, config.export_every) else {FOR_TASKS: True}
                export_model(run, session, f"{EXPORTS}/step-{step:06d}", step, about)
            if is_saved:
                if log:
                    log.flush()  # a resume from this checkpoint does not write these steps again
                run.checkpoints.save(step, step * config.global_batch_size, guard.state())
            reporter.show()
            if stopping:
                return False
    return True


def make_reporter(run: Run, session: Session, log: Loggers | None) -> Reporter:
    """Writes down the steps of the run, with the figures of the options that it has."""
    config = run.config
    wanted = {
        "router_aux_loss": run.balance is not None,
        "z_loss": config.z_loss > 0,
        "skipped_spikes": config.skip_spikes is not None,
        "skipped_nonfinite": config.on_nonfinite != "stop",
        "skipped_steps": bool(run.changes.get("skip_steps")),
    }
    return Reporter(
        session, log, run.sources, run.guard, run.num_steps, parse_on_nonfinite(config.on_nonfinite),
        frozenset(name for name, is_on in wanted.items() if is_on), config.prometheus,
        partial(passes, run) if len(run.order.names) > 1 else None, run.peak,
    )  # fmt: skip


def passes(run: Run, step: int) -> dict[str, Any]:
    """Of each source of a mixture the rows that trained so far, and how often that is all of them."""
    size = run.config.global_batch_size
    rows = run.order.counts(step * size) - run.order.counts(run.rows_from * size)
    for first, last in left_out_steps(run.changes):
        if first <= step:
            rows -= run.order.counts(min(last, step) * size) - run.order.counts((first - 1) * size)
    return {
        name: {"rows": count, "epochs": count / order.num_rows}
        for name, count, order in zip(run.sources.names, rows.tolist(), run.order.orders)
    }


def train_step(
    run: Run, session: Session, step: int, batch: GlobalBatch, predicted: int, step_tokens: int, model_flops: float
) -> StepNumbers:
    """Forward, backward and update of one global batch. All ranks take part; the device is not waited for.

    predicted, step_tokens, model_flops: of `count`.
    """
    config, world = run.config, session.world
    began = perf_counter()
    learning_rate = learning_rate_at(step, config, run.num_steps, run.begin)
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate
    statistics = StepStatistics(world.device, run.sources.group, run.objective.figures, run.objective.per)
    # Eq. 6 divides by the predicted tokens of the whole global batch, so micro-batches and ranks just add up
    balancing = run.balance and Balancing(run.balance, config.router_aux_loss or 0.0, step_tokens)
    micro_batches = batch.micro_batches(config.micro_batch_size, world.size)
    micro_batches, objective = first_pass(run.model, run.objective, micro_batches, run.collate, world)
    for index, rows in enumerate(micro_batches):
        is_last = index == len(micro_batches) - 1
        with contextlib.nullcontext() if is_last else accumulate_only(run.model):
            # both kinds of spreading average over the ranks, which the factor makes a sum
            loss = run.model(run.collate(rows), objective, predicted, world.size, statistics, balancing)
            loss.backward()
    grad_norm = whole(torch.nn.utils.clip_grad_norm_(run.loss_model.parameters(), config.max_grad_norm))
    world.sum(statistics.table)
    world.sum(statistics.auxiliary)
    mean_loss = statistics.total("objective_loss") / predicted
    verdict_2 = run.guard.judge(mean_loss, grad_norm)
    leave_out(run.optimizer, verdict_2)
    run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    return StepNumbers(
        step, batch, statistics, mean_loss, grad_norm, verdict_2, learning_rate, step_tokens, model_flops, began
    )  # fmt: skip


def is_due(step: int, every: int) -> bool:
    """Whether what is done every so many steps, 0 for never, is done after this one."""
    return bool(every) and step % every == 0


def count(batch: GlobalBatch, run: Run, world: World) -> tuple[int, int, float]:
    """Predicted tokens, tokens and model FLOPs (0 where they cannot be counted) of a global batch, over all ranks."""
    own = [sum(int(row.predicted.sum()) for row in batch.rows), sum(len(row.input_ids) for row in batch.rows)]
    flops = run.flops.of_step(batch.rows, run.context) if run.flops else 0.0
    # float64 has whole numbers up to 9e15
    predicted, tokens, model_flops = world.sum(torch.tensor([*own, flops], dtype=torch.float64)).tolist()
    return int(predicted), int(tokens), model_flops


@frugal_heap()
def export_model(
    run: Run, session: Session, name: str, step: int, more: dict[str, Any] | None = None
) -> Rounding | None:
    """Write the model of this step to OUT/name; None on the processes that do not write. All ranks take part.

    more: what exported.json says of it besides.
    """
    world, rounding = session.world, None
    weights = Gathered(run.loss_model, world)
    if session.lease:
        session.check_lease()
        out, dtype = run.config.out, run.config.export_dtype
        record = partial(Exported(out, session.lease).add, name, step, dtype, more=more)
        rounding = export(run.base.model, run.layout, weights, out / name, dtype, run.shards, record)
        if session.mirror and not (more or {}).get(FOR_TASKS):
            session.mirror.copy_export(name)
    else:
        weights.follow(run.layout.groups)
    world.meet()  # the first process writes on after the last weight was gathered
    return rounding


def export_last(run: Run, session: Session) -> None:
    """Write OUT/model, which makes the run finished, and note what its rounding costs; the average before it."""
    run.evaluation.require_of_export(run.num_steps)
    if run.average:
        if session.lease and (run.config.out / AVERAGE_MODEL).exists():  # of a run that died between the two
            session.check_lease()
            shutil.rmtree(run.config.out / AVERAGE_MODEL)
        with run.average.in_place():
            about = {"average": run.average.text, "averaged_steps": run.average.count}
            export_model(run, session, AVERAGE_MODEL, run.num_steps, about)
    rounding = export_model(run, session, MODEL, run.num_steps)
    if rounding:
        for line in rounding_notes(rounding, *run.evaluation.first_and_last()):
            session.note(line)
