"""What a stage is: a command, what it reads, where its result lies; and its key, by which a rerun knows it.

A key is made of content alone: the command without its paths, the settings, and the fingerprints of what it reads. An
upstream stage that was repeated with an equal result therefore repeats nothing that follows from it.
"""

import glob
import hashlib
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Union

from pipelines.flywheel.fingerprint import Counting


@dataclass(frozen=True)
class Output:
    """Stands for the stage's own output folder, or a path under it."""

    sub: str = ""


@dataclass(frozen=True)
class State:
    """Stands for a folder of the stage that outlives a kill, for checkpoints; it is deleted when the stage is done."""

    sub: str = ""


@dataclass(frozen=True)
class Input:
    """Stands for the result of the input `name`, or a path under it. prefix, suffix: what stands around it in the word.
    written: the word as the command receives it, which names that file; default: made of the absolute path."""

    name: str
    sub: str = ""
    prefix: str = ""
    suffix: str = ""
    written: str = ""


@dataclass(frozen=True)
class Unkeyed:
    """A word that says where or how fast and not what: it may differ from run to run."""

    text: str


@dataclass(frozen=True)
class Pattern(Unkeyed):
    """A glob that the command expands itself. files: what it stood for when they were made inputs of the stage."""

    files: tuple[str, ...]

    @staticmethod
    def expand(text: str) -> tuple[str, ...]:
        return tuple(sorted(glob.glob(text, recursive=True)))


Word = str | Output | State | Input | Unkeyed
Check = Callable[[Path, Mapping[str, Path]], None]
"""Called as check(result, paths of the inputs) once the command has ended well; ValueError refuses the result."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a graph. Only what says what is computed enters the key; the rest may differ from run to run."""

    name: str
    """Unique, like a path: round-1/train."""
    command: tuple[Word, ...]
    """What is run; markers become absolute paths. A word that is this Python's path enters the key as `python`."""
    inputs: Mapping[str, Union["Stage", Path]] = field(default_factory=dict)
    """What it reads, by name: results of other stages, and files or folders of the user."""
    counting: Mapping[str, Counting] = field(default_factory=dict, kw_only=True)
    """Which files count of an input that is a folder of the user, by the input's name; default: data."""
    result: str = ""
    """Path under the output folder that consumers receive: `model` of a training run."""
    seed: int | None = None
    """Recorded; in the key."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Recorded; in the key: what decides the result and is not in the command."""
    resumes: bool = False
    """True: the same command goes on in a half-written folder. False: it starts with an empty folder, which gets its
    name when the command has ended well."""
    environment: Mapping[str, Word] = field(default_factory=dict)
    """Variables on top of those of this process; in the key."""
    launcher: tuple[str, ...] = ()
    """Words in front of the command that say how it is started and not what it computes; not in the key."""
    threads: int = 0
    """Cores it wants, at most all; 0: an equal share of all of them."""
    check: Check | None = None
    zero_may_stop: bool = False
    """Its command may leave with 0 when it is told to end, as many handlers of signals do, with half of its work: 0 then
    counts as stopped, not as done."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)*", self.name) or self.name.startswith("."):
            raise ValueError(
                f"stage {self.name!r}: expected a name of letters, digits, - _ . and /, for instance round-1/train"
            )
        for word in (*self.command, *self.environment.values()):
            if isinstance(word, Input) and word.name not in self.inputs:
                raise ValueError(
                    f"stage {self.name}: its command reads {word.name!r}, expected one of its inputs "
                    f"({', '.join(self.inputs) or 'none'})"
                )

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return self.name.replace("/", "-")


def remit_version() -> str:
    try:
        return version("remit")
    except PackageNotFoundError:  # run from a source tree
        return "unknown"


def canonical(word: str | Output | State | Input) -> str | list[str]:
    """A word of a command as it enters the key."""
    if isinstance(word, Input):
        around = [word.prefix, word.suffix] if word.suffix else [word.prefix] if word.prefix else []
        return ["input", word.name, word.sub, *around]
    if isinstance(word, Output):
        return ["output", word.sub]
    if isinstance(word, State):
        return ["state", word.sub]
    return "python" if word == sys.executable else word


def stage_key(stage: Stage, fingerprints: Mapping[str, str]) -> str:
    """sha256 over all that decides the result. fingerprints: of the content of each input, by its name."""
    content = {
        "command": [canonical(word) for word in stage.command if not isinstance(word, Unkeyed)],
        "environment": {
            name: canonical(word) for name, word in stage.environment.items() if not isinstance(word, Unkeyed)
        },
        "inputs": {name: fingerprints[name] for name in stage.inputs},
        "remit": remit_version(),
        "result": stage.result,
        "seed": stage.seed,
        "settings": dict(stage.settings),
    }
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def check_graph(stages: Sequence[Stage]) -> None:
    """ValueError unless names are unique and every stage stands after those that it reads."""
    slugs: dict[str, str] = {}
    before: list[Stage] = []
    for stage in stages:
        if stage.slug in slugs:
            raise ValueError(f"stages {slugs[stage.slug]} and {stage.name} have one name, expected different ones")
        slugs[stage.slug] = stage.name
        for source in stage.inputs.values():
            if isinstance(source, Stage) and source not in before:
                raise ValueError(f"stage {stage.name} reads {source.name}, which does not stand before it in the plan")
        before.append(stage)
