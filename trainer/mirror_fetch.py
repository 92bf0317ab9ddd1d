"""A run goes on from its mirror (--mirror): where --out has no checkpoint, or an older one than the mirror.

Everything is fetched into temporary folders and checked first, each rank its share of the files; then OUT gets the records, the
checkpoint and the models. Killed before that, the same command fetches again.
"""

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from shards.output_folder import MODEL, read_record
from shards.publish import fsync_folder
from shards.store import temporary_name
from shards.transfer import receive
from trainer.checkpoint import INDEX, read_files
from trainer.config import TrainConfig
from trainer.exported import Exported
from trainer.going_on import AVERAGE_MODEL, checkpoint_steps, fingerprint_of, length_of, settings_now
from trainer.mirror import Mirror
from trainer.mirror_exports import RECORDS
from trainer.mirror_store import (
    checkpoint_name,
    is_whole,
    steps_there,
    whole_models,
)
from trainer.run_folder import TENSORBOARD
from trainer.session import Session

FAILED = "the store: "
TOLD_SECONDS = 10.0


@dataclass(frozen=True)
class Plan:
    """What is fetched. steps: whole checkpoints, the newest first, of which the first is taken that is not damaged; models: exports,
    with their entries of mirror.json; is_finished: the run is, so that no checkpoint is needed; fingerprint: of its
    checkpoints."""

    steps: list[int]
    models: dict[str, Any]
    is_finished: bool
    fingerprint: str


def bring_back(config: TrainConfig, session: Session, mirror: Mirror) -> None:
    """Fetch into --out what the mirror has and it lacks, if anything. All ranks take part.

    ValueError where no checkpoint of the mirror can be used and --out has none, OSError where the store does not give them.
    """
    world = session.world
    plan = _plan(config, session, mirror) if world.first else None
    world.meet()
    plan = world.from_first(plan)
    if plan is None:
        return
    fetched: dict[str, Path] = {}
    for name, entry in plan.models.items():
        folder, problem = _fetch(session, mirror, name, entry["files"], config.out / name)
        if problem is None:
            fetched[name] = folder
            continue
        session.note(f"passed over a damaged export: {problem}")
        if plan.is_finished and not plan.steps:
            raise ValueError(
                f"{mirror.url}: {problem}, and it has no checkpoint to export again; choose another --mirror"
            )
    if not plan.is_finished or {*fetched} != {*plan.models}:
        fetched = {} if plan.is_finished else fetched  # all of them are exported again
        name, folder = _fetch_newest(config, session, mirror, plan)
        if name is None:
            return
        fetched = {name: folder} | fetched
        done = (plan.models.get(MODEL, {}).get("exported") or {}).get("step")
        if MODEL in fetched and name != checkpoint_name(done or 0):
            if world.first:
                for folder in fetched.values():
                    shutil.rmtree(folder)
            raise ValueError(
                f"{mirror.url}: is of a finished run of {done} steps, whose last checkpoint is damaged, so that it can go on from {name} "
                "alone; keep its model and train with another --out and --mirror"
            )
    if world.first:
        session.check_lease()
        _fetch_records(config.out, mirror)
        for name, folder in fetched.items():
            (config.out / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(config.out / name, ignore_errors=True)
            os.rename(folder, config.out / name)
            fsync_folder((config.out / name).parent)
        session.note(f"fetched from {mirror.url}: {', '.join(fetched)}")
    world.meet()


def _plan(config: TrainConfig, session: Session, mirror: Mirror) -> Plan | None:
    record = read_record(mirror.store)
    if record is None:
        return None
    local = checkpoint_steps(config.out)
    steps = [step for step in reversed(steps_there(mirror.store)) if is_whole(mirror.store, step)]
    models = {name: entry for name, entry in whole_models(mirror.store).items() if name in (MODEL, AVERAGE_MODEL)}
    if local and (not steps or steps[0] <= local[-1]):
        return None
    if session.lease is None or (config.out / MODEL).exists():
        done = Exported(config.out).read()["models"].get(MODEL, {}).get("step", 0)
        if steps and steps[0] > max(done, *local, 0):
            raise ValueError(
                f"{mirror.url}: is at step {steps[0]:,}, and {config.out} is of a run that was finished before it; delete that folder "
                "to go on from the mirror, or choose another --mirror"
            )
        return None
    steps = [step for step in steps if step > max(local, default=0)]
    is_finished = MODEL in models and length_of(settings_now(record)) == length_of(asdict(config))
    if is_finished:
        dtype = (models[MODEL]["exported"] or {}).get("export_dtype", config.export_dtype)
        if dtype != config.export_dtype:
            raise ValueError(
                f"{mirror.url}/{MODEL}: was exported with --export-dtype {dtype}, {config.export_dtype} asked for now; the run is "
                f"finished: give {dtype}, which fetches that model"
            )
    if MODEL not in models:
        models = {}  # an average beside it is made again
    if not steps and not models:
        return None
    return Plan(steps, models, is_finished, fingerprint_of(record))


def _fetch_newest(config: TrainConfig, session: Session, mirror: Mirror, plan: Plan) -> tuple[str | None, Path]:
    """The newest checkpoint that is not damaged, with the temporary folder that has it; None where --out has one that is newer."""
    problems = []
    for step in plan.steps:
        name = checkpoint_name(step)
        files = session.world.from_first(_index(mirror, name, config.out, plan) if session.world.first else None)
        if isinstance(files, str):
            problem: str | None = files
        else:
            folder, problem = _fetch(session, mirror, name, files, config.out / name)
            if problem is None:
                return name, folder
        assert problem is not None
        session.note(f"passed over a damaged checkpoint: {problem}")
        problems.append(problem)
        mirror.damaged.add(step)
    has_own = session.world.from_first(bool(checkpoint_steps(config.out)))
    if problems and not has_own:
        raise ValueError(
            f"{mirror.url}: no checkpoint can be used: {'; '.join(problems)}; delete that folder, or choose another --mirror, to start over"
        )
    return None, config.out


def _index(mirror: Mirror, name: str, out: Path, plan: Plan) -> dict[str, str] | str:
    """The hashes of a checkpoint's files by name, its index among them, or what is wrong with the index."""
    url = mirror.store.where(f"{name}/{INDEX}")
    try:
        data = mirror.store.read(f"{name}/{INDEX}")
    except FileNotFoundError:
        return f"{url}: no such file"
    files = read_files(data, url, plan.fingerprint)
    return files if isinstance(files, str) else {INDEX: "", **files}


def _fetch(session: Session, mirror: Mirror, name: str, files: dict[str, str], final: Path) -> tuple[Path, str | None]:
    """Fetch a folder into a temporary one beside `final`, each rank its share; what is wrong with one of its files."""
    world = session.world
    temporary = Path(world.from_first(str(temporary_name(final))))
    if world.first:
        for leftover in final.parent.glob(f".{final.name}.*.tmp"):
            shutil.rmtree(leftover)  # of a command that was killed
        temporary.mkdir(parents=True)
        session.note(f"fetching {name} from {mirror.url}, {len(files):,} files")
    world.meet()
    own = {file: files[file] for file in sorted(files)[world.rank :: world.size]}
    try:
        problem = receive(mirror.store, name, own, temporary, _telling(session, name))
    except Exception as error:
        problem = f"{FAILED}{error}"
    problem = world.first_problem(problem)
    if problem is not None and world.first:
        shutil.rmtree(temporary)
    if problem is not None and problem.startswith(FAILED):
        raise OSError(problem.removeprefix(FAILED))
    return temporary, problem


def _telling(session: Session, name: str) -> Callable[[int, int], None]:
    """Says every ten seconds how far the first rank is."""
    told = time.monotonic()
    of = " of this process's share" if session.world.size > 1 else ""

    def tell(done: int, total: int) -> None:
        nonlocal told
        if time.monotonic() - told > TOLD_SECONDS:
            told = time.monotonic()
            session.note(f"fetched {done / 1e9:.1f} of {total / 1e9:.1f} GB of {name}{of}")

    return tell


def _fetch_records(out: Path, mirror: Mirror) -> None:
    """The records that the mirror has, each whole or as it was."""
    for leftover in out.glob(".records.*.tmp"):
        shutil.rmtree(leftover)  # of a command that was killed
    temporary = temporary_name(out / "records")
    temporary.mkdir(parents=True)
    try:
        board = {f"{TENSORBOARD}/{name}": "" for name in mirror.store.names(TENSORBOARD)}
        files = {name: "" for name in mirror.store.names() if name in RECORDS} | board
        problem = receive(mirror.store, "", files, temporary)
        if problem is not None:
            raise OSError(problem)
        for name in files:
            (out / name).parent.mkdir(exist_ok=True)
            os.replace(temporary / name, out / name)
        fsync_folder(out)
    finally:
        shutil.rmtree(temporary)
