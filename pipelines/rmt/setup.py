"""What a run of remit rmt needs before its first step.

All that can be refused is refused here, before OUT holds a run. Before run.json nothing is written into OUT but names with an
underscore in front, which another command may write anew: the index of the tiers and a copy of the tokenizer.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from pipelines.rmt.answers import can_be_boxed, token_bytes
from pipelines.rmt.curriculum import distribution_at, require_enough
from pipelines.rmt.model import RmtModel
from pipelines.rmt.positions import PositionReader
from pipelines.rmt.prompts import Prompter
from pipelines.rmt.settings import TIERS, RmtConfig
from pipelines.rmt.tier_index import (
    NO_LIMITS,
    Limits,
    TierIndex,
    count_tiers,
    counted_for,
    entropy_column,
    load_or_count,
)
from pipelines.rmt.tokenizer import ends_of, load_tokenizer
from shards.fingerprint import model_origin, weights_fingerprint
from shards.folder import ShardFolder
from shards.modelfolder import read_config
from shards.output_folder import MODEL, read_record, refuse_other
from trainer.batch import MicroBatch, Row, collate
from trainer.checkpoint import Checkpoints
from trainer.distributed import spread
from trainer.experts import num_experts
from trainer.guard import Guard
from trainer.layout import Layout, read_layout
from trainer.loggers import require_wandb
from trainer.mixed_shards import MixedShards
from trainer.model import Base
from trainer.resume import resume
from trainer.run_folder import RECORDED, keep_lines
from trainer.session import Session
from trainer.setup import choose_context, make_optimizer
from trainer.statistics import Sources
from trainer.tokenizer import check_tokenizer
from trainer.trainable import load_trainable

POSITIONS = "positions.jsonl"
RESOLVED = "resolved"  # in run.json: what was chosen where the settings leave it to the model and the shards
MOST_PREFIX = 4096
LEAST_PREFIX = 8
NOT_SETTINGS = (
    *("out", "debug", "shards", "model", "eval_shards", "eval_every", "eval_positions", "checkpoint_every"),
    *("keep_checkpoints", "timeout_seconds", "export_dtype", "wandb_project", "engine_memory"),
    # these change the machine's work and the last digits, not what is computed
    *("micro_batch_size", "activation_checkpointing"),
)


@dataclass(frozen=True)
class Run:
    """A run that is ready for its next step. called: loss_model, or DDP around it; tokens: trained on so far."""

    config: RmtConfig
    settings: dict[str, Any]
    shards: ShardFolder
    context: str
    sources: Sources
    index: TierIndex
    reader: PositionReader
    limits: Limits
    prompter: Prompter
    token_bytes: list[bytes]
    collate: Callable[[list[Row]], MicroBatch]
    base: Base
    layout: Layout
    loss_model: RmtModel
    called: nn.Module
    optimizer: Optimizer
    checkpoints: Checkpoints
    first_step: int
    tokens: int


def prepare(config: RmtConfig, session: Session, count: Callable[[ShardFolder, int], None]) -> Run | None:
    """Check, load and resume what `config` describes; None where that run is finished. All ranks take part.

    count: told the folder and the rows done while the tiers are counted. ValueError with value, expectation and remedy
    for input that does not fit together.
    """
    if config.wandb_project is not None:
        require_wandb()
    torch.manual_seed(config.seed)
    world, shared = session.world, config.train_config()
    if config.positions_per_step % world.size:
        raise ValueError(
            f"--positions-per-step is {config.positions_per_step}, expected a multiple of {world.size}, the processes"
        )
    if num_experts(read_config(Path(config.model))):
        raise ValueError(
            f"--model {config.model}: has experts, expected a base without: remit rmt has no loss that balances them; remit train "
            "has"
        )
    mixed = MixedShards.open(shared.mixture)
    shards = mixed.first
    entropy_column(shards, config.reference)
    if config.eval_shards is not None:  # here, and not after minutes
        entropy_column(ShardFolder(config.eval_shards), config.reference)
    context = choose_context(shared, mixed, config.reference)
    others = [] if config.baseline is None else [config.baseline]
    for name in others:
        require_baseline(config, shards, name, context)
    differences = check_tokenizer(Path(config.model), shards, note=session.note)
    settings: dict[str, Any] = world.from_first(rmt_settings(config, shards, context) if world.first else None)
    if differences:
        settings["tokenizer_differences"] = differences
    if world.first:
        refuse_other_settings(config.out, settings)
    if world.from_first(session.lease is None or (config.out / MODEL).exists()):
        return None

    base = load_trainable(shared, session, mixed, context, takes_masks=True)  # TRL's
    layout = world.from_first(read_layout(Path(config.model), base.model) if world.first else None)
    tokenizer = load_tokenizer(Path(config.model), shards, config.out)
    prompter = make_prompter(config, tokenizer, base.max_position, ends_of(base.model))
    spelled = token_bytes(tokenizer, base.num_embeddings)
    limits = reward_limits(config, prompter, spelled)
    index = tier_index(config, session, shards, others, count, limits)
    reader = PositionReader(
        shards, index, config.reference, thresholds(config), context, base.num_embeddings, config.baseline, limits
    )

    settings[RESOLVED] = {
        "prompt": "chat" if prompter.chat else "plain",
        "prompt_sha256": prompter.fingerprint,
        "max_prefix": prompter.max_prefix,
        "tiers": dict(zip(tier_names(config), index.counts, strict=True)),
    }

    base.prepare(config.activation_checkpointing, "off")
    loss_model = RmtModel(base)
    called = spread(loss_model, base.layers, world, "replicate", base.dtype)
    optimizer = make_optimizer(loss_model, shared)
    guard = Guard(world, None)
    checkpoints, first_step = resume(shared, session, settings, {}, loss_model, optimizer, layout, guard, None)
    if session.lease:
        keep_lines(config.out / POSITIONS, first_step)
    return Run(
        config=config,
        settings=settings,
        shards=shards,
        context=context,
        sources=Sources(shards.manifest.corpus),
        index=index,
        reader=reader,
        limits=limits,
        prompter=prompter,
        token_bytes=spelled,
        collate=partial(collate, context=context, device=world.device),
        base=base,
        layout=layout,
        loss_model=loss_model,
        called=called,
        optimizer=optimizer,
        checkpoints=checkpoints,
        first_step=first_step,
        tokens=guard.counts.tokens,
    )


def thresholds(config: RmtConfig) -> Sequence[float]:
    """Borders of the tiers that the curriculum tells apart."""
    return {"tiers": config.thresholds, "filter": config.thresholds[:1], "off": ()}[config.curriculum]


def tier_names(config: RmtConfig) -> Sequence[str]:
    """What the tiers of the curriculum are called."""
    return {"tiers": TIERS, "filter": (TIERS[0], "above"), "off": ("all",)}[config.curriculum]


def distribution(config: RmtConfig, counts: Sequence[int], step: int) -> np.ndarray:
    """Probabilities of the tiers of `tier_names` in step 1..max_steps. counts: positions of each."""
    if config.curriculum == "tiers":
        return np.array(
            [0.0, *distribution_at(step, config.max_steps, config.first_distribution, config.last_distribution)]
        )
    if config.curriculum == "filter":
        return np.array([0.0, 1.0])
    return np.array([1.0])


def tier_index(
    config: RmtConfig,
    session: Session,
    shards: ShardFolder,
    others: Sequence[str],
    count: Callable[[ShardFolder, int], None],
    limits: Limits = NO_LIMITS,
) -> TierIndex:
    """The index in OUT, made by the first process; ValueError where a tier has too few positions."""

    borders = thresholds(config)
    wanted = counted_for(shards, config.reference, borders, others, limits)

    def make() -> TierIndex:
        session.phase("count tiers")
        return count_tiers(shards, config.reference, borders, others, lambda rows: count(shards, rows), limits)

    def check(index: TierIndex) -> None:
        distributions = [distribution(config, index.counts, step) for step in (1, config.max_steps)]
        require_enough(index.counts, distributions, config.positions_per_step, tier_names(config), config.shards)

    if session.world.first:
        load_or_count(config.out, make, session.check_lease, wanted, check)
    session.world.meet()  # the first process reads a column of the whole corpus
    return load_or_count(config.out, make, session.check_lease, wanted, check)


def require_baseline(config: RmtConfig, shards: ShardFolder, name: str, context: str) -> None:
    """ValueError unless the log-probs of the frozen base are those of --model itself."""
    scored = shards.require_scored(name, context)
    if context != "document":
        raise ValueError(
            f"--reward gain with --baseline {name}: was scored in {context} context, where a token has seen the documents before "
            "its own, expected document context, since a prompt holds one document; score the shards again, with the base and "
            "with the reference, with --context document"
        )
    ours = weights_fingerprint(Path(config.model))
    if scored.get("weights_sha256") not in (None, ours):
        raise ValueError(
            f"--baseline {name}: was scored with weights {str(scored['weights_sha256'])[:12]}.., --model has {ours[:12]}..; RLP's "
            f"baseline is the base itself: score the shards with --model {config.model} under another --name"
        )


def reward_limits(config: RmtConfig, prompter: Prompter, spelled: Sequence[bytes]) -> Limits:
    """Which positions --reward can be given for. spelled: bytes of each token."""
    if config.reward == "prefix":
        return Limits(tokens_V=can_be_boxed(spelled, {*prompter.end_ids, *prompter.tokenizer.all_special_ids}))
    # the base's stored log-prob has seen the whole of the document before
    return Limits(longest_prefix=prompter.max_prefix) if config.reward == "gain" else NO_LIMITS


def make_prompter(
    config: RmtConfig, tokenizer: Any, max_position: int | None, more_ends: tuple[int, ...] = ()
) -> Prompter:
    """The prompts of a run; ValueError where the thought leaves no room for a text, or there is no template for chat."""
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if config.prompt == "chat" and not has_template:
        raise ValueError("--prompt is chat, and the tokenizer of --model has no chat template; expected plain or auto")
    chat = config.prompt == "chat" or (config.prompt == "auto" and has_template)
    prompter = Prompter(tokenizer, chat, config.answer, 1, more_ends)
    tags = 2 if config.reward == "gain" else 1  # a thought that was cut off within its tag is closed for it
    needed = prompter.overhead + tags * len(prompter.close_ids) + config.most_thought + config.most_answer
    room = MOST_PREFIX if max_position is None else max_position - needed
    if room < LEAST_PREFIX or (config.max_prefix or 0) > room:
        asked = f"--max-prefix is {config.max_prefix}" if config.max_prefix else "no text before it"
        raise ValueError(
            f"--first-budget is {config.first_budget}: the longest thought, its tags and the answer take {needed} of the "
            f"model's {max_position} positions, which leaves {max(0, room)} tokens for the text ({asked}); expected at least "
            f"{LEAST_PREFIX}; give a smaller --first-budget{' or --max-prefix' if config.max_prefix else ''}"
        )
    return replace(prompter, max_prefix=config.max_prefix or min(room, MOST_PREFIX))


def rmt_settings(config: RmtConfig, shards: ShardFolder, context: str) -> dict[str, Any]:
    """All that decides the outcome of a run; a resume under other settings is refused."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}
    name, revision = model_origin(Path(config.model))
    settings |= {
        "stage": "rmt",
        "base": {"model": name, "revision": revision},
        "context": context,
        "shards": shards.manifest.provenance(),
        "base_weights_sha256": weights_fingerprint(Path(config.model)),
    }
    plain: dict[str, Any] = json.loads(json.dumps(settings))  # as run.json gives it back
    return plain


def refuse_other_settings(out: Path, settings: dict[str, Any]) -> None:
    """ValueError where `out` holds a run with other settings."""
    before = read_record(out)
    if before is None:
        return
    ours, theirs = ({key: run[key] for key in run if key not in (*RECORDED, RESOLVED)} for run in (settings, before))
    options = {field.name: f"--{field.name.replace('_', '-')}" for field in fields(RmtConfig)}
    refuse_other(str(out), "run", ours, theirs, "choose another --out, or delete that run to start over", options)
