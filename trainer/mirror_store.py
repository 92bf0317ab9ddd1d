"""What a mirror holds (--mirror): the folder of a run as far as another machine needs it to go on, and mirror.json.

Checkpoints have the names that they have in OUT, and so have exports. A checkpoint without its checkpoint.json and an export
without its config.json, which come last and go first, do not exist. mirror.json has the sha256 of each file of the exports.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.manifest import MANIFEST
from shards.output_folder import RUN, require_empty
from shards.record import encode_json
from shards.store import Store
from trainer.checkpoint import INDEX
from trainer.going_on import CHECKPOINTS

LISTED = "mirror.json"
CONFIG = "config.json"


def require_mirror(store: Store) -> None:
    """ValueError where a folder holds something and is no mirror of a run."""
    if store.size(MANIFEST) is not None:
        raise ValueError(f"{store.url}: is a shard folder and not the mirror of a run; choose another --mirror")
    try:
        require_empty(store, RUN, "the mirror of a run")
    except ValueError as error:
        raise ValueError(str(error).replace("--out", "--mirror")) from None


def checkpoint_name(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:06d}"


def steps_there(store: Store) -> list[int]:
    """Steps of the folders of checkpoints, whole or not, in order."""
    found = (re.fullmatch(r"step-(\d+)", name) for name in store.folders(CHECKPOINTS))
    return sorted(int(match[1]) for match in found if match)


def is_whole(store: Store, step: int) -> bool:
    return store.size(f"{checkpoint_name(step)}/{INDEX}") is not None


def remove(store: Store, folder: str, last: str, may_delete: Callable[[], None]) -> None:
    """Remove a folder, the file first that says that it is whole."""
    store.delete(f"{folder}/{last}", may_delete)
    store.remove(folder)


def read_models(store: Store) -> dict[str, Any]:
    """The exports by their names, such as exports/step-000100: each with its entry of exported.json and its files' sha256."""
    try:
        models: dict[str, Any] = json.loads(store.read(LISTED))["models"]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{store.where(LISTED)}: cannot be read ({error}); delete it, and a command with the run's folder copies the exports again"
        ) from None
    return models


def write_models(store: Store, models: dict[str, Any]) -> None:
    store.replace(LISTED, encode_json({"models": models}))


def whole_models(store: Store) -> dict[str, Any]:
    """Of `read_models` those that are whole."""
    return {name: entry for name, entry in read_models(store).items() if store.size(f"{name}/{CONFIG}") is not None}


def share(index: dict[str, Any], rank: int, size: int) -> list[str]:
    """The files of a checkpoint that a rank copies: those that it wrote, or with another number of ranks an equal part."""
    names = sorted(index["files"])
    if index["world_size"] != size:
        return names[rank::size]
    return [name for name in names if _writer(name, size) == rank]


def _writer(name: str, size: int) -> int:
    match = re.match(r"__(\d+)_", name)
    return int(match[1]) if match and int(match[1]) < size else 0


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a local folder by their names in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
