"""What a stage is: a command, what it reads, where its result lies; and its key, by which a rerun knows it.

A key is made of content alone: the command without its paths, the settings, and the identity of what it reads. An
earlier stage that was repeated with an equal result therefore repeats nothing that follows from it.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Union

from scorer.formats import text_of_path
from scorer.known import hashes_now, remembered
from scorer.sources import Source
from shards.folder import TOKENIZER, ShardFolder
from shards.manifest import MANIFEST
from shards.part import read_record, record_name

CACHES = ("__pycache__", ".cache", ".git")  # which change when what lies beside them is used


@dataclass(frozen=True)
class At:
    """Stands for a path in a command: the stage's `out`, its `state`, or an input by name; sub: a path under it.

    state: a folder of the stage that outlives a kill, for checkpoints; it is deleted when the stage is done.
    """

    name: str
    sub: str = ""

    def __str__(self) -> str:
        return f"<{self.name}{'/' if self.sub else ''}{self.sub}>"


Word = str | At
Check = Callable[[Path, Mapping[str, Path]], None]
"""Called as check(result, paths of the inputs) once the command has ended well; ValueError refuses the result."""


@dataclass(frozen=True)
class Given:
    """What the user gave a stage to read. path: where it is; identity: of its content now, asked when it is needed."""

    path: str
    identity: Callable[[], str]


def given(path: Path | str) -> Given:
    """A file or folder of the user, all of whose files count; ValueError at once where `identity` would raise it."""
    counted_files(Path(path), all_files=True)
    return Given(os.path.abspath(path), lambda: identity(Path(path), all_files=True))


@dataclass(frozen=True, eq=False)
class Stage:
    """One command of an ordered list. Only what says what is computed enters the key."""

    name: str
    """Unique, like a path: round-1/train."""
    command: tuple[Word, ...]
    inputs: Mapping[str, Union["Stage", Given]] = field(default_factory=dict)
    """What it reads, by name: results of stages before it, and what the user gave."""
    more: tuple[Word, ...] = ()
    """Words after the command that say where or how fast and not what; not in the key."""
    launcher: tuple[str, ...] = ()
    """Words in front of the command that say how it is started; not in the key."""
    environment: Mapping[str, Word] = field(default_factory=dict)
    """Variables on top of those of this process; not in the key."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What decides the result and is not in the command; in the key."""
    seed: int | None = None
    """In the key."""
    result: str = ""
    """Path under the output folder that later stages receive: `model` of a training run."""
    resumes: bool = False
    """True: the same command goes on in a half-written folder, and is the only one that writes there. False: it starts
    with an empty folder, which gets its name once the command has ended well and the result is checked."""
    check: Check | None = None

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.replace("/", "-")

    @property
    def words(self) -> tuple[Word, ...]:
        """All that is run."""
        return (*self.launcher, *self.command, *self.more)


def remit_version() -> str:
    try:
        return version("remit")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def stage_key(stage: Stage, identities: Mapping[str, str]) -> str:
    """sha256 over all that decides the result. identities: of the content of each input, by its name."""
    content = {
        "command": [[word.name, word.sub] if isinstance(word, At) else word for word in stage.command],
        "inputs": dict(identities),
        "remit": remit_version(),
        "result": stage.result,
        "seed": stage.seed,
        "settings": dict(stage.settings),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def digest_of(contents: Mapping[str, str]) -> str:
    """sha256 over names and the sha256 of each content."""
    digest = hashlib.sha256()
    for name in sorted(contents):
        digest.update(json.dumps([name, contents[name]]).encode() + b"\n")
    return digest.hexdigest()


def digest_of_files(name: str, files: Mapping[str, Path]) -> str:
    """sha256 over names and contents of files, which are read again where they were written since.

    name: under which their contents are remembered, in the user's cache.
    """
    sources = [Source(text_of_path(str(file)), str(file)) for file in files.values()]
    hashes = hashes_now(name, sources, remembered(name, sources))
    return digest_of(dict(zip(files, map(str, hashes))))


def identity(path: Path, all_files: bool = False) -> str:
    """sha256 over what a file or folder holds; ValueError where there is nothing, or an unfinished shard folder.

    Of a shard folder the manifest, the tokenizer and the commit records count, which have the sha256 of each part: a
    large folder is not read. Of other folders the names and contents of their files, as `files_of` says.
    """
    # not the bare path, under which remit pack remembers the corpus of a shard folder
    return digest_of_files(f"identity#{os.path.abspath(path)}", counted_files(path, all_files))


def counted_files(path: Path, all_files: bool) -> dict[str, Path]:
    """The files whose names and contents are the identity of a file or folder."""
    return shard_files(path) if (path / MANIFEST).is_file() else files_of(path, all_files)


def shard_files(path: Path) -> dict[str, Path]:
    """The small files of a shard folder that say what all of it holds; ValueError unless its parts have their sizes."""
    folder = ShardFolder(path)
    folder.require_complete()
    names = [MANIFEST, *(f"{TOKENIZER}/{name}" for name in folder.store.names(TOKENIZER))]
    for plan in folder.manifest.parts:
        record = read_record(folder.store, plan.name)
        part = path / plan.name
        if record is None or not part.is_file() or part.stat().st_size != record.size:
            raise ValueError(f"{part}: is not what its commit record says; run remit verify --repair")
        names.append(record_name(plan.name))
    return {name: path / name for name in names}


def files_of(path: Path, all_files: bool = False) -> dict[str, Path]:
    """The files that count of a file ('') or folder, by relative path, links followed.

    all_files: every one outside of caches; else those whose names, and whose folders' names, do not begin with _ or a
    dot. ValueError where there is none, or something that is no file; OSError where a folder cannot be listed.
    """
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        raise ValueError(f"{path}: {'is a pipe or a device' if path.exists() else 'does not exist'}, expected files")
    found = dict(sorted((str(file.relative_to(path)), file) for file in walk(path, all_files, set())))
    if not found:
        which = "" if all_files else " whose names do not begin with _ or a dot"
        raise ValueError(f"{path}: is empty, expected files{which}")
    return found


def walk(folder: Path, all_files: bool, above: set[Path]) -> Iterator[Path]:
    """The files that count under a folder. above: the real paths of the folders that it was reached through."""
    real = folder.resolve()
    if real in above:  # a link to a folder above would be walked for ever
        return
    for path in folder.iterdir():
        if path.name in CACHES if all_files else path.name.startswith(("_", ".")):
            continue
        if path.is_dir():
            yield from walk(path, all_files, above | {real})
        elif path.is_file():
            yield path
        else:  # a pipe would be read for ever
            what = "is a pipe or a device" if path.exists() else "is a link that leads nowhere"
            raise ValueError(f"{path}: {what}, expected a file")


def change_of(result: Path, was: str) -> str:
    """How a result is no longer what it was, '' where it is. was: its identity."""
    try:
        if identity(result) == was:
            return ""
        newest = max(files_of(result).values(), key=lambda file: file.stat().st_mtime_ns)
        return f"files were edited, added or deleted, {newest} is the last that was written"
    except ValueError as error:
        return str(error)
