"""What a stage is: a command, what it reads, where its result lies; and its key, by which a rerun knows it.

A key is made of content alone: the command without its paths, the settings, and the identity of what it reads. An
earlier stage that was repeated with an equal result therefore repeats nothing that follows from it.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Union

from shards.folder import TOKENIZER, ShardFolder
from shards.manifest import MANIFEST
from shards.part import read_record, record_name, sha256_file

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
    """A file or folder of the user, all of whose files count."""
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

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*(/[A-Za-z0-9_.-]+)*", self.name):
            raise ValueError(
                f"stage {self.name!r}: expected a name of letters, digits, - _ . and /, for instance round-1/train"
            )
        for word in (*self.command, *self.more, *self.environment.values()):
            if isinstance(word, At) and word.name not in (*self.inputs, "out", "state"):
                raise ValueError(
                    f"stage {self.name}: its command reads {word.name!r}, expected one of its inputs "
                    f"({', '.join(self.inputs) or 'none'})"
                )

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.replace("/", "-")

    @property
    def words(self) -> tuple[Word, ...]:
        """All that is run."""
        return (*self.launcher, *self.command, *self.more)


def check_order(stages: Sequence[Stage]) -> None:
    """ValueError unless names are unique and every stage stands after those that it reads."""
    before: dict[str, Stage] = {}
    for stage in stages:
        if stage.slug in before:
            raise ValueError(
                f"stages {before[stage.slug].name} and {stage.name} have one name, expected different ones"
            )
        for source in stage.inputs.values():
            if isinstance(source, Stage) and before.get(source.slug) is not source:
                raise ValueError(f"stage {stage.name} reads {source.name}, which does not stand before it in the list")
        before[stage.slug] = stage


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


def identity(path: Path, all_files: bool = False) -> str:
    """sha256 over what a file or folder holds; ValueError where there is nothing, or an unfinished shard folder.

    Of a shard folder the manifest, the tokenizer and the commit records count, which have the sha256 of each part: a
    large folder is not read. Of other folders the names and contents of their files, as `files_of` says.
    """
    if (path / MANIFEST).is_file():
        return _shards_identity(path)
    return digest_of({name: sha256_file(file) for name, file in files_of(path, all_files).items()})


def _shards_identity(path: Path) -> str:
    folder = ShardFolder(path)
    folder.require_complete()
    names = [MANIFEST, *(f"{TOKENIZER}/{name}" for name in folder.store.names(TOKENIZER))]
    for plan in folder.manifest.parts:
        record = read_record(folder.store, plan.name)
        part = path / plan.name
        if record is None or not part.is_file() or part.stat().st_size != record.size:
            raise ValueError(f"{part}: is not what its commit record says; run remit verify --repair")
        names.append(record_name(plan.name))
    return digest_of({name: sha256_file(path / name) for name in names})


def files_of(path: Path, all_files: bool = False) -> dict[str, Path]:
    """The files that count of a file ('') or folder, by relative path, links followed.

    all_files: every one outside of caches; else those whose names, and whose folders' names, do not begin with _ or a
    dot. ValueError where there is none, or something that is no file.
    """
    if path.is_file():
        return {"": path}
    if not path.is_dir():
        raise ValueError(f"{path}: does not exist, expected a file or a folder")
    found = dict(sorted((str(file.relative_to(path)), file) for file in _walk(path, all_files, set())))
    if not found:
        which = "" if all_files else " whose names do not begin with _ or a dot"
        raise ValueError(f"{path}: is empty, expected files{which}")
    return found


def _walk(folder: Path, all_files: bool, above: set[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:  # a link to a folder above
        return
    for path in folder.iterdir():
        if path.name in CACHES if all_files else path.name.startswith(("_", ".")):
            continue
        if path.is_dir():
            yield from _walk(path, all_files, above | {real})
        elif path.exists() and not path.is_file():
            raise ValueError(f"{path}: is a pipe or a device, expected files")  # which would be read for ever
        else:
            yield path


def stamps(path: Path) -> dict[str, list[int]]:
    """Size and time of last change of the files of a result; {} of a shard folder, whose identity is read at once."""
    if (path / MANIFEST).is_file():
        return {}
    found = {name: file.stat() for name, file in files_of(path).items()}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def change_of(result: Path, before: Mapping[str, list[int]], was: str) -> str:
    """How a result differs from what it was, '' where it does not. before: its stamps; was: its identity."""
    try:
        now = stamps(result)
        if (now and now == before) or identity(result) == was:
            return ""
    except ValueError as error:
        return str(error)
    for name in sorted({*before, *now}):
        if now.get(name) != before.get(name):
            how = "is gone" if name not in now else "is new" if name not in before else "has other content"
            return f"{result / name} {how}"
    return f"{result} has other content"
