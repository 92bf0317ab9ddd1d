"""What is pushed as it stands and says where something lay, or why a file was left out: in a manifest, in configs."""

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any

from pipelines.push.files import Files
from shards.manifest import MANIFEST
from shards.store import is_remote

MAX_CHARS = 1000  # of a value; a chat template is longer and names no place
SHOWN, SHOWN_CHARS = 3, 120
_PLACE = re.compile(r"(?<![\w/.:~-])(?:~?/[\w.+@-]+/[\w.+@/-]+|(?!https?:|hf:)[a-z][a-z0-9+.-]*://[^\s'\"]+)")


def reveals(text: str) -> bool:
    """Whether a text names an absolute path or a place in an object store."""
    return bool(_PLACE.search(text))


def without_place(value: str) -> str:
    """Of a path or a URL that is not the hub's the last name, since the others are of the owner's machines; else the value."""
    is_place = value.startswith(("/", "~", ".")) or (is_remote(value) and not value.startswith("hf://"))
    return re.sub(r"^.*/(?=[^/])", "", value) if is_place or value.startswith("file://") else value


def revealing(files: Files) -> list[str]:
    """Of the manifest and the configs among `files` each value that names a place, or says why a file was left out."""
    found = []
    for file in files.all:
        name = PurePosixPath(file.name).name
        if file.git_oid is None or not (name == MANIFEST or ("config" in name and name.endswith(".json"))):
            continue
        try:
            value = json.loads(files.store.read(file.name))
        except (ValueError, RecursionError):
            continue  # of a tokenizer; it is not ours to judge
        found += [
            f"{file.name}: {key} is {text[:SHOWN_CHARS]!r}"
            for key, text in _texts(value, "")
            if key.endswith(".left_out") or (len(text) <= MAX_CHARS and reveals(text))
        ]
    return found


def told(found: list[str]) -> str:
    """A line about what `revealing` found."""
    more = f"; and {len(found) - SHOWN:,} more" if len(found) > SHOWN else ""
    return f"pushed as it stands: {'; '.join(found[:SHOWN])}{more}. See whether others may read this"


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """Each text in a JSON value, with the way to it."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, entry in value.items():
            yield from _texts(entry, f"{key}.{name}" if key else name)
    elif isinstance(value, list):
        for place, entry in enumerate(value):
            yield from _texts(entry, f"{key}[{place}]")
