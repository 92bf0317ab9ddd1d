"""The YAML file that describes the loop, checked once: its keys, their values, and that the sections fit each other.

The options of a stage are those of its command: each is checked by its type there, all of them by its own settings.
"""

import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, create_model, model_validator

from pipelines.cli import COMMANDS, find
from pipelines.terminal import BadUsage
from trainer.objectives.settings import OPTIONS

# options of the stages' commands, by what they mean to the loop
DECIDED = {"compare", "corpus", "debug", "model", "name", "out", "reference", "seed", "seq_len", "shards", "tokenizer"}
FILES = {"data", "eval_shards", "task_dir"}  # name something that is read
FAST = {  # change how fast or safely a stage runs, or what it logs, and not its result
    "activation_checkpointing", "checkpoint_every", "compile", "deterministic", "grace_seconds", "gradient_checkpointing",
    "keep_checkpoints", "max_num_batched_tokens", "micro_batch_size", "num_engines", "num_workers",
    "progress_timeout_seconds", "ray_workers", "sharding", "timeout_seconds", "wandb_project",
}  # fmt: skip
RESERVED = ("score", "train", "evaluate-midtrained", "evaluate-posttrained")
KINDS = ("sft", "dpo", "rl", "command")
EXAMPLES = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "rl": ("prompt",)}
NOWHERE = "/dev/null/none"  # stands for a path that the loop decides


def command_of(section: str) -> str:
    """The command of remit that a section of the file has options for."""
    return {"evaluate": "eval"}.get(section, section)


def fast_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that may change without a repetition."""
    decides = options.get("objective") == "rho1" and options.get("scope") == "micro"  # which tokens are ranked together
    return {name: options[name] for name in options if name in FAST and not (decides and name == "micro_batch_size")}


def without_objective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of remit train for next-token prediction: those of the other objectives left out."""
    theirs = {"objective", *(name for names in OPTIONS.values() for name in names)}
    return {name: value for name, value in options.items() if name not in theirs}


class Mapped(BaseModel):
    """A mapping of the file: - and _ are alike in its keys, and what is null is left out."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    decided: ClassVar[set[str]] = set()

    @model_validator(mode="before")
    @classmethod
    def known(cls, value: Any) -> Any:
        names = [*cls.model_fields]
        if not isinstance(value, dict):
            raise ValueError(f"is {value!r}, expected a mapping with some of {', '.join(names)}")
        found = {str(name).replace("-", "_"): entry for name, entry in value.items() if entry is not None}
        for name in found:
            if name in cls.decided:
                raise ValueError(f"{name} cannot be given here: the loop, or a key at the top, decides it")
            if name not in names:
                near = get_close_matches(name, names, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
                raise ValueError(f"{name} is no key; {hint}")
        return found


Text = Annotated[str, Field(min_length=1)]
# a single one may stand without brackets
Words = Annotated[
    list[Text], BeforeValidator(lambda value: value if isinstance(value, list) else [value]), Field(min_length=1)
]
Options = dict[str, Any]


class PostTrain(Mapped):
    """One stage of post-training: sft, dpo or rl with their options, or a command."""

    sft: Options = {}
    dpo: Options = {}
    rl: Options = {}
    command: Words = []
    name: Annotated[str, Field(pattern="^[A-Za-z0-9_-]+$")] = ""
    """Default: the kind."""
    inputs: Words = []
    """Files and folders that `rl` or a command reads beyond what its options and words name."""

    @property
    def kind(self) -> str:
        return next(kind for kind in KINDS if kind in self.model_fields_set)

    @model_validator(mode="after")
    def one_kind(self) -> "PostTrain":
        if len(self.model_fields_set & set(KINDS)) != 1:
            raise ValueError("expected exactly one of sft, dpo, rl, command")
        self.name = self.name or self.kind
        return self


class FlywheelConfig(Mapped):
    """The loop, as the YAML file describes it. Every field is a key of the file."""

    base: Text
    """Base model that every round's mid-training starts from: a Hugging Face folder, or NAME or NAME@REVISION of the hub."""
    corpus: Words
    """Mid-training corpus, as --corpus of remit pack takes it."""
    out: Path
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
    launch: dict[Literal["pack", "score", "train", "evaluate", "sft", "dpo", "rl"], Words] = {}
    """Words that start a Python module in place of `python -m`, by section: {train: [torchrun, ..., -m]}."""
    evaluate: Options | None = None
    """Options of remit eval for the mid-trained and the post-trained model of each round; default: no evaluation."""


def read_config(path: Path, out: Path | None = None) -> FlywheelConfig:
    """The loop that a YAML file describes. out: takes the place of the file's. BadUsage for anything wrong in it."""
    try:
        config: FlywheelConfig = check("", FlywheelConfig, read_yaml(path) | ({} if out is None else {"out": str(out)}))
        for section in ("pack", "score", "train", "evaluate"):
            if (options := getattr(config, section)) is not None:
                setattr(config, section, read_options(section, section, options, seq_len=config.seq_len))
        for number, stage in enumerate(config.posttrain, 1):
            where = f"posttrain[{number}].{stage.kind}"
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


def read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), TextLoader)
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise ValueError("expected a mapping of keys to values, for instance base: path/to/model")
    return values


class TextLoader(yaml.SafeLoader):
    """YAML whose values stay the texts that they are, where plain YAML makes 43200 of 12:00:00, 8 of 010 and False of off;
    null alone is None. A key that stands twice in one mapping is refused, where plain YAML forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in {key for key in keys if keys.count(key) > 1}:
            raise yaml.YAMLError(f"{key!r} stands twice")
        return super().construct_mapping(node, deep)


TextLoader.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
TextLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"\.inf$"), ["."])


def check(where: str, model: type[BaseModel], values: Any) -> Any:
    """The values as `model`; ValueError with key, value and expectation. where: the key that they stand under."""
    try:
        return model.model_validate(values)
    except ValidationError as failed:
        error = failed.errors()[0]
    key = where + "".join(
        f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in error["loc"] if part != "[key]"
    )
    said = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ").partition(", unable to")[0]
    if error["type"] == "missing":
        said = f" is missing, expected: {model.model_fields[str(error['loc'][-1])].description or 'a value'}"
    elif error["type"] != "value_error":
        said = f" is {error['input']!r}, expected {said}"
    else:
        said = f"{' ' if said.startswith('is ') else ': ' if key else ''}{said}"
    raise ValueError(f"{key}{said}".removeprefix("."))


def read_options(where: str, section: str, values: Any, **beside: Any) -> Options:
    """The options of a stage by their types in its own settings, which then take all of them and those that the loop
    decides. beside: of the latter what is known; a path stands for the others."""
    settings = find(COMMANDS[command_of(section)][0])
    hints, decided = get_type_hints(settings), DECIDED - ({"seed"} if section == "evaluate" else set())
    entries = {
        entry.name: (hints[entry.name], ... if entry.default is entry.default_factory is MISSING else None)
        for entry in fields(settings)
    }
    options_model = create_model(
        section, __base__=Mapped, **{name: entries[name] for name in entries if name not in decided}
    )  # type: ignore[call-overload]
    options_model.decided = decided
    options: Options = check(where, options_model, values).model_dump(exclude_unset=True)
    loop = {"corpus": [NOWHERE]} | beside
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


def require_program(where: str, words: list[str]) -> None:
    """ValueError unless a command can be started, and its script is there where its program runs one."""
    if shutil.which(words[0]) is None:
        raise ValueError(f"{where} is {words}, expected a list of words that begins with a program that can be started")
    runs_script = re.fullmatch(r"python[\d.]*|bash|sh", Path(words[0]).name)
    if runs_script and words[1:] and not words[1].startswith("-") and not Path(words[1]).is_file():
        raise ValueError(
            f"{where} is {words}, expected a script {words[1]} that is there, seen from where remit is started"
        )


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
    if score.get("engine") == "fake":
        raise ValueError(
            "score.engine is 'fake', expected vllm; the fake engine's numbers are a hash, which training refuses"
        )
    if train.get("objective") == "kd" and score.get("top_k", 0) == 0 and config.rounds:
        raise ValueError("score.top_k is 0, expected at least 1, for instance 32, since train.objective is kd")
    scored, trained = score.get("context", "packed"), train.get("context", "auto")
    if trained not in ("auto", scored) and config.rounds:
        raise ValueError(f"train.context is {trained!r}, expected {scored}, as score.context is, or auto")
