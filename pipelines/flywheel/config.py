"""The YAML file that describes the loop, checked once: its keys, their values, and that the sections fit each other.

The options of a stage are those of its command: each is checked by its type there, all of them by its own settings.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, get_type_hints

import tyro
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from pipelines.cli import COMMANDS, find
from pipelines.flywheel.values import Text, Words, as_yaml_spells, check, known_keys, read_yaml, to_text, to_words
from pipelines.terminal import BadUsage
from trainer.objectives.settings import OPTIONS, TEMPERATURES

# options of the stages' commands, by what they mean to the loop
DECIDED = {
    **dict.fromkeys(("debug", "mix", "model", "name", "out", "reference", "shards"), "the loop decides it"),
    **{name: f"give {name} at the top" for name in ("corpus", "seed", "seq_len", "tokenizer")},
    "compare": "use remit eval --compare afterwards",
    "mirror": "the rounds of a loop are several runs, and a mirror has one",
}
FILES = {"data", "eval_shards", "task_dir"}  # name something that is read
FAST = {  # change how fast or safely a stage runs, or what it logs, and not its result
    "activation_checkpointing", "checkpoint_every", "compile", "deterministic", "engine_memory", "grace_seconds",
    "gradient_checkpointing", "keep_checkpoints", "max_bad_rows", "max_num_batched_tokens", "micro_batch_size", "num_engines", "num_workers",
    "progress_timeout_seconds", "ray_workers", "sharding", "timeout_seconds", "wandb_project",
}  # fmt: skip
RESERVED = ("score", "train", "rmt", "score-heldout", "evaluate-midtrained", "evaluate-posttrained")
KINDS = ("sft", "dpo", "rl", "command")
SECTIONS = ("pack", "score", "train", "rmt", "evaluate", "sft", "dpo", "rl")
EXAMPLES = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "rl": ("prompt",)}
NOWHERE = "/dev/null/none"  # stands for a path that the loop decides


def command_of(section: str) -> str:
    """The command of remit that a section of the file has options for."""
    return {"evaluate": "eval"}.get(section, section)


def fast_options(section: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a section that may change without a repetition."""
    decides = set()
    if "scope" in OPTIONS.get(options.get("objective", ""), ()) and options.get("scope") == "micro":
        decides.add("micro_batch_size")  # which tokens are ranked together
    if section == "rmt":
        decides.add("num_engines")  # which prompts are sampled together, and so what is sampled
    return {name: options[name] for name in options if name in FAST - decides}


def without_objective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of remit train for next-token prediction: those of the other objectives left out."""
    theirs = {"objective", *(name for names in OPTIONS.values() for name in names)}
    return {name: value for name, value in options.items() if name not in theirs}


Options = dict[str, Any]


class Mapped(BaseModel):
    """A mapping of the file, as `known_keys` takes it."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    decided: ClassVar[dict[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        return known_keys([*cls.model_fields], value, cls.decided)


class PostTrain(Mapped):
    """One stage of post-training: sft, dpo or rl with their options, or a command."""

    sft: Options = {}
    dpo: Options = {}
    rl: Options = {}
    command: Words = []
    name: Annotated[str, Field(pattern="^[_-]*[A-Za-z0-9][A-Za-z0-9_-]*$")] = ""
    """Default: the kind."""
    inputs: Annotated[list[str], BeforeValidator(partial(to_words, least=0))] = []
    """Files and folders that `rl` or a command reads beyond what its options and words name."""

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if kind in self.model_fields_set)

    @model_validator(mode="after")
    def one_kind(self) -> "PostTrain":
        if len(self.model_fields_set & set(KINDS)) != 1:
            raise ValueError("expected exactly one of sft, dpo, rl, command")
        if "inputs" in self.model_fields_set and self.kind in ("sft", "dpo"):
            raise ValueError(f"inputs is no key beside {self.kind}, expected it beside rl or command alone")
        self.name = self.name or self.kind
        return self


class FlywheelConfig(Mapped):
    """The loop, as the YAML file describes it. Every field is a key of the file."""

    base: Text
    """Base model that every round's mid-training starts from: a Hugging Face folder, or NAME or NAME@REVISION of the hub."""
    corpus: Words
    """Mid-training corpus, as --corpus of remit pack takes it."""
    out: Annotated[Path, BeforeValidator(to_text)]
    """Folder for all stages."""
    posttrain: list[PostTrain]
    """Stages of post-training, each from the model of the one before; [] scores with the mid-trained model itself."""
    tokenizer: Text | None = None
    """Folder of the tokenizer, or NAME or NAME@REVISION of the hub; default: the base's."""
    seq_len: int = Field(4096, ge=2)
    """Tokens per row."""
    rounds: int = Field(1, ge=0)
    """ReMiT rounds; round 0, plain next-token prediction, comes before them unless `reference` is given."""
    reference: Text | None = None
    """Post-trained model that exists already: it scores for round 1, and round 0 is left out."""
    heldout: Words = []
    """Held-out documents, as --corpus takes them: packed, and given to every training as --eval-shards."""
    seed: int = Field(0, ge=0)
    """Seed of every stage that has one."""
    pack: Options = {}
    """Options of remit pack."""
    score: Options = {}
    """Options of remit score."""
    train: Options = {}
    """Options of remit train; round 0 takes those that are not of an objective."""
    rmt: Options | None = None
    """Options of remit rmt: the rounds from 1 on are then mid-trained by it and not by remit train, {} with its defaults."""
    launch: Annotated[dict[str, Words], BeforeValidator(partial(known_keys, SECTIONS))] = {}
    """Words that start a Python module in place of `python -m`, by section: {train: [torchrun, ..., -m]}."""
    evaluate: Options | None = None
    """Options of remit eval for the mid-trained and the post-trained model of each round; default: no evaluation."""


def read_config(path: Path, out: Path | None = None) -> FlywheelConfig:
    """The loop that a YAML file describes. out: takes the place of the file's. BadUsage for anything wrong in it."""
    try:
        config: FlywheelConfig = check("", FlywheelConfig, read_yaml(path) | ({} if out is None else {"out": str(out)}))
        for section in ("pack", "score", "train", "rmt", "evaluate"):
            if (options := getattr(config, section)) is not None:
                setattr(config, section, read_options(section, section, options, seq_len=config.seq_len))
        for number, stage in enumerate(config.posttrain, 1):
            where = f"posttrain[{number}].{stage.kind}"
            for entry in stage.inputs:
                require_there(f"posttrain[{number}].inputs", entry)
            if stage.command:
                require_program(where, stage.command)
            else:
                setattr(stage, stage.kind, read_options(where, stage.kind, getattr(stage, stage.kind)))
        for section, words in config.launch.items():
            require_program(f"launch.{section}", words)
        check_together(config)
    except ValueError as error:
        raise BadUsage(f"{path}: {error}") from None
    return config


def read_options(where: str, section: str, values: Any, **beside: Any) -> Options:
    """The options of a stage by their types in its own settings, which then take all of them and those that the loop
    decides. beside: of the latter what is known; a path stands for the others."""
    settings = find(COMMANDS[command_of(section)][0])
    hints = get_type_hints(settings)
    entries = {
        entry.name: (
            Annotated[hints[entry.name], BeforeValidator(partial(as_yaml_spells, hints[entry.name]))],
            ... if entry.default is tyro.MISSING or entry.default is entry.default_factory is MISSING else None,
        )
        for entry in fields(settings)
    }
    decided = {name: DECIDED[name] for name in entries if name in DECIDED}
    if section == "evaluate":
        del decided["seed"]
    options_model = create_model(
        command_of(section), __base__=Mapped, **{name: entries[name] for name in entries if name not in decided}
    )  # type: ignore[call-overload]
    options_model.decided = decided
    options: Options = check(where, options_model, values).model_dump(exclude_unset=True)
    for name in FILES & options.keys():
        require_there(f"{where}.{name}", options[name], folder=name != "data")
    loop = {"corpus": [NOWHERE], "shards": NOWHERE} | beside
    needed = {name: hints[name] for name, (_, default) in entries.items() if name in decided and default is ...}
    loop |= {name: kind(NOWHERE) for name, kind in needed.items() if name not in loop}
    try:
        settings(**options, **{name: loop[name] for name in loop if name in entries})
        if section in EXAMPLES:  # read now, and not after days of mid-training
            from pipelines.posttrain.data import read_examples

            answer = ("answer",) if section == "rl" and options.get("reward", "answer") == "answer" else ()
            read_examples(options["data"], (*EXAMPLES[section], *answer))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    return options


def require_there(key: str, path: str | Path, folder: bool = False) -> None:
    if not (Path(path).is_dir() if folder else Path(path).exists()):
        raise ValueError(f"{key} is {str(path)!r}, expected a {'' if folder else 'file or '}folder that is there")


def require_program(where: str, words: list[str]) -> None:
    """ValueError unless a command can be started, and its script is there where its program runs one."""
    if shutil.which(words[0]) is None:
        remedy = "a program that can be started; a script needs bash or python in front of it"
        if len(words) == 1 and len(words[0].split()) > 1:
            remedy = f"a list of words, here [{', '.join(words[0].split())}]"
        raise ValueError(f"{where} is {words[0]!r}, expected {remedy}")
    runs_script = re.fullmatch(r"python[\d.]*|bash|sh", Path(words[0]).name)
    if runs_script and words[1:] and not words[1].startswith("-") and not Path(words[1]).is_file():
        raise ValueError(f"{where} is {words[1]!r}, expected a script that is there, seen from where remit is started")


def check_together(config: FlywheelConfig) -> None:
    """ValueError where sections do not fit: above all where trainings would refuse what the scorings of this file store."""
    score, train, names = config.score, config.train, [stage.name for stage in config.posttrain]
    if len(set(names)) < len(names) or set(names) & set(RESERVED):
        raise ValueError(f"posttrain: the names are {names}, expected different ones, none of {', '.join(RESERVED)}")
    if config.reference is not None and config.rounds == 0:
        raise ValueError("rounds is 0, expected at least 1 with a reference, which takes the place of round 0")
    if train.get("objective") == "ntp":
        raise ValueError(
            "train.objective is 'ntp', expected one with a reference; round 0 is the one that trains with ntp"
        )
    if "eval_shards" in train and config.heldout:
        raise ValueError("heldout and train.eval_shards are both given, expected one of them")
    if config.rmt is not None:
        check_rmt(config, config.rmt)
    if score.get("engine") == "fake":
        raise ValueError(
            "score.engine is 'fake', expected vllm; the fake engine's numbers are a hash, which training refuses"
        )
    objective = train.get("objective")
    if objective in TEMPERATURES and score.get("top_k", 0) == 0 and config.rounds:
        raise ValueError(
            f"score.top_k is 0, expected at least 1, for instance 32, since train.objective is {objective}"
        )
    if config.rounds and objective in ("kd", "rkl") and score.get("top_k_below_entropy") is not None:
        raise ValueError(
            f"score.top_k_below_entropy is {score['top_k_below_entropy']!r}, expected none, since train.objective is {objective}, which "
            "needs the most probable tokens everywhere"
        )
    if config.rounds and objective == "sampled" and not score.get("sample_k"):
        raise ValueError("score.sample_k is 0, expected at least 1, for instance 25, since train.objective is sampled")
    if config.rounds and objective == "entropy" and not score.get("entropy"):
        raise ValueError("score.entropy is False, expected true, since train.objective is entropy")
    if objective == "switch" and config.rounds:
        temperature = train.get("temperature", TEMPERATURES["switch"])
        stored = score.get("entropy_temperature") if temperature != 1 else 1
        if not score.get("entropy") or stored != temperature:
            raise ValueError(
                f"score.entropy is {score.get('entropy', False)!r} with entropy_temperature {score.get('entropy_temperature')}, "
                f"expected true with {temperature:g}, the temperature of train.objective switch"
            )
    scored, trained = score.get("context", "packed"), train.get("context", "auto")
    if trained not in ("auto", scored) and config.rounds:
        raise ValueError(f"train.context is {trained!r}, expected {scored}, as score.context is, or auto")


def check_rmt(config: FlywheelConfig, rmt: Options) -> None:
    """ValueError where the options of remit rmt do not fit those of the other sections."""
    if config.rounds == 0:
        raise ValueError("rounds is 0, expected at least 1 with rmt, which mid-trains from round 1 on")
    if "objective" in config.train:
        raise ValueError(
            f"train.objective is {config.train['objective']!r} beside rmt, expected none: rmt takes the place of train in the "
            "rounds from 1 on, and round 0 trains with ntp"
        )
    if config.reference is not None and config.train:
        raise ValueError(
            f"train is given ({', '.join(config.train)}) with rmt and a reference, expected none: no round is left that it trains"
        )
    if rmt.get("reward") == "gain":
        raise ValueError(
            "rmt.reward is 'gain', expected match or prefix: the loop stores no log-probs of the base for it to compare with"
        )
    if config.score.get("entropy") is False:
        raise ValueError(
            "score.entropy is False, expected nothing or true with rmt, whose curriculum reads the entropy"
        )
    if "eval_shards" in rmt and config.heldout:
        raise ValueError("heldout and rmt.eval_shards are both given, expected one of them")
