"""An --out without checkpoint and model gets the newest whole checkpoint of the mirror (--mirror), and the records beside it.

All is fetched into a hidden folder directly in OUT, each rank its share of the files, and checked there. Then run.json gets its
place, the other records and the checkpoint, which comes last: killed at any time, the same command fetches again.
"""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from shards.output_folder import MODEL, RUN, read_record
from shards.publish import fsync_folder
from shards.store import temporary_name
from shards.store_errors import text_of
from shards.transfer import receive
from trainer.checkpoint_files import INDEX, read_files
from trainer.config import TrainConfig
from trainer.going_on import CHECKPOINTS, checkpoint_steps, fingerprint_of
from trainer.mirror import Mirror
from trainer.mirror_store import CONFIG, RECORDS, checkpoint_name, files_of, whole_steps
from trainer.run_folder import TENSORBOARD
from trainer.session import Session

TOLD_SECONDS = 10.0


def fetch_newest(config: TrainConfig, session: Session, mirror: Mirror) -> None:
    """Fetch into --out what the mirror has, where --out has no checkpoint and no model. All ranks take part.

    ValueError where none of its checkpoints can be used, OSError where the store does not give them.
    """
    world, out, problems = session.world, config.out, list[str]()
    found = (_steps(out, mirror), temporary_name(out / "mirror-fetch")) if world.first else None
    world.meet()
    steps, temporary = world.from_first(found)
    try:
        for step in steps:
            problem = _fetch(session, mirror, checkpoint_name(step), temporary)
            if problem is None:
                if world.first:
                    session.check_lease()
                    _publish(out, mirror, temporary, checkpoint_name(step))
                    session.note(f"fetched from {mirror.url}: {checkpoint_name(step)}")
                break
            session.note(f"passed over a damaged checkpoint: {problem}")
            problems.append(problem)
            mirror.damaged.add(step)
        else:
            if problems:
                raise ValueError(
                    f"{mirror.url}: no checkpoint can be used: {'; '.join(problems)}; delete them there to start over, or choose another "
                    "--mirror"
                )
    finally:
        if world.first:
            shutil.rmtree(temporary, ignore_errors=True)
    world.meet()


def _steps(out: Path, mirror: Mirror) -> list[int]:
    """The steps of the checkpoints that may be fetched, the newest first."""
    if read_record(mirror.store) is None or checkpoint_steps(out) or (out / MODEL).exists():
        return []
    steps = whole_steps(mirror.store)
    if not steps and mirror.store.size(f"{MODEL}/{CONFIG}") is not None:
        raise ValueError(
            f"{mirror.url}: has the model of a finished run and no checkpoint to go on from, and {out} has neither; copy {MODEL}/ from "
            "there, or choose another --mirror to train anew"
        )
    return steps[::-1]


def _fetch(session: Session, mirror: Mirror, name: str, temporary: Path) -> str | None:
    """Fetch a checkpoint into `temporary`, each rank its share; what is wrong with it."""
    world = session.world
    found = _index(mirror, name) if world.first else None
    world.meet()  # the store may let the first rank wait
    files = world.from_first(found)
    if isinstance(files, str):
        return files
    if world.first:
        (temporary / name).mkdir(parents=True)
        session.note(f"fetching {name} from {mirror.url}, {len(files):,} files")
    world.meet()
    own = {file: files[file] for file in sorted(files)[world.rank :: world.size]}
    problem, failure = None, None
    try:
        problem = receive(mirror.store, name, own, temporary / name, _telling(session, name))
    except Exception as error:
        failure = text_of(error)
    if failure := world.first_problem(failure):
        raise OSError(failure)
    return world.first_problem(problem)


def _index(mirror: Mirror, name: str) -> dict[str, str] | str:
    """The hashes of a checkpoint's files by name, its index among them, or what is wrong with the index."""
    record = read_record(mirror.store)
    assert record is not None
    data = mirror.store.read(f"{name}/{INDEX}")
    files = read_files(data, mirror.store.where(f"{name}/{INDEX}"), fingerprint_of(record))
    return files if isinstance(files, str) else {INDEX: "", **files}


def _telling(session: Session, name: str) -> Callable[[int, int], None]:
    """Says every ten seconds how far the first rank is."""
    told = time.monotonic()

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > TOLD_SECONDS:
            told = time.monotonic()
            session.note(f"fetched {done / 1e9:.1f} of {total / 1e9:.1f} GB of this process's share of {name}")

    return tell


def _publish(out: Path, mirror: Mirror, temporary: Path, name: str) -> None:
    """Give the records and the checkpoint in `temporary` their places."""
    store = mirror.store
    wanted = [file for file in store.names() if file in RECORDS]
    wanted += [f"{TENSORBOARD}/{file}" for file in store.names(TENSORBOARD)]
    if problem := receive(store, "", dict.fromkeys(wanted, ""), temporary / "records"):
        raise OSError(problem)
    records = files_of(temporary / "records")
    for file in sorted(records, key=lambda file: file != RUN):
        (out / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(records[file], out / file)
    fsync_folder(out)
    (out / CHECKPOINTS).mkdir(exist_ok=True)
    os.rename(temporary / name, out / name)
    fsync_folder(out / CHECKPOINTS)
