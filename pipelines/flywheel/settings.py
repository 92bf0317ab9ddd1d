"""Settings of remit flywheel: the options of the command, and the YAML file that describes the loop, checked once."""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml

from pipelines.terminal import BadUsage
from pipelines.flywheel.sections import SECTIONS, check_options

POSTTRAIN = ("sft", "dpo", "rl", "command")
SCRIPTED = re.compile(r"python[\d.]*|bash|sh")  # programs whose first word, if no option, is a script
RESERVED = ("score", "train", "evaluate-midtrained", "evaluate-posttrained")


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
    jobs: int = 1
    """Stages at once, where they do not depend on each other; each gets its share of the cores."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}, expected at least 1")


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


KEYS = tuple(FlywheelConfig.__dataclass_fields__)


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key that stands twice in one mapping, where plain YAML forgets the first, and that leaves the words
    of commands as they stand, where plain YAML makes 43200 of 12:00:00, 8 of 010 and 1.1 of 1.10."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for index, key in enumerate(keys):
            if key in keys[:index]:
                raise yaml.YAMLError(f"line {node.value[index][0].start_mark.line + 1}: {key!r} stands twice")
        for key, (_, value) in zip(keys, node.value, strict=True):
            if key in ("command", "launch"):
                _keep_words(value)
        return super().construct_mapping(node, deep)


def _keep_words(node: yaml.Node) -> None:
    """Numbers and dates below a node become texts, as they are written."""
    if isinstance(node, yaml.ScalarNode) and node.tag.rsplit(":", 1)[-1] in ("int", "float", "timestamp"):
        node.tag = "tag:yaml.org,2002:str"
    children = node.value if isinstance(node, yaml.SequenceNode | yaml.MappingNode) else []
    for child in children:
        for part in child if isinstance(child, tuple) else (child,):
            _keep_words(part)


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
        raise BadUsage(f"{self.path}: {key} is {value!r}, expected {expected}")

    def known(self, where: str, keys: Any, names: tuple[str, ...], decided: Mapping[str, str] | None = None) -> None:
        """BadUsage for a key that is not in `names`, nor in `decided`, about which more is said later."""
        for key in keys:
            if key not in names and key not in (decided or {}):
                near = get_close_matches(str(key), names, 1)
                hint = f"did you mean {near[0]}?" if near else f"expected one of {', '.join(names)}"
                raise BadUsage(f"{self.path}: {where}{key} is no key; {hint}")

    def text(self, key: str, value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            self.fail(key, value, "a text")
        return value

    def texts(self, key: str, value: Any, least: int = 1) -> tuple[str, ...]:
        """A list of words; a single one may stand without brackets. Numbers are words too."""
        entries = value if isinstance(value, list) else [value]
        for number, entry in enumerate(entries, 1):
            if isinstance(entry, bool) or not isinstance(entry, str | int | float) or not str(entry).strip():
                where = (
                    f", of which number {number} is {entry!r}; true, null and the like need quotes"
                    if entries is value
                    else ""
                )
                self.fail(key, value, f"a list of words{where}")
        if len(entries) < least:
            self.fail(key, value, "a list of words")
        return tuple(map(str, entries))

    def whole(self, key: str, value: Any, least: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            self.fail(key, value, f"a whole number from {least} on")
        return value

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
        if not isinstance(value, dict):
            self.fail(key, value, expected)
        return {str(name).replace("-", "_"): entry for name, entry in value.items()}


def read_config(path: Path, out: Path | None = None) -> FlywheelConfig:
    """The loop that a YAML file describes. out: takes the place of the file's. BadUsage for anything wrong in it."""
    file = _File(path)
    values = {key: value for key, value in file.mapping("", file.values, "").items() if value is not None}
    file.known("", values, KEYS)
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
    reference = values.get("reference")
    seq_len = file.whole("seq_len", values.get("seq_len", FlywheelConfig.seq_len), 2)
    found: dict[str, Any] = {"posttrain": read_posttrain(file, values["posttrain"])}
    readers: dict[str, Callable[[str, Any], Any]] = {
        **dict.fromkeys(("base", "tokenizer", "reference"), file.text),
        **dict.fromkeys(("corpus", "heldout"), file.texts),
        "out": lambda key, value: Path(file.text(key, value)),
        "seq_len": lambda key, value: seq_len,
        "rounds": lambda key, value: file.whole(key, value, 0 if reference is None else 1),
        "seed": lambda key, value: file.whole(key, value, 0),
        "pack": lambda key, value: read_section(file, key, key, value, {"seq_len": seq_len}),
        **dict.fromkeys(("score", "train", "evaluate"), lambda key, value: read_section(file, key, key, value)),
        "launch": lambda key, value: read_launch(file, value),
    }
    for key, value in values.items():
        if key != "posttrain":
            found[key] = readers[key](key, value)
    if found.get("train", {}).get("objective") == "ntp":
        file.fail("train.objective", "ntp", "an objective with a reference; round 0 is the one that trains with ntp")
    if "eval_shards" in found.get("train", {}) and "heldout" in found:
        raise BadUsage(f"{path}: heldout and train.eval_shards are both given, expected one of them")
    check_scores_are_of_use(file, found)
    return FlywheelConfig(**found)


def check_scores_are_of_use(file: _File, found: Mapping[str, Any]) -> None:
    """BadUsage where the trainings from round 1 on would refuse what the scorings of this file store."""
    score, train = found.get("score", {}), found.get("train", {})
    if score.get("engine") == "fake":
        file.fail("score.engine", "fake", "vllm; the fake engine's numbers are a hash, which training refuses")
    if found.get("rounds", FlywheelConfig.rounds) == 0:
        return  # nothing is scored
    if train.get("objective") == "kd" and int(score.get("top_k") or 0) == 0:
        file.fail("score.top_k", score.get("top_k", 0), "at least 1, for instance 32, since train.objective is kd")
    scored, trained = score.get("context") or "packed", train.get("context") or "auto"
    if trained not in ("auto", scored):
        file.fail("train.context", trained, f"{scored}, as score.context is, or auto")


def read_section(
    file: _File, where: str, section: str, value: Any, beside: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options of a stage, checked by the stage's own settings together with those `beside` them."""
    options = file.mapping(where, value, f"a mapping of options of {SECTIONS[section].title}")
    file.known(f"{where}.", options, tuple(SECTIONS[section].options()), SECTIONS[section].decided)
    check_options(str(file.path), where, section, options, beside or {})
    return options


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
    for number, entry in enumerate(value, 1):
        where = f"posttrain[{number}]"
        entry = file.mapping(where, entry, "a mapping such as sft: {data: sft.jsonl}")
        kinds = [kind for kind in POSTTRAIN if kind in entry]
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
        inputs = file.texts(f"{where}.inputs", entry.get("inputs") or [], least=0)
        for path in inputs:
            if not Path(path).exists():
                file.fail(f"{where}.inputs", path, "a file or folder that is there")
        if kind == "command":
            command = file.texts(f"{where}.command", entry["command"])
            file.program(f"{where}.command", command)
            stages.append(PostTrain(name, kind, command=command, inputs=inputs))
        else:
            options = read_section(file, f"{where}.{kind}", kind, entry[kind] or {})
            stages.append(PostTrain(name, kind, options, inputs=inputs))
    return tuple(stages)
