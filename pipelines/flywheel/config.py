"""Settings of remit flywheel: the options of the command, and the YAML file that describes the loop, checked once.

The options of a stage are checked by the stage's own settings: each value by its type, all of them by __post_init__.
"""

import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import yaml

from pipelines.console import BadUsage
from pipelines.flywheel.sections import SECTIONS

POSTTRAIN = ("sft", "dpo", "rl", "command")
EXAMPLES = {"sft": ("prompt", "completion"), "dpo": ("prompt", "chosen", "rejected"), "rl": ("prompt",)}
SCRIPTED = re.compile(r"python[\d.]*|bash|sh")  # programs whose first word, if no option, is a script
RESERVED = ("score", "train", "evaluate-midtrained", "evaluate-posttrained")
NOWHERE = f"{os.devnull}/none"  # stands for a path that the loop decides


@dataclass(frozen=True)
class FlywheelOptions:
    """Run the loop of a YAML file: mid-train, post-train, score with the result, mid-train the base again with ReMiT.

    Stages whose result is there already, made of the same, are left alone; so the same command goes on after a kill, and
    after a change of the file it repeats what depends on the change.
    """

    config: Path
    """YAML file with the loop: base, corpus, posttrain and so on; the documentation has an example and all keys."""
    out: Path | None = None
    """Folder for all stages; default: the file's `out`."""
    dry_run: bool = False
    """Only show which stages are done and which would run, with their commands; nothing is written."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""


@dataclass(frozen=True)
class PostTrain:
    """One stage of post-training. kind: sft, dpo, rl with `options`, or command with `command`; `inputs` of the latter
    two: files and folders that they read beyond what their options and words name."""

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


@dataclass(frozen=True)
class FlywheelConfig:
    """The loop, as the YAML file describes it. Every field is a key of the file."""

    base: str
    """Base model that every round's mid-training starts from: a Hugging Face folder, or NAME or NAME@REVISION of the hub."""
    corpus: tuple[str, ...]
    """Mid-training corpus, as --corpus of remit pack takes it."""
    out: Path
    """Folder for all stages."""
    posttrain: tuple[PostTrain, ...]
    """Stages of post-training, each from the model of the one before."""
    tokenizer: str | None = None
    """Folder of the tokenizer, or NAME or NAME@REVISION of the hub; default: the base's."""
    seq_len: int = 4096
    """Tokens per row."""
    rounds: int = 1
    """ReMiT rounds; round 0, plain next-token prediction, comes before them unless `reference` is given."""
    reference: str | None = None
    """Post-trained model that exists already: it scores for round 1, and round 0 is left out."""
    heldout: tuple[str, ...] = ()
    """Held-out documents, as --corpus takes them: packed, and given to every training as --eval-shards."""
    seed: int = 0
    """Seed of every stage that has one."""
    pack: Mapping[str, Any] = field(default_factory=dict)
    """Options of remit pack."""
    score: Mapping[str, Any] = field(default_factory=dict)
    """Options of remit score."""
    train: Mapping[str, Any] = field(default_factory=dict)
    """Options of remit train; round 0 takes those that are not of an objective."""
    launch: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Words that start a Python module in place of `python -m`, by section: {train: [torchrun, ..., -m]}."""
    evaluate: Mapping[str, Any] | None = None
    """Options of remit eval for the mid-trained and the post-trained model of each round; default: no evaluation."""


class _Loader(yaml.SafeLoader):
    """YAML whose values stay the texts that they are, where plain YAML makes 43200 of 12:00:00, 8 of 010 and False of off;
    null alone is None. A key that stands twice in one mapping is refused, where plain YAML forgets the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.YAMLError(f"line {node.value[index][0].start_mark.line + 1}: {key!r} stands twice")
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, shape) for tag, shape in resolvers if tag.endswith((":null", ":merge"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


class _File:
    """The content of the file, with messages that name file and key."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise BadUsage(f"--config {path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(self.values, dict):
            raise BadUsage(f"--config {path}: expected a mapping of keys to values, for instance base: path/to/model")

    def fail(self, key: str, value: Any, expected: str) -> NoReturn:
        is_number = isinstance(value, str) and re.fullmatch(r"[-+]?\.?\d[\w.+-]*", value)
        shown = value if is_number else repr(value)  # numbers are texts here
        raise BadUsage(f"{self.path}: {key} is {shown}, expected {expected}")

    def known(self, where: str, keys: Any, names: tuple[str, ...]) -> None:
        """BadUsage for a key that is not in `names`."""
        for key in keys:
            if key not in names:
                near = get_close_matches(str(key), names, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
                raise BadUsage(f"{self.path}: {where}{key} is no key; {hint}")

    def typed(self, key: str, value: Any, kind: Any) -> Any:
        """The value as `kind`, a type of Python."""
        from pydantic import TypeAdapter, ValidationError

        choices = get_args(kind) if get_origin(kind) is Literal else ()
        if "on" in choices and str(value).lower() in ("true", "yes", "false", "no"):
            value = "on" if value.lower() in ("true", "yes") else "off"  # which YAML takes for the same
        if value in (".inf", "+.inf"):  # as YAML spells it
            value = "inf"
        try:
            return TypeAdapter(kind).validate_python(value)
        except ValidationError as error:
            expected = error.errors()[0]["msg"].removeprefix("Input should be ").partition(", unable to")[0]
            self.fail(key, value, expected)

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(key, value, "a text")
        return value

    def texts(self, key: str, value: Any, least: int = 1) -> tuple[str, ...]:
        """A list of words; a single one may stand without brackets."""
        entries = value if isinstance(value, list) else [value]
        for number, entry in enumerate(entries, 1):
            if not isinstance(entry, str) or not entry.strip():
                which = f", of which number {number} is {entry!r}; null needs quotes" if entries is value else ""
                self.fail(key, value, f"a list of words{which}")
        if len(entries) < least:
            self.fail(key, value, "a list of words")
        return tuple(entries)

    def there(self, key: str, path: Any) -> None:
        if not Path(path).exists():
            self.fail(key, str(path), "a file or folder that is there")

    def program(self, key: str, words: tuple[str, ...]) -> None:
        """BadUsage unless a command can be started, and its script is there where its program runs one."""
        if shutil.which(words[0]) is None:
            if len(words) == 1 and len(words[0].split()) > 1:
                self.fail(key, words[0], f"a list of words, here [{', '.join(words[0].split())}]")
            self.fail(key, words[0], "a program that can be started; a script needs bash or python in front of it")
        script = words[1] if len(words) > 1 and SCRIPTED.fullmatch(Path(words[0]).name) else "-"
        if not script.startswith("-") and not Path(script).is_file():
            self.fail(key, script, "a script that is there, seen from where remit is started")

    def mapping(self, key: str, value: Any, expected: str) -> dict[str, Any]:
        """Its keys with _ for -; what is null is left out."""
        if not isinstance(value, dict):
            self.fail(key, value, expected)
        return {str(name).replace("-", "_"): entry for name, entry in value.items() if entry is not None}

    def section(self, where: str, section: str, value: Any, **beside: Any) -> dict[str, Any]:
        """The options of a stage, as its own settings take them together with those `beside` them in the file."""
        known = SECTIONS[section]
        settings, hints = known.settings_class(), get_type_hints(known.settings_class())
        entries = self.mapping(where, value, f"a mapping of options of {known.title}")
        for name, why in known.decided.items():
            if name in entries:
                raise BadUsage(f"{self.path}: {where}.{name} cannot be given here: {why}")
        self.known(f"{where}.", entries, tuple(known.options()))
        options = {name: self.typed(f"{where}.{name}", entry, hints[name]) for name, entry in entries.items()}
        for name in known.files:
            if options.get(name) is not None:
                self.there(f"{where}.{name}", options[name])
        for entry in fields(settings):
            if (
                entry.default is MISSING
                and entry.default_factory is MISSING
                and entry.name not in {**options, **beside}
            ):
                if entry.name not in known.decided:
                    raise BadUsage(f"{self.path}: {where}.{entry.name} is missing; {known.title} needs it")
                beside[entry.name] = self.typed(
                    where, [NOWHERE] if entry.name == "corpus" else NOWHERE, hints[entry.name]
                )
        try:
            settings(**options, **beside)
            _read_examples(section, options)
        except ValueError as error:
            raise BadUsage(f"{self.path}: {where}: {error}") from None
        return options


def _read_examples(section: str, options: Mapping[str, Any]) -> None:
    """Read the data of post-training now, and not after days of mid-training."""
    if section in EXAMPLES:
        from pipelines.posttrain.data import read_examples

        answer = ("answer",) if section == "rl" and options.get("reward", "answer") == "answer" else ()
        read_examples(Path(options["data"]), (*EXAMPLES[section], *answer))


def read_config(path: Path, out: Path | None = None) -> FlywheelConfig:
    """The loop that a YAML file describes. out: takes the place of the file's. BadUsage for anything wrong in it."""
    from pydantic import Field

    file = _File(path)
    values = file.mapping("", file.values, "")
    file.known("", values, tuple(FlywheelConfig.__dataclass_fields__))
    if out is not None:
        values["out"] = str(out)
    for key in ("base", "corpus", "out"):
        if key not in values:
            raise BadUsage(f"{path}: {key} is missing; it needs base, corpus, out and posttrain")
    if "posttrain" not in values:
        raise BadUsage(
            f"{path}: posttrain is missing, expected a list such as [rl: {{data: prompts.jsonl}}]; [] scores with the "
            "mid-trained model itself"
        )
    found: dict[str, Any] = {}
    for key in ("base", "tokenizer", "reference", "out"):
        if key in values:
            found[key] = file.text(key, values[key])
    for key, least in (("seq_len", 2), ("rounds", 1 if "reference" in found else 0), ("seed", 0)):
        if key in values:
            found[key] = file.typed(key, values[key], Annotated[int, Field(ge=least)])
    for key in ("corpus", "heldout"):
        if key in values:
            found[key] = file.texts(key, values[key])
    for key in ("pack", "score", "train", "evaluate"):
        if key in values:
            beside = {"seq_len": found.get("seq_len", FlywheelConfig.seq_len)} if key == "pack" else {}
            found[key] = file.section(key, key, values[key], **beside)
    if "launch" in values:
        found["launch"] = read_launch(file, values["launch"])
    posttrain = read_posttrain(file, values["posttrain"])
    check_together(file, found)
    return FlywheelConfig(**(found | {"out": Path(found["out"]), "posttrain": posttrain}))


def check_together(file: _File, found: Mapping[str, Any]) -> None:
    """BadUsage where sections do not fit: above all where trainings would refuse what the scorings of this file store."""
    score, train = found.get("score", {}), found.get("train", {})
    if train.get("objective") == "ntp":
        file.fail("train.objective", "ntp", "an objective with a reference; round 0 is the one that trains with ntp")
    if "eval_shards" in train and "heldout" in found:
        raise BadUsage(f"{file.path}: heldout and train.eval_shards are both given, expected one of them")
    if score.get("engine") == "fake":
        file.fail("score.engine", "fake", "vllm; the fake engine's numbers are a hash, which training refuses")
    if found.get("rounds", FlywheelConfig.rounds) == 0:
        return  # nothing is scored
    if train.get("objective") == "kd" and score.get("top_k", 0) == 0:
        file.fail("score.top_k", score.get("top_k", 0), "at least 1, for instance 32, since train.objective is kd")
    scored, trained = score.get("context", "packed"), train.get("context", "auto")
    if trained not in ("auto", scored):
        file.fail("train.context", trained, f"{scored}, as score.context is, or auto")


def read_launch(file: _File, value: Any) -> dict[str, tuple[str, ...]]:
    launch = file.mapping(
        "launch", value, "a mapping such as {train: [torchrun, --standalone, --nproc-per-node, 8, -m]}"
    )
    file.known("launch.", launch, tuple(SECTIONS))
    found = {section: file.texts(f"launch.{section}", words) for section, words in launch.items()}
    for section, words in found.items():
        file.program(f"launch.{section}", words)
    return found


def read_posttrain(file: _File, value: Any) -> tuple[PostTrain, ...]:
    if not isinstance(value, list):
        file.fail("posttrain", value, "a list such as [sft: {data: sft.jsonl}, rl: {data: prompts.jsonl}]")
    stages: list[PostTrain] = []
    for number, raw in enumerate(value, 1):
        where = f"posttrain[{number}]"
        entry = file.mapping(where, raw, "a mapping such as sft: {data: sft.jsonl}")
        kinds = [kind for kind in POSTTRAIN if kind in (raw if isinstance(raw, dict) else ())]
        if len(kinds) != 1:
            file.known(f"{where}.", entry, (*POSTTRAIN, "name", "inputs"))
            file.fail(where, entry, f"exactly one of {', '.join(POSTTRAIN)}")
        kind = kinds[0]
        file.known(f"{where}.", entry, (kind, "name", *(["inputs"] if kind in ("command", "rl") else [])))
        name = file.text(f"{where}.name", entry.get("name", kind))
        if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii() or name in RESERVED:
            file.fail(f"{where}.name", name, f"letters, digits, - and _, and not one of {', '.join(RESERVED)}")
        if name in [stage.name for stage in stages]:
            file.fail(f"{where}.name", name, "a name that no other stage of posttrain has")
        inputs = file.texts(f"{where}.inputs", entry.get("inputs", []), least=0)
        for path in inputs:
            file.there(f"{where}.inputs", path)
        if kind == "command":
            command = file.texts(f"{where}.command", raw["command"])
            file.program(f"{where}.command", command)
            stages.append(PostTrain(name, kind, command=command, inputs=inputs))
        else:
            options = file.section(f"{where}.{kind}", kind, entry.get(kind, {}))
            stages.append(PostTrain(name, kind, options, inputs=inputs))
    return tuple(stages)
