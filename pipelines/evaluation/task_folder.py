"""A folder of task files: what its tasks depend on, by content, so that a change evaluates them again.

Without the harness: the machine that drives a flywheel need not have it.
"""

import glob
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from shards.part import sha256_file

IGNORED = {"__pycache__", ".ipynb_checkpoints"}  # by the harness, too


class Tolerant(yaml.SafeLoader):
    """Leaves out what only the harness understands: `!function module.name`."""


Tolerant.add_multi_constructor("!", lambda loader, suffix, node: None)


def task_folder_fingerprint(folder: Path) -> str:
    """sha256 over the files of a task folder and the local data files that its tasks name.

    Raises ValueError where two of its files have one name for a task or group: the harness would take the first.
    """
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not IGNORED & set(file.parts))
    parsed = {file: _parsed(file) for file in files if "yaml" in file.name}
    named: dict[str, Path] = {}
    for file, values in parsed.items():
        name = values.get("group" if "group" in values and "class" not in values else "task")
        if isinstance(name, str) and file.suffix == ".yaml" and named.setdefault(name, file) != file:
            raise ValueError(f"--task-dir {folder}: {named[name]} and {file} are both {name!r}; rename one of them")
    data = {path for values in parsed.values() for path in _data_files(values)}
    lines = [f"{file.relative_to(folder)} {sha256_file(file)}\n" for file in files]
    lines += [f"{path} {sha256_file(path)}\n" for path in sorted(data)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _parsed(file: Path) -> dict[str, Any]:
    """The mapping in a task file; empty for anything else."""
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), Tolerant)
    except (ValueError, yaml.YAMLError):  # the harness says what is wrong with it
        return {}
    return values if isinstance(values, dict) else {}


def _data_files(values: dict[str, Any]) -> Iterator[Path]:
    """What `datasets` reads for the paths, folders and patterns in a task file, from the folder that the command runs in."""
    for text in _strings([values.get("dataset_path"), values.get("dataset_kwargs")]):
        found = [Path(match) for match in glob.glob(text, recursive=True)]
        inside = [file for path in found for file in path.rglob("*")]
        yield from (path for path in [*found, *inside] if path.is_file())


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from _strings(entry)
