"""A folder of task files: what its tasks depend on, by content, so that a change evaluates them again."""

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml


class Tolerant(yaml.SafeLoader):
    """Leaves out what only the harness understands: `!function module.name`."""


Tolerant.add_multi_constructor("!", lambda loader, suffix, node: None)


def task_folder_fingerprint(folder: Path) -> str:
    """sha256 over the files of a task folder and the local data files that its tasks name.

    Raises ValueError where two of its files have the same task, of which the harness would take either.
    """
    digest = hashlib.sha256()
    files = sorted(file for file in folder.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    tasks: dict[str, Path] = {}
    data: set[str] = set()
    for file in files:
        digest.update(f"{file.relative_to(folder)} {_sha256(file)}\n".encode())
        values = _parsed(file)
        name = values.get("task", values.get("group"))
        if isinstance(name, str) and file.suffix == ".yaml":
            if name in tasks:
                raise ValueError(f"--task-dir {folder}: {tasks[name]} and {file} are both {name!r}; rename one of them")
            tasks[name] = file
        data |= set(_strings([values.get("dataset_path"), values.get("dataset_kwargs")]))
    for entry in sorted(data):
        for path in _local_files(entry):
            digest.update(f"{path} {_sha256(path)}\n".encode())
    return digest.hexdigest()


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _parsed(file: Path) -> dict[str, Any]:
    """The mapping in a task file, or in what other task files include; empty for anything else."""
    if "yaml" not in file.name:
        return {}
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Tolerant)
    except (ValueError, yaml.YAMLError):  # the harness says what is wrong with it
        return {}
    return values if isinstance(values, dict) else {}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)


def _local_files(entry: str) -> list[Path]:
    """What `datasets` reads for a path, folder or pattern, from the folder that the command runs in."""
    if "://" in entry:
        return []
    found = [Path(match) for match in sorted(glob.glob(entry, recursive=True))]
    inside = [file for path in found if path.is_dir() for file in sorted(path.rglob("*"))]
    return [path for path in [*found, *inside] if path.is_file()]
