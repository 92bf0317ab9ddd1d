"""What a training needs before its first step: data, model, optimizer, evaluation, and where the run stands.

Everything that can be refused is refused here, before OUT is written to, and in an order that puts cheap checks before
minutes of loading.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from shards.folder import ShardFolder
from shards.output_folder import MODEL, RUN, write_record
from shards.part import sha256_file
from trainer.batch import MicroBatch, Row, collate
from trainer.batches import GlobalBatch, global_batches
from trainer.checkpoint import Checkpoints
from trainer.checks import check_document_attention, check_fits
from trainer.config import TrainConfig
from trainer.data import RowReader, RowReaders, top_k_problem
from trainer.distributed import spread
from trainer.evaluation import Evaluation, open_measure
from trainer.exchange import Processes
from trainer.experts import RouterLoss, check_experts, describe, router_loss
from trainer.exported import Exported, untrained_notes
from trainer.layout import Layout, read_layout
from trainer.loggers import require_wandb
from trainer.loss_model import LossModel
from trainer.mix import MixedOrder
from trainer.mixed_shards import MixedShards, choose_steps, table
from trainer.model import Base, load_base
from trainer.objectives import make_objective
from trainer.objectives.objective import Objective
from trainer.run_folder import (
    CHECKPOINTS,
    EVALUATION,
    METRICS,
    drop_exports,
    keep_lines,
    references_left_out,
    refuse_other_settings,
    run_settings,
)
from trainer.session import Session
from trainer.statistics import Sources
from trainer.tokenizer import check_tokenizer


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step.

    settings: what run.json says. collate: pads rows to a micro-batch on the device. balance: the balancing loss of a base
    with experts. loss_model: body and loss head, which hold the weights; model: the same spread over the ranks, to be
    called. order: of the rows; batches: of the steps first_step + 1 .. num_steps. tokens: that the steps up to first_step have trained on.
    """

    config: TrainConfig
    settings: dict[str, Any]
    shards: ShardFolder
    objective: Objective
    sources: Sources
    collate: Callable[[list[Row]], MicroBatch]
    base: Base
    layout: Layout
    balance: RouterLoss | None
    loss_model: LossModel
    model: nn.Module
    optimizer: Optimizer
    evaluation: Evaluation
    checkpoints: Checkpoints
    order: MixedOrder
    batches: Generator[GlobalBatch]
    first_step: int
    num_steps: int
    tokens: int


def prepare(config: TrainConfig, session: Session) -> Run | None:
    """Check, load and resume what `config` describes; None where that run is finished. All ranks take part.

    Raises ValueError with value, expectation and remedy for input that does not fit together.
    """
    if config.wandb_project is not None:
        require_wandb()  # before minutes of loading
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
    for line in mixed.require_alike(reference, objective.columns):
        session.note(line)
    order = mixed.order(config.seed, config.global_batch_size)
    num_steps, last_row = choose_steps(mixed, order, config.max_steps, config.epochs, config.global_batch_size)
    settings = check_settings(config, session, mixed, context)
    if world.from_first(session.lease is None or (config.out / MODEL).exists()):
        return None
    if config.mixture.is_mixed:
        for line in table(mixed, order, num_steps, config.global_batch_size):
            session.note(line)

    base = load_trainable(config, session, mixed, context)
    balance = balancing_loss(config, session, base)
    layout = world.from_first(read_layout(Path(config.model), base.model) if world.first else None)
    for line in untrained_notes(layout, type(base.model).__name__):
        session.note(line)
    readers = open_rows(config, session, mixed, context, objective, base, settings["rows_left_out"])
    shards, sources = mixed.first, Sources(mixed.first.manifest.corpus)
    if config.mixture.is_mixed:
        sources = Sources.of_mixture({name: of.manifest.corpus for name, of in zip(mixed.names, mixed.folders)})

    base.prepare(config.activation_checkpointing, config.compile, static=config.deterministic)
    pad_to = shards.manifest.seq_len if config.deterministic else None  # few shapes, since each is compiled
    loss_model = LossModel(base)
    model = spread(loss_model, base.layers, world, config.sharding, base.dtype)
    optimizer = make_optimizer(loss_model, config)
    measure = open_measure(config, session, base, model, context, shards)
    evaluation = Evaluation(config, session, measure, loss_model, layout.rounding(config.export_dtype))
    checkpoints, first_step, tokens = resume(config, session, settings, loss_model, optimizer, layout)
    exchange = Processes(world) if world.size > 1 else None
    batches = global_batches(
        readers.read_packed, order, config.global_batch_size, first_step, num_steps, last_row, exchange
    )  # fmt: skip
    return Run(
        config=config,
        settings=settings,
        shards=shards,
        objective=objective,
        sources=sources,
        collate=partial(collate, context=context, device=world.device, length=pad_to),
        base=base,
        layout=layout,
        balance=balance,
        loss_model=loss_model,
        model=model,
        optimizer=optimizer,
        evaluation=evaluation,
        checkpoints=checkpoints,
        order=order,
        batches=batches,
        first_step=first_step,
        num_steps=num_steps,
        tokens=tokens,
    )


def choose_context(config: TrainConfig, mixed: MixedShards, reference: str | None) -> str:
    """The context to train in; ValueError where the reference is missing or was scored in another one.

    auto: as the reference was scored; without one as all references of the folders were, so that NTP and ReMiT
    runs from the same shards compare like with like, and packed where they differ or there are none.
    """
    contexts = {entry["context"] for shards in mixed.folders for entry in shards.manifest.references.values()}
    context: str = config.context
    if context == "auto" and reference is not None:
        context = mixed.first.require_reference(reference)["context"]
    elif context == "auto":
        context = contexts.pop() if len(contexts) == 1 else "packed"
    if reference is not None:
        for shards in mixed.folders:
            shards.require_scored(reference, context)
    return context


def check_settings(config: TrainConfig, session: Session, mixed: MixedShards, context: str) -> dict[str, Any]:
    """What run.json says of this run; ValueError where --out holds a run with other settings."""
    world = session.world
    lines = (line for shards in mixed.folders for line in check_tokenizer(Path(config.model), shards, session.note))
    differences = list(dict.fromkeys(lines))
    settings: dict[str, Any] = world.from_first(
        run_settings(config, mixed, context, world.size) if world.first else None
    )  # fmt: skip
    if differences:
        settings["tokenizer_differences"] = differences
    if world.first:
        refuse_other_settings(config.out, settings)
        Exported(config.out).require_dtype(config.export_dtype)
    return settings


def load_trainable(config: TrainConfig, session: Session, mixed: MixedShards, context: str) -> Base:
    """The base on the device, ValueError where it does not fit the rows or the options."""
    check_experts(Path(config.model), config.router_aux_loss)
    base = load_base(Path(config.model), config.dtype, session.world.device, context)
    for shards in mixed.folders:
        check_fits(base, Path(config.model), shards)
    if context == "document":
        check_document_attention(base, mixed.first.manifest.seq_len)
    if base.dropout:
        settings = ", ".join(f"{name} {value:g}" for name, value in base.dropout.items())
        session.note(f"off while training, kept in the export: {settings}")
    return base


def balancing_loss(config: TrainConfig, session: Session, base: Base) -> RouterLoss | None:
    """The balancing loss of a base with experts; None for one without."""
    balance = None if config.router_aux_loss is None else router_loss(base.model)
    if config.router_aux_loss and balance is None:
        raise ValueError(
            f"{config.model}: the balancing loss of {type(base.model).__name__} is not found in this release of transformers, "
            "expected one for --router-aux-loss above 0; give --router-aux-loss 0, or another release"
        )
    if line := describe(base.model.config.to_dict(), config.router_aux_loss):
        session.note(line)
    return balance


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
    """AdamW. Decay pulls matrices towards zero; norms and biases have their own scale."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.ndim >= 2]
    others = [p for p in model.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=True,
    )


def resume(
    config: TrainConfig,
    session: Session,
    settings: dict[str, Any],
    loss_model: LossModel,
    optimizer: Optimizer,
    layout: Layout,
) -> tuple[Checkpoints, int, int]:
    """Begin the run in --out, or go to its newest checkpoint and delete what it has from later steps.

    Returns the checkpoints, the steps done and the tokens that they have trained on (0 on processes that do not write).
    """
    world = session.world
    if world.first:
        session.check_lease()  # minutes of loading have passed
        write_record(config.out, settings)
        refuse_other_settings(config.out, settings)  # of a writer that came in between
    fingerprint = world.from_first(sha256_file(config.out / RUN) if world.first else None)
    checkpoints = Checkpoints(
        config.out / CHECKPOINTS, loss_model, optimizer, world, fingerprint, config.keep_checkpoints, session.lease
    )  # fmt: skip
    first_step, problems = checkpoints.load_newest()
    if not session.lease:
        return checkpoints, first_step, 0
    session.check_lease()  # much of what follows is deleted or cut where it is made again
    for problem in problems:
        session.note(f"passed over a damaged checkpoint: {problem}")
    if first_step:
        session.note(f"going on after step {first_step:,}")
    tokens = keep_lines(config.out / METRICS, first_step).get("tokens", 0)
    drop_exports(config.out, first_step)
    Exported(config.out).begin(layout)
    keep_lines(config.out / EVALUATION, first_step or -1)  # the evaluation before step 1 is made again
    return checkpoints, first_step, tokens
