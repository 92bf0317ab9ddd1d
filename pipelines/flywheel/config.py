"""Settings of remit flywheel: the options of the command, and the YAML file that describes the loop, checked once."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from pipelines.flywheel.sections import SECTIONS
from pipelines.flywheel.yaml_file import YamlFile
from pipelines.terminal import BadUsage

POSTTRAIN = ("sft", "dpo", "rl", "command")
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


def read_config(path: Path, out: Path | None = None) -> FlywheelConfig:
    """The loop that a YAML file describes. out: takes the place of the file's. BadUsage for anything wrong in it."""
    from pydantic import Field

    file = YamlFile(path)
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


def check_together(file: YamlFile, found: Mapping[str, Any]) -> None:
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


def read_launch(file: YamlFile, value: Any) -> dict[str, tuple[str, ...]]:
    launch = file.mapping(
        "launch", value, "a mapping such as {train: [torchrun, --standalone, --nproc-per-node, 8, -m]}"
    )
    file.known("launch.", launch, tuple(SECTIONS))
    found = {section: file.texts(f"launch.{section}", words) for section, words in launch.items()}
    for section, words in found.items():
        file.program(f"launch.{section}", words)
    return found


def read_posttrain(file: YamlFile, value: Any) -> tuple[PostTrain, ...]:
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
