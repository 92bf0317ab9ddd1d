"""The options of a stage that a YAML file gives: checked by the stage's own settings, turned into its command line."""

import contextlib
import io
import re
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import tyro

from pipelines.terminal import BadUsage
from pipelines.flywheel.stage import Input, Unkeyed, Word
from trainer.objectives.settings import OPTIONS

LOOP = "the loop decides it"


@dataclass(frozen=True)
class Section:
    """How options become a command.

    module, words: what is run; settings: module and name of its dataclass; decided: options that are not the section's
    to give, with who gives them; files: options that name something that is read; unkeyed: options that change how fast
    or safely a stage runs, or what it logs, and not its result.
    """

    title: str
    module: str
    words: tuple[str, ...]
    settings: str
    decided: Mapping[str, str]
    files: tuple[str, ...] = ()
    unkeyed: tuple[str, ...] = ()
    fields: tuple[str, ...] = field(default=())
    """Of the examples in `data`, which are checked beforehand."""

    def settings_class(self) -> Any:
        module, _, name = self.settings.partition(":")
        return getattr(import_module(module), name)

    def options(self) -> list[str]:
        """Names of the options that may be given."""
        return [entry.name for entry in fields(self.settings_class()) if entry.name not in self.decided]


def _posttrain(kind: str, *examples: str) -> Section:
    return Section(
        f"python -P -m pipelines.posttrain {kind}",
        "pipelines.posttrain",
        (kind,),
        f"pipelines.posttrain.settings:{kind.capitalize()}Config",
        {"model": LOOP, "out": LOOP, "debug": LOOP, "seed": "give seed at the top"},
        files=("data",),
        unkeyed=("checkpoint_every", "micro_batch_size", "gradient_checkpointing"),
        fields=examples,
    )


CLI = "pipelines.cli"
SECTIONS = {
    "pack": Section(
        "remit pack", CLI, ("pack",), "scorer.config:PackConfig",
        {"corpus": "give corpus at the top", "tokenizer": "give tokenizer at the top", "out": LOOP,
         "seq_len": "give seq_len at the top", "debug": LOOP},
        unkeyed=("num_workers", "grace_seconds"),
    ),
    "score": Section(
        "remit score", CLI, ("score",), "scorer.config:ScoreConfig",
        {"shards": LOOP, "model": LOOP, "out": LOOP, "name": LOOP, "debug": LOOP},
        unkeyed=("num_engines", "max_num_batched_tokens", "progress_timeout_seconds", "grace_seconds"),
    ),
    "train": Section(
        "remit train", CLI, ("train",), "trainer.config:TrainConfig",
        {"shards": LOOP, "model": LOOP, "out": LOOP, "reference": LOOP, "debug": LOOP, "seed": "give seed at the top"},
        files=("eval_shards",),
        unkeyed=("checkpoint_every", "keep_checkpoints", "timeout_seconds", "ray_workers", "wandb_project",
                 "micro_batch_size", "sharding", "activation_checkpointing", "compile", "deterministic"),
    ),
    "evaluate": Section(
        "remit eval", CLI, ("eval",), "pipelines.evaluation.settings:EvalConfig",
        {"model": LOOP, "out": LOOP, "compare": "use remit eval --compare afterwards", "debug": LOOP},
        files=("task_dir",),
    ),
    "sft": _posttrain("sft", "prompt", "completion"),
    "dpo": _posttrain("dpo", "prompt", "chosen", "rejected"),
    "rl": _posttrain("rl", "prompt"),
}  # fmt: skip


def words(section: str, options: Mapping[str, Any], inputs: dict[str, Any] | None = None) -> list[Word]:
    """Options as a command line. inputs: gets the files that they name, whose words become Input; None: plain words."""
    known, hints = SECTIONS[section], get_type_hints(SECTIONS[section].settings_class())
    line: list[Word] = []
    for name, value in options.items():
        if value is None:
            continue
        option, kind = "--" + name.replace("_", "-"), hints[name]
        entries: list[Word]
        if kind is bool and isinstance(value, bool):
            entries = [option if value else f"--no-{option[2:]}"]
        elif inputs is not None and name in known.files:
            inputs[name] = Path(value).absolute()
            entries = [option, Input(name)]
        else:
            if isinstance(value, bool) and get_origin(kind) is Literal and "on" in get_args(kind):
                value = "on" if value else "off"  # which YAML takes for true and false
            entries = [option, *map(str, value if isinstance(value, list) else [value])]
        unkeyed = inputs is not None and is_unkeyed(section, name, options)
        line += [Unkeyed(word) if unkeyed and isinstance(word, str) else word for word in entries]
    return line


def is_unkeyed(section: str, name: str, options: Mapping[str, Any]) -> bool:
    """Whether an option may change without a repetition."""
    if name == "micro_batch_size" and options.get("objective") == "rho1" and options.get("scope") == "micro":
        return False  # there it decides which tokens are ranked together
    return name in SECTIONS[section].unkeyed


def without_objective(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of remit train for next-token prediction: those of the other objectives left out."""
    theirs = {"objective", *(name for names in OPTIONS.values() for name in names)}
    return {name: value for name, value in options.items() if name not in theirs}


def check_options(file: str, where: str, section: str, options: Mapping[str, Any], beside: Mapping[str, Any]) -> None:
    """BadUsage unless the stage would take these options, and the files that they name are there.

    beside: options that stand elsewhere in the file.
    """
    known = SECTIONS[section]
    for name in options:
        if name in known.decided:
            raise BadUsage(f"{file}: {where}.{name} cannot be given here: {known.decided[name]}")
        value = options[name]
        if isinstance(value, dict) or (isinstance(value, list) and any(isinstance(e, list | dict) for e in value)):
            raise BadUsage(f"{file}: {where}.{name} is {value!r}, expected a plain value")
    settings = known.settings_class()
    for entry in fields(settings):
        needed = entry.default is MISSING and entry.default_factory is MISSING
        if needed and entry.name not in known.decided and options.get(entry.name) is None:
            raise BadUsage(f"{file}: {where}.{entry.name} is missing; {known.title} needs it")
    for name in known.files:
        value = options.get(name)
        if value is not None and not (isinstance(value, str) and Path(value).exists()):
            raise BadUsage(f"{file}: {where}.{name} is {value!r}, expected a file or folder that is there")
    complaint = refusal(section, {**options, **beside})
    if not complaint:
        _check_examples(file, where, section, options)
        return
    for name, value in options.items():  # which of them is it?
        needed_too = {other: options[other] for other in options if _is_needed(settings, other)}
        alone = refusal(section, {**needed_too, name: value, **beside})
        if alone:
            expected = re.search(rf"--{name.replace('_', '-')} ((?!is )\S+)", alone.partition("Argument helptext")[2])
            if expected:  # the parser's word for the kind of value, such as INT
                raise BadUsage(f"{file}: {where}.{name} is {value!r}, expected {expected[1].removeprefix('{None}|')}")
            raise BadUsage(f"{file}: {where}.{name} is {value!r}: {alone}")
    raise BadUsage(f"{file}: {where}: {complaint.partition('Argument helptext')[0].strip()}")


def _is_needed(settings: Any, name: str) -> bool:
    entry = settings.__dataclass_fields__[name]
    return entry.default is MISSING and entry.default_factory is MISSING


def refusal(section: str, options: Mapping[str, Any]) -> str:
    """What the stage's own parser says against options, in one line; '' where it takes them."""
    settings, decided = SECTIONS[section].settings_class(), SECTIONS[section].decided
    line = [str(word) for word in words(section, options)]
    for name in decided:
        if _is_needed(settings, name):
            line += ["--" + name.replace("_", "-"), "x"]
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            tyro.cli(settings, args=line, prog="stage", use_underscores=False)
    except ValueError as error:
        return str(error)
    except SystemExit:
        return " ".join(" ".join(_lines(said.getvalue())).split()).removeprefix(f"{settings.__name__}: ")
    return ""


def _lines(text: str) -> Iterator[str]:
    """Lines of a message of tyro, without its title, rules and hints."""
    for number, line in enumerate(line.strip(" │╭╮╰╯─") for line in text.splitlines()):
        if line.startswith("For full helptext"):
            return
        if number and line and set(line) != {"-"}:
            yield line.removeprefix("Error parsing ")


def _check_examples(file: str, where: str, section: str, options: Mapping[str, Any]) -> None:
    """Read the data of post-training now, and not after days of mid-training."""
    needed = SECTIONS[section].fields
    if not needed:
        return
    from pipelines.posttrain.data import read_examples

    if section == "rl" and options.get("reward", "answer") == "answer":
        needed = (*needed, "answer")
    try:
        read_examples(Path(options["data"]), needed)
    except ValueError as error:
        raise BadUsage(f"{file}: {where}: {error}") from None
