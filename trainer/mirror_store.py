"""What a mirror holds (--mirror): the folder of a run as far as another machine needs it to go on.

All has the names that it has in OUT. A checkpoint without its checkpoint.json and an export without its config.json, which come
last and go first, do not count.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

from shards.lease import LEASE
from shards.output_folder import RUN
from shards.publish import TEMPORARY_SUFFIX
from shards.store import Store
from trainer.checkpoint_files import INDEX, read_files
from trainer.exported import EXPORTED
from trainer.going_on import CHECKPOINTS
from trainer.run_folder import EVALUATION, METRICS, TASK_SCORES

CONFIG = "config.json"
RECORDS = (RUN, METRICS, EVALUATION, TASK_SCORES, EXPORTED, "wandb.json")
"""The files beside checkpoints, exports and tensorboard/ that a run goes on with; run.json comes first."""


def require_mirror(store: Store) -> None:
    """ValueError where anything lies in a folder, at any depth, that has no run.json."""
    if store.size(RUN) is not None:
        return
    files = [name for name in store.names() if not (name.startswith(".") and name.endswith(TEMPORARY_SUFFIX))]
    foreign = [*files, *(name for name in store.folders() if name not in (LEASE, "lost+found"))]
    if foreign:
        raise ValueError(
            f"{store.url}: is not empty and not the mirror of a run (it has {foreign[0]}); choose another --mirror or empty it"
        )


def checkpoint_name(step: int) -> str:
    return f"{CHECKPOINTS}/step-{step:06d}"


def steps_there(store: Store) -> list[int]:
    """Steps of the folders of checkpoints, whole or not, in order."""
    found = (re.fullmatch(r"step-(\d{6,})", name) for name in store.folders(CHECKPOINTS))
    return sorted(int(match[1]) for match in found if match)


def whole_steps(store: Store) -> list[int]:
    """Of `steps_there` those of whole checkpoints."""
    return [step for step in steps_there(store) if store.size(f"{checkpoint_name(step)}/{INDEX}") is not None]


def retain(
    store: Store, step: int, keep: int, settings: str, damaged: set[int], may_delete: Callable[[], None]
) -> None:
    """Remove checkpoints of the run with the fingerprint `settings` that are older than its newest `keep` up to `step`.

    What is not whole, or of another run, or in `damaged`, is not counted and stays.
    """
    there = (other for other in whole_steps(store) if other <= step and other not in damaged)
    own = [other for other in there if settings_of(store, other) == settings]
    for old in own[:-keep]:
        store.delete(f"{checkpoint_name(old)}/{INDEX}", may_delete)
        store.remove(checkpoint_name(old), may_delete)


def settings_of(store: Store, step: int) -> str | None:
    """The fingerprint in a checkpoint.json; None where there is none, or one that was altered."""
    try:
        data = store.read(f"{checkpoint_name(step)}/{INDEX}")
    except FileNotFoundError:
        return None
    return None if isinstance(read_files(data, "", None), str) else str(json.loads(data)["settings"])


def files_of(folder: Path) -> dict[str, Path]:
    """The files of a local folder by their names in it."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
