"""What a training needs before its first step: data, model, optimizer, evaluation, and where the run stands.

Everything that can be refused is refused here, before OUT is written to, and in an order that puts cheap checks before
minutes of loading.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shards.folder import ShardFolder
from trainer.average import Average
from trainer.batch import MicroBatch, Row, collate
from trainer.batches import GlobalBatch, global_batches
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.data import RowReader, RowReaders, context_of_rows, top_k_problem
from trainer.evaluation import Evaluation, open_measure
from trainer.exchange import Processes
from trainer.experts import RouterLoss
from trainer.exported import Exported, untrained_notes
from trainer.float8 import require_float8
from trainer.going_on import (
    RESUMED_FROM,
    begins_at,
    describe_source,
    left_out_steps,
    newest_step,
    plan_changes,
    rows_begin_at,
)
from trainer.gpu_peaks import peak_of_all
from trainer.guard import Guard
from trainer.layout import Layout
from trainer.loggers import require_wandb
from trainer.loss_model import LossModel
from trainer.mirror_fetch import fetch_newest
from trainer.mix import MixedOrder
from trainer.mixed_shards import MixedShards, choose_steps, require_epochs, table
from trainer.model import Base
from trainer.model_flops import ModelFlops
from trainer.objectives import make_objective
from trainer.objectives.objective import Objective
from trainer.resume import first_warmup, is_finished, require_steps_fit, resume
from trainer.run_folder import references_left_out, refuse_other_settings, run_settings
from trainer.session import Session
from trainer.statistics import Sources
from trainer.tokenizer import check_tokenizer
from trainer.trainable import balancing_loss, counted_flops, layout_of, load_trainable, swap_layers


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step.

    settings: what run.json says. collate: pads rows to a micro-batch on the device. balance: the balancing loss of a base
    with experts. loss_model: body and loss head, which hold the weights; model: the same spread over the ranks, to be
    called. flops: of a step's rows in `context`, None where they cannot be counted; peak: of all devices, in bfloat16 FLOP/s, where
    they are known. average: of the weights, where one is asked for. order: of the rows; batches: of the steps first_step + 1 ..
    num_steps but for those that `changes`, what later commands changed, leaves out. begin: the step that the run began with, of
    another run; rows_from: the one after which the run's own rows train, an earlier one where that run has the same.
    """

    config: TrainConfig
    settings: dict[str, Any]
    changes: dict[str, Any]
    shards: ShardFolder
    objective: Objective
    sources: Sources
    context: str
    collate: Callable[[list[Row]], MicroBatch]
    base: Base
    flops: ModelFlops | None
    peak: float | None
    layout: Layout
    balance: RouterLoss | None
    loss_model: LossModel
    model: nn.Module
    optimizer: Optimizer
    evaluation: Evaluation
    checkpoints: Checkpoints
    guard: Guard
    average: Average | None
    order: MixedOrder
    batches: Generator[GlobalBatch]
    begin: int
    rows_from: int
    first_step: int
    num_steps: int


def prepare(config: TrainConfig, session: Session) -> Run | None:
    """Check, load and resume what `config` describes; None where that run is finished. All ranks take part.

    Raises ValueError with value, expectation and remedy for input that does not fit together.
    """
    if config.wandb_project is not None:
        require_wandb()  # before minutes of loading
    require_float8(config, session.world.device)
    torch.manual_seed(config.seed)
    world = session.world
    mixed = MixedShards.open(config.mixture)
    objective = make_objective(config)
    reference = config.reference if objective.columns else None
    context = choose_context(config, mixed, reference)
    if reference is not None:
        objective = make_objective(config, mixed.first.require_reference(reference))
        for folder in mixed.folders:
            folder.require_columns(reference, objective.columns)
        if objective.note:
            session.note(objective.note)
    objective = replace(objective, z_loss=config.z_loss)
    for line in mixed.require_alike(reference, objective.columns):
        session.note(line)
    order = mixed.order(config.seed, config.global_batch_size)
    num_steps, last_row = choose_steps(mixed, order, config.max_steps, config.epochs, config.global_batch_size)
    settings, changes = check_settings(config, session, mixed, context)
    begin, rows_from = begins_at(settings), rows_begin_at(settings)
    require_epochs(mixed, order, num_steps, config.global_batch_size, rows_from)
    if world.from_first(is_finished(config, session)):
        if session.mirror:
            session.mirror.require_behind(num_steps)
            session.mirror.catch_up(newest_step(config.out), finished=True)
        return None
    require_steps_fit(config, num_steps, begin)
    if mixed.mixture.is_mixed:
        for line in table(mixed, order, num_steps, config.global_batch_size, rows_from):
            session.note(line)

    base = load_trainable(config, session, mixed, context)
    if base.attention:
        settings["attention"] = base.attention.text
    balance = balancing_loss(config, session, base)
    layout = layout_of(config, session, base)
    for line in untrained_notes(layout, type(base.model).__name__):
        session.note(line)
    readers = open_rows(config, session, mixed, context, objective, base, settings["rows_left_out"])
    shards, sources = mixed.first, Sources(mixed.first.manifest.corpus)
    if mixed.mixture.is_mixed:
        sources = Sources.of_mixture({name: of.manifest.corpus for name, of in zip(mixed.names, mixed.folders)})

    base.prepare(
        config.activation_checkpointing, config.compile, config.deterministic, partial(swap_layers, config, session, base)
    )  # fmt: skip
    pad_to = shards.manifest.seq_len if config.deterministic else None  # few shapes, since each is compiled
    loss_model = LossModel(base)
    model = base.spread(loss_model, world)
    optimizer = make_optimizer(loss_model, config)
    measure = open_measure(config, session, base, model, context, shards)
    average = None if config.average is None else Average(config.average, loss_model, num_steps)
    evaluation = Evaluation(config, session, measure, loss_model, layout.rounding(config.export_dtype), average)
    guard = Guard(world, config.skip_spikes)
    checkpoints, first_step = resume(
        config, session, settings, changes, loss_model, optimizer, layout, guard, average
    )  # fmt: skip
    if session.mirror:
        session.mirror.catch_up(first_step, finished=False)
    config = replace(
        config, warmup_steps=world.from_first(first_warmup(config, order.num_rows) if world.first else None)
    )
    batches = global_batches(
        readers.read_packed, order, config.global_batch_size, first_step, num_steps, last_row,
        Processes(world) if world.size > 1 else None, left_out_steps(changes),
    )  # fmt: skip
    return Run(
        config=config,
        settings=settings,
        changes=changes,
        shards=shards,
        objective=objective,
        sources=sources,
        context=context,
        collate=partial(collate, context=context, device=world.device, length=pad_to),
        base=base,
        flops=counted_flops(base, session),
        peak=peak_of_all(world, base.dtype),
        layout=layout,
        balance=balance,
        loss_model=loss_model,
        model=model,
        optimizer=optimizer,
        evaluation=evaluation,
        checkpoints=checkpoints,
        guard=guard,
        average=average,
        order=order,
        batches=batches,
        begin=begin,
        rows_from=rows_from,
        first_step=first_step,
        num_steps=num_steps,
    )


def choose_context(config: TrainConfig, mixed: MixedShards, reference: str | None) -> str:
    """The context to train in; ValueError where the reference is missing or was scored in another one."""
    return context_of_rows(mixed.folders, reference, config.context)


def check_settings(
    config: TrainConfig, session: Session, mixed: MixedShards, context: str
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What run.json says of this run, and its "changes"; ValueError where --out holds a run with other settings."""
    world = session.world
    differences = check_tokenizer(Path(config.model), *mixed.folders, note=session.note)
    found: Any = None
    settings: dict[str, Any] = {}
    line = None
    if world.first:
        settings = run_settings(config, mixed, context, world.size)
        if differences:
            settings["tokenizer_differences"] = differences
        if config.resume_from is not None:
            settings[RESUMED_FROM], line = describe_source(config, settings)
        refuse_other_settings(config.out, settings)
    if session.mirror:
        session.mirror.open(session, settings)
        fetch_newest(config, session, session.mirror)
    if world.first:
        changes = plan_changes(config, settings, sum(shards.manifest.rows for shards in mixed.folders))
        Exported(config.out).require_dtype(config.export_dtype)
        if line:
            session.note(line)
        found = settings, changes
    both: tuple[dict[str, Any], dict[str, Any]] = world.from_first(found)
    return both


def open_rows(
    config: TrainConfig,
    session: Session,
    mixed: MixedShards,
    context: str,
    objective: Objective,
    base: Base,
    rows_left_out: dict[str, Any],
) -> RowReaders:
    """The rows that train, with the columns that the objective reads. rows_left_out: as run.json has it."""
    reference = config.reference if objective.columns else None
    readers, files, names = [], 0, dict[str, None]()
    for shards in mixed.folders:
        left_out = references_left_out(config, shards)
        readers.append(RowReader(shards, context, reference, base.num_embeddings, objective.columns, left_out, files))
        files += len(shards.manifest.corpus)
        names |= dict.fromkeys(left_out)
    if rows_left_out["rows"]:
        counts = ", ".join(f"{name} {rows_left_out['by_reference'][name]:,}" for name in names)
        session.note(
            f"{rows_left_out['rows']:,} rows train on nothing, since they could not be scored ({counts})"
        )  # fmt: skip
    problem, lines = session.world.from_first(top_k_problem(readers) if session.world.first else None)
    if problem:
        raise ValueError(problem)
    for line in lines:
        session.note(line)
    return RowReaders(readers)


def make_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """AdamW. Decay pulls matrices towards zero; norms and biases have their own scale.

    Embeddings decay with --decay-embeddings alone: a row that a batch does not have would shrink without a gradient. (OLMo,
    configs/official-1124, and OLMo-core, scripts/official/OLMo3, spare the input embedding, SmolLM3 its tied one.)
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    spared = set() if config.decay_embeddings else embeddings
    trained = [p for p in model.parameters() if p.requires_grad]
    decayed = [p for p in trained if p.ndim >= 2 and id(p) not in spared]
    others = [p for p in trained if p.ndim < 2 or id(p) in spared]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )
