"""What a file or folder is, by content: its files with their sizes and sha256, and one fingerprint over them.

Of a shard folder the manifest, the tokenizer and the parts with their commit records count; the sha256 of a part is
taken from its record, so that a large folder is not read again. Of a corpus and of a result all files count whose
names, and whose folders' names, do not begin with _ or a dot; of other folders of the user those that `Counting` says.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pipelines.evaluation.task_folder import task_folder_fingerprint
from shards.folder import TOKENIZER, ShardFolder
from shards.manifest import MANIFEST
from shards.part import read_record, record_name, sha256_file


@dataclass(frozen=True)
class FileState:
    """What a file was: bytes, time of its last change, sha256 of its content."""

    size: int
    mtime_ns: int
    sha256: str


Files = dict[str, FileState]
"""By path relative to the folder, '' for a single file."""


class Known:
    """Hashes of files that have been read before, by path, size, time and inode: an unchanged file is read once."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._changed = False
        try:
            self._entries: dict[str, list[Any]] = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            self._entries = {}  # nothing is lost but time

    def state(self, path: Path) -> FileState:
        status = path.stat()
        where = [status.st_size, status.st_mtime_ns, status.st_ino]
        entry = self._entries.get(str(path))
        if entry is None or entry[:3] != where:
            entry = [*where, sha256_file(path)]
            self._entries[str(path)] = entry
            self._changed = True
        return FileState(status.st_size, status.st_mtime_ns, entry[3])

    def save(self) -> None:
        if self._changed:
            temporary = self._file.with_name(f".{self._file.name}.tmp")
            temporary.write_text(json.dumps(self._entries), encoding="utf-8")
            os.replace(temporary, self._file)
            self._changed = False


Counting = Literal["data", "all", "model", "tasks", "python"]
"""Which files of a folder count. data: those that do not begin with _ or a dot, and so those that readers of a corpus
see; all: every file; model: every file outside the hub's .cache and .git; tasks: those that task files name as well;
python: *.py. __pycache__ counts only as data, since running what lies beside it changes it."""


def is_shard_folder(path: Path) -> bool:
    return (path / MANIFEST).is_file()


def _counts(name: str, is_folder: bool, counting: Counting) -> bool:
    if counting == "data":
        return not name.startswith(("_", "."))
    if is_folder:
        return name not in (("__pycache__", ".cache", ".git") if counting == "model" else ("__pycache__",))
    return counting != "python" or name.endswith(".py")


def counted_files(folder: Path, counting: Counting = "data") -> Iterator[str]:
    """Relative paths of the files of a folder that count, links followed, sorted."""
    seen: set[str] = set()
    found = []
    for where, folders, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(where)
        if real in seen:  # a link to a folder above
            folders.clear()
            continue
        seen.add(real)
        folders[:] = [name for name in folders if _counts(name, True, counting)]
        found += [
            os.path.relpath(os.path.join(where, name), folder) for name in files if _counts(name, False, counting)
        ]
    yield from sorted(found)


def read_files(path: Path, known: Known | None = None, counting: Counting = "data") -> Files:
    """All files that count of a file or folder; ValueError where there is nothing, or an unfinished shard folder."""

    def state(file: Path) -> FileState:
        if file.exists() and not file.is_file():
            raise ValueError(f"{file}: is a pipe or a device, expected files")  # which would be read for ever
        if known is not None:
            return known.state(file)
        status = file.stat()
        return FileState(status.st_size, status.st_mtime_ns, sha256_file(file))

    if path.is_file():
        return {"": state(path)}
    if not path.is_dir():
        raise ValueError(f"{path}: does not exist, expected a file or a folder")
    if is_shard_folder(path):
        return _shard_files(path, state)
    files = {name: state(path / name) for name in counted_files(path, counting)}
    if not files:
        of = {"data": "files whose names do not begin with _ or a dot", "python": "*.py files"}.get(counting, "files")
        raise ValueError(f"{path}: is empty, expected {of}")
    return files


def require_own(result: Path) -> None:
    """ValueError where a stage's result is a link, or holds one that leads out of it: what it is would not be in it."""
    inside = os.path.realpath(result)
    for where, folders, files in os.walk(result):
        for path in (Path(where, name) for name in (*folders, *files)):
            target = os.path.realpath(path)
            if path.is_symlink() and os.path.commonpath([inside, target]) != inside:
                raise ValueError(f"{path}: is a link to {target}, expected a copy of what it leads to")
    if result.is_symlink():
        raise ValueError(f"{result}: is a link to {inside}, expected a folder with copies of what is there")


def _shard_files(path: Path, state: Any) -> Files:
    folder = ShardFolder(path)
    folder.require_complete()
    names = [MANIFEST, *(f"{TOKENIZER}/{name}" for name in folder.store.names(TOKENIZER))]
    files = {name: state(path / name) for name in names}
    for plan in folder.manifest.parts:
        record = read_record(folder.store, plan.name)
        try:
            status = (path / plan.name).stat()
        except FileNotFoundError:
            status = None
        if record is None or status is None or status.st_size != record.size:
            raise ValueError(f"{path / plan.name}: is not what its commit record says; run remit verify --repair")
        files[record_name(plan.name)] = state(path / record_name(plan.name))
        files[plan.name] = FileState(record.size, status.st_mtime_ns, record.sha256)
    return files


def fingerprint(files: Files) -> str:
    """sha256 over names and contents."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(json.dumps([name, files[name].sha256]).encode() + b"\n")
    return digest.hexdigest()


def input_fingerprint(path: Path, counting: Counting, known: Known) -> str:
    """sha256 over what counts of a file or folder of the user; ValueError as read_files."""
    if counting == "tasks" and path.is_dir():
        return task_folder_fingerprint(path)
    return fingerprint(read_files(path, known, counting))


def first_change(path: Path, files: Files) -> str:
    """What is no longer as `files` says, '' where all is. A file with another time is read, the others are not."""
    if not path.exists():
        return f"{path} is gone"
    for name, before in files.items():
        file = path / name if name else path
        try:
            status = file.stat()
        except OSError:
            return f"{file} is gone"
        if status.st_size != before.size:
            return f"{file} has {status.st_size:,} bytes, had {before.size:,}"
        if status.st_mtime_ns != before.mtime_ns and sha256_file(file) != before.sha256:
            return f"{file} has other content"
    if "" not in files and not is_shard_folder(path):
        for name in counted_files(path):
            if name not in files:
                return f"{path / name} is new"
    return ""


def to_json(files: Files) -> dict[str, dict[str, Any]]:
    return {name: asdict(state) for name, state in files.items()}


def from_json(value: dict[str, dict[str, Any]]) -> Files:
    return {name: FileState(**state) for name, state in value.items()}
