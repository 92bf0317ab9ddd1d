"""The base of a training: loaded, asked whether rows and options suit it, and what is to be known of it before the first step.

In: the run's settings and shards. Out: a Base; the layout of its files, its model FLOPs, its balancing loss.
"""

from pathlib import Path

from shards.folder import ShardFolder
from trainer.attention_choice import agree, choose_attention
from trainer.auto_sharding import choose_sharding
from trainer.checks import check_document_attention, check_fits
from trainer.config import TrainConfig
from trainer.experts import RouterLoss, check_experts, describe, router_loss
from trainer.float8 import use_float8
from trainer.layout import Layout, read_layout
from trainer.mixed_shards import MixedShards
from trainer.model import Base, load_base
from trainer.model_flops import ModelFlops, count_model_flops
from trainer.session import Session


def load_trainable(
    config: TrainConfig, session: Session, mixed: MixedShards, context: str, takes_masks: bool = False
) -> Base:
    """The base on the device, ValueError where it does not fit the rows or the options.

    takes_masks: it is called with attention masks as well, of rows that are padded on the left, which attention over documents
    does not look at.
    """
    check_experts(Path(config.model), config.router_aux_loss)
    sharding = choose_sharding(config, session, mixed)
    base = load_base(
        Path(config.model), config.dtype, session.world.device, context, session.world, sharding, session.note
    )
    agree(base, session.world)  # a base in shares asks all ranks or none
    if base.attention is not None:
        session.note(f"attention: {base.attention.text}")
        if context == "packed" and not takes_masks:  # each row is a document then, without a mask of T x T
            base.attention = base.ask(choose_attention)
            agree(base, session.world)
            session.note(f"attention over rows: {base.attention.text}")
    for shards in mixed.folders:
        check_fits(base, Path(config.model), shards)
    if context == "document":
        held_out = [] if config.eval_shards is None else [ShardFolder(config.eval_shards)]
        if not takes_masks:
            base.attention = base.ask(choose_attention)
            agree(base, session.world)
            session.note(f"attention over documents: {base.attention.text}")
        base.ask(check_document_attention, max(shards.manifest.seq_len for shards in (mixed.first, *held_out)))
    if base.dropout:
        settings = ", ".join(f"{name} {value:g}" for name, value in base.dropout.items())
        session.note(f"off while training, kept in the export: {settings}")
    return base


def layout_of(config: TrainConfig, session: Session, base: Base) -> Layout:
    """How the base's files hold its weights, compared with them: here, or by all ranks when they read their shares."""
    if base.shares is not None:
        return base.shares.layout
    world = session.world
    layout: Layout = world.from_first(read_layout(Path(config.model), base.model) if world.first else None)
    return layout


def swap_layers(config: TrainConfig, session: Session, base: Base) -> None:
    """Put layers in float8 in the place of those that are, with --float8."""
    if config.float8:
        session.note(use_float8(base, config.float8_emulated))


def counted_flops(base: Base, session: Session) -> ModelFlops | None:
    """What the model costs; None, with a note, where that cannot be counted."""
    try:
        return count_model_flops(base.model.config)
    except ValueError as error:
        session.note(f"{error}; metrics.jsonl has no model_flops_per_token")
        return None


def balancing_loss(config: TrainConfig, session: Session, base: Base) -> RouterLoss | None:
    """The balancing loss of a base with experts; None for one without."""
    balance = None if config.router_aux_loss is None else base.ask(lambda asked: router_loss(asked.model))
    if config.router_aux_loss and balance is None:
        raise ValueError(
            f"{config.model}: the balancing loss of {type(base.model).__name__} is not found in this release of transformers, "
            "expected one for --router-aux-loss above 0; give --router-aux-loss 0, or another release"
        )
    if line := describe(base.model.config.to_dict(), config.router_aux_loss):
        session.note(line)
    return balance
