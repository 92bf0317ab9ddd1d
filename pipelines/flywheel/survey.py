"""What is done of a graph, and what is not: reads the folder and what the user gave, writes nothing."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.flywheel.fingerprint import Known, input_fingerprint
from pipelines.flywheel.records import KNOWN, Places, Record
from pipelines.flywheel.stage import Pattern, Stage, check_graph, stage_key


@dataclass
class Look:
    """What is known of a stage before it runs. key: None while something that it reads is not done."""

    stage: Stage
    key: str | None = None
    record: Record | None = None
    change: str = ""
    waits_for: list[str] = field(default_factory=list)
    inputs: dict[str, tuple[Path, str]] = field(default_factory=dict)
    """Path and fingerprint of each input's result, by its name."""


def look(stage: Stage, places: Places, done: Mapping[str, Record], known: Known) -> Look:
    """Key and record of a stage as far as they can be known; reads what the user gave, writes nothing."""
    found = Look(stage)
    for name, source in stage.inputs.items():
        if isinstance(source, Path):
            try:
                content = input_fingerprint(source, stage.counting.get(name, "data"), known)
            except ValueError as error:
                raise ValueError(f"stage {stage.name}, input {name}: {error}") from None
            found.inputs[name] = (source.absolute(), content)
        elif source.name in done:
            record = done[source.name]
            found.inputs[name] = (places.result(record), record["fingerprint"])
        else:
            found.waits_for.append(source.name)
    if not found.waits_for:
        found.key = stage_key(stage, {name: value for name, (_, value) in found.inputs.items()})
        found.record = places.read(found.key)
        if found.record is not None:
            found.change = places.change(found.record)
    return found


def changed_input(found: Look, places: Places, done: Mapping[str, Record], known: Known) -> str:
    """Which input of a stage is no longer what the stage began with, '' where all are; for a command that has ended."""
    for name, (path, before) in found.inputs.items():
        source = found.stage.inputs[name]
        if isinstance(source, Stage):
            if change := places.change(done[source.name]):
                return (
                    f"{change}: the result of stage {source.name} was changed while this stage ran, expected it as it was "
                    "(inputs are read only); the same command makes both again"
                )
            continue
        try:
            same = input_fingerprint(source, found.stage.counting.get(name, "data"), known) == before
        except ValueError as error:
            return f"{error}: was changed while the stage ran; put it back, and run the same command"
        if not same:
            return (
                f"{path}: was changed while the stage ran; the same command makes it again. What a command itself writes "
                "is no word of it: that belongs in REMIT_OUTPUT or REMIT_STATE"
            )
    for word in found.stage.command:
        if isinstance(word, Pattern) and Pattern.expand(word.text) != word.files:
            return f"{word.text}: other files match since the stage was planned; the same command makes it again"
    return ""


def survey(stages: Sequence[Stage], folder: Path) -> list[Look]:
    """What `run_stages` would find now. A stage is done where it has a record and no change."""
    check_graph(stages)
    if not any((folder / "records").glob("*.json")):  # nothing is done: no need to read what the user gave
        sources = [[source.name for source in stage.inputs.values() if isinstance(source, Stage)] for stage in stages]
        return [Look(stage, waits_for=names) for stage, names in zip(stages, sources, strict=True)]
    places, known = Places(folder), Known(folder / KNOWN)
    done: dict[str, Record] = {}
    looks = []
    for stage in stages:
        found = look(stage, places, done, known)
        if found.record is not None and not found.change:
            done[stage.name] = found.record
        looks.append(found)
    return looks
