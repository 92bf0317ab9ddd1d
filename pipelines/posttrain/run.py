"""What the three stages share: load, train with TRL so that a kill costs little, write the model whole.

OUT/run.json holds the settings, OUT/metrics.jsonl TRL's log with one object per logged step, OUT/checkpoints what is
needed to go on, OUT/model the result: the start's folder with other weights. A checkpoint counts once its file
`complete` is there.
"""

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.models import resolve_model
from pipelines.posttrain.data import Example, keep_short, read_examples
from pipelines.posttrain.rewards import reward_fingerprint
from pipelines.posttrain.settings import PostTrainConfig, RlConfig
from pipelines.terminal import DONE, STOPPED, ShouldStop, note, quiet_libraries
from shards.fingerprint import model_origin, weights_fingerprint
from shards.lease import Lease
from shards.output_folder import MODEL, read_record, refuse_other, write_record, writing_run
from shards.part import sha256_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.model import Base

METRICS, CHECKPOINTS = "metrics.jsonl", "checkpoints"
# where things are, what is shown, and what changes the machine's work but not what is computed
NOT_SETTINGS = (
    "model",
    "data",
    "out",
    "debug",
    "checkpoint_every",
    "micro_batch_size",
    "gradient_checkpointing",
    "export_dtype",
)


@dataclass(frozen=True)
class Stage:
    """What tells a stage from the others.

    fields: texts that each example has; pairs: those of them that follow the prompt in a row; reserve: tokens that stay
    free after a prompt; trainer: TRL's trainer for a job.
    """

    fields: tuple[str, ...]
    pairs: tuple[str, ...]
    reserve: int
    trainer: "Callable[[Job], Any]"


@dataclass(frozen=True)
class Job:
    """What a stage gives to its trainer. examples: those that are short enough; arguments: for TRL's config class."""

    base: "Base"
    tokenizer: "PreTrainedTokenizerBase"
    examples: list[Example]
    arguments: dict[str, Any]


def post_train(config: PostTrainConfig, stage: Stage, should_stop: ShouldStop) -> int:
    """Train and write OUT/model; returns DONE or STOPPED. Raises ValueError for data, models and folders of no use."""
    if find_spec("trl") is None or find_spec("accelerate") is None:
        raise ValueError(
            "post-training needs TRL, which is not installed; in your checkout of remit: pip install '.[flywheel]'"
        )
    quiet_libraries()
    first = int(os.environ.get("RANK", "0")) == 0  # of torchrun and accelerate launch
    with writing_run(config.out, "a run of post-training", first, note) as lease:
        return train_and_export(config, stage, should_stop, lease)


def train_and_export(config: PostTrainConfig, stage: Stage, should_stop: ShouldStop, lease: Lease | None) -> int:
    """`post_train` as one of its processes. lease: of --out, on the one that writes to it."""
    folder = resolve_model("--model", config.model).path
    examples = read_examples(config.data, stage.fields)
    base, tokenizer = load(folder)
    settings = run_settings(config, folder)
    refuse_other_settings(config, settings)
    final = config.out / MODEL
    if lease and final.exists():  # made by another command while this one waited; its other processes have gone on
        raise RuntimeError(f"{final}: was finished meanwhile; the same command again finds nothing to do")
    if final.exists():
        print(f"nothing to do, trained before: {final}")
        return DONE
    limit = row_limit(config, base) - stage.reserve
    if limit < 1:
        raise ValueError(
            f"--max-completion-length is {stage.reserve}, expected fewer than {limit + stage.reserve} tokens, the longest "
            "row, prompt included"
        )
    short = keep_short(examples, lambda texts: [len(ids) for ids in tokenizer(texts)["input_ids"]], stage.pairs, limit)
    if not short:
        raise ValueError(f"--data {config.data}: no example is short enough, expected some of at most {limit} tokens")
    if len(short) < len(examples):
        note(f"left out: {len(examples) - len(short):,} of {len(examples):,} examples, longer than {limit} tokens")

    from pipelines.posttrain.loop import run_trainer, trainer_arguments
    from trainer.export import export
    from trainer.exported import rounding_notes
    from trainer.layout import read_layout

    if lease:
        lease.check()  # minutes of loading have passed
        write_record(config.out, settings)
        refuse_other_settings(config, settings)  # of a writer that came in between
    layout = read_layout(folder, base.model)
    trainer = stage.trainer(Job(base, tokenizer, short, trainer_arguments(config)))
    if not run_trainer(config, trainer, should_stop, lease):
        return STOPPED
    if lease:
        lease.check()
        state = base.model.state_dict()
        rounding = export(base.model, layout, state, final, config.export_dtype, record=lambda rounding: lease.check())
        for line in rounding_notes(rounding, None, {}):
            note(line)
        lease.check()
        shutil.rmtree(config.out / CHECKPOINTS, ignore_errors=True)
        print(f"trained {trainer.state.global_step:,} steps on {len(short):,} examples -> {final}")
    return DONE


def load(folder: Path) -> "tuple[Base, PreTrainedTokenizerBase]":
    """Model, with float32 weights on the CPU, and tokenizer; ValueError where the latter cannot end a text."""
    import torch
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    from trainer.model import load_base
    from trainer.tokenizer import replaced_components

    base = load_base(folder, "float32", torch.device("cpu"))
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        raise ValueError(f"--model {folder}: has no tokenizer, expected tokenizer.json beside the weights")
    # some classes of transformers leave parts of tokenizer.json out, and its ids are what the model knows
    loader: Any = PreTrainedTokenizerFast if replaced_components(folder) else AutoTokenizer
    tokenizer = loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"--model {folder}: its tokenizer has no end token (eos_token), expected one to end texts with"
        )
    if tokenizer.eos_token_id >= base.num_embeddings:
        raise ValueError(
            f"--model {folder}: its end token has id {tokenizer.eos_token_id}, expected one below {base.num_embeddings}, "
            "the number of embeddings"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id >= base.num_embeddings:
        # TRL masks by length, not by token, so that the end token is still learned where it ends a text
        tokenizer.pad_token = tokenizer.eos_token
    return base, tokenizer


def row_limit(config: PostTrainConfig, base: "Base") -> int:
    """Longest row in tokens; ValueError where --max-length is more than the model's positions."""
    positions = base.max_position
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(f"--max-length is {config.max_length}, expected at most {positions}, the model's positions")
    return config.max_length or positions or 1 << 30


def run_settings(config: PostTrainConfig, folder: Path) -> dict[str, Any]:
    """All that decides the outcome of a run; a resume under other settings is refused."""
    reward = reward_fingerprint(config.reward) if isinstance(config, RlConfig) else None
    return {
        "stage": type(config).__name__.removesuffix("Config").lower(),
        **{name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS},
        **({} if config.export_dtype == "base" else {"export_dtype": config.export_dtype}),  # older runs have none
        "base": dict(zip(("model", "revision"), model_origin(folder))),
        "data_sha256": sha256_file(config.data),
        "weights_sha256": weights_fingerprint(folder),
        **({} if reward is None else {"reward_sha256": reward}),
    }


def refuse_other_settings(config: PostTrainConfig, settings: dict[str, Any]) -> None:
    """ValueError where --out holds a run with other settings."""
    before = read_record(config.out)
    if before is not None:
        options = {field.name: f"--{field.name.replace('_', '-')}" for field in fields(config)}
        remedy = "choose another --out, or delete that run to start over"
        # the folder that it starts from may have been moved; the weights are what counts
        ours, theirs = settings | {"base": None}, before | {"base": None}
        refuse_other(str(config.out), "run", ours, theirs, remedy, options)


def trl_config(kind: type, arguments: dict[str, Any], options: dict[str, Any], extra: dict[str, Any]) -> Any:
    """An object of TRL's config class; ValueError for a --trainer-arg (`extra`) that it does not have or accept."""
    names = set(kind.__dataclass_fields__)  # type: ignore[attr-defined]
    for name in extra:
        if name not in names:
            near = get_close_matches(name, names, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"--trainer-arg {name}: {kind.__name__} of TRL has no such setting{hint}")
    try:
        return kind(**arguments, **options, **extra)
    except (TypeError, ValueError) as error:
        raise ValueError(f"TRL's {kind.__name__} refuses the settings: {error}") from None
