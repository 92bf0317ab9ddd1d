"""--mirror URL: checkpoints and exports of a run, copied to an object store or another folder beside the training.

Each rank copies the files of a checkpoint that it wrote; the first one puts checkpoint.json last, so that a checkpoint without it
is none. What cannot be copied is said, and the training goes on: the next checkpoint is tried, and at the end what is
missing once more. OUT is never touched for it. The ranks meet over files in OUT, in no collective.
"""

import contextlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from shards.lease import Lease, LeaseLost
from shards.output_folder import MODEL, RUN, read_record
from shards.part import sha256_file
from shards.store import Store, open_store, temporary_name
from shards.store_errors import text_of
from shards.transfer import send
from trainer.checkpoint import INDEX
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.export import EXPORTS
from trainer.exported import EXPORTED, FOR_TASKS, Exported
from trainer.going_on import AVERAGE_MODEL, CHECKPOINTS
from trainer.mirror_store import (
    CONFIG,
    checkpoint_name,
    files_of,
    is_whole,
    read_models,
    remove,
    require_mirror,
    share,
    steps_there,
    write_models,
)
from trainer.rank_reports import POLL_SECONDS, leave_report, signs_of_life, wait_for_report
from trainer.run_folder import EVALUATION, METRICS, TASK_SCORES, TENSORBOARD, refuse_other_settings

RECORDS = (RUN, METRICS, EVALUATION, TASK_SCORES, EXPORTED, "wandb.json")
"""The files beside checkpoints and exports that a run goes on with."""
GO = "go"
BUSY_SECONDS = 30.0
"""How long a save waits for the copy of the checkpoint before it, once for each copy."""
RELEASE_SECONDS = 15.0
QUIET_SECONDS = 2.0  # of waiting before a line says so


class Worker:
    """A thread that does one thing after the other beside the training; a process that ends does not wait for it."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._left, self._changed = 0, threading.Condition()
        self._thread: threading.Thread | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """work: catches its own errors."""
        with self._changed:
            self._left += 1
        self._queue.put(work)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def wait(self, seconds: float) -> bool:
        """Whether all is done, within so many seconds."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._left, seconds)

    def _run(self) -> None:
        while True:
            work = self._queue.get()
            try:
                work()
            finally:
                with self._changed:
                    self._left -= 1
                    self._changed.notify_all()


class Mirror:
    """The mirror of a run, on each of its ranks. step_in_work: of the checkpoint that is copied now, which OUT keeps meanwhile."""

    def __init__(self, config: TrainConfig, world: World, note: Callable[[str], None]) -> None:
        assert config.mirror is not None
        self.url, self.out, self.world, self.note = config.mirror.rstrip("/"), config.out, world, note
        self.keep, self.limit = config.keep_checkpoints, config.timeout_seconds
        self.store: Store
        self.step_in_work: int | None = None
        self.damaged: set[int] = set()  # steps of checkpoints there that are; the next copy deletes them
        self._lease: Lease | None = None
        self._lost: LeaseLost | None = None
        self._ending = threading.Event()
        self._checkpoints, self._models = Worker("mirror of checkpoints"), Worker("mirror of exports")
        self._newest = self._copied = 0  # steps of the run's newest checkpoint, and of the one that was copied last
        self._waited_for: int | None = None
        self._missing: dict[str, str] = {}  # exports that are not there, with the reason
        self._reason = ""  # why the last checkpoint that failed did
        self._sent: dict[str, tuple[int, int]] = {}  # records as they were when they were copied
        self._writing = threading.RLock()

    def open(self, settings: dict[str, Any]) -> None:
        """Become its only writer. All ranks; settings: of the run, on the first.

        ValueError where it cannot be read or holds something else, RuntimeError where another run writes to it.
        """
        problem = None
        try:
            self.store = open_store(self.url)
            read_record(self.store)
        except Exception as error:
            problem = f"--mirror {text_of(error)}"
        if problem := self.world.first_problem(problem):
            raise ValueError(problem)
        if self.world.first:
            require_mirror(self.store)
            refuse_other_settings(self.store, settings, "--mirror")
            self._lease = Lease(self.store, "--mirror").acquire(self.note)
            refuse_other_settings(self.store, settings, "--mirror")  # of a run that came in between

    def close(self) -> None:
        """Give it back; what is still being copied is left."""
        self._ending.set()
        if self._lease:
            # a store that is silent would be asked for minutes
            release = threading.Thread(target=self._lease.release, name="mirror", daemon=True)
            release.start()
            release.join(RELEASE_SECONDS)
            self._sweep()

    def _sweep(self) -> None:
        for leftover in (self.out / CHECKPOINTS).glob(".mirror-*.tmp"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _check(self) -> None:
        """LeaseLost where another run has taken the mirror over, RuntimeError where this one ends."""
        assert self._lease is not None
        self._go_on()
        self._lease.check()

    def _go_on(self) -> None:
        if self._ending.is_set():
            raise RuntimeError("the run ends")

    # --- where a run begins or goes on ----------------------------------------------------------------

    def forget(self, first_step: int) -> set[str]:
        """Remove the exports that are made again after `first_step`, on the first rank; the names of those that stay."""
        models = read_models(self.store)
        later = {
            name
            for name in models
            if (step := name.removeprefix(f"{EXPORTS}/step-")).isdigit() and int(step) > first_step
        }
        again = {MODEL, AVERAGE_MODEL} | later
        for name in again:
            remove(self.store, name, CONFIG, self._check)
        if again & {*models}:
            write_models(self.store, {name: entry for name, entry in models.items() if name not in again})
        return {*models} - again

    def catch_up(self, step: int, finished: bool) -> None:
        """Begin to copy what it lacks of the run in OUT, which goes on after `step` or is `finished`. All ranks."""
        meeting = None
        if self.world.first:
            self._sweep()
            self._send_records()
            index = self.out / checkpoint_name(step) / INDEX
            if index.exists():
                self._newest = step
                if (
                    is_whole(self.store, step)
                    and self.store.read(f"{checkpoint_name(step)}/{INDEX}") == index.read_bytes()
                ):
                    self._copied = step
                else:
                    meeting = self._meet(step)
            self._add_missing_models(finished)
        self.world.meet()
        if meeting := self.world.from_first(meeting):
            self.copy(step, meeting)

    def _add_missing_models(self, finished: bool) -> None:
        models, exported = read_models(self.store), Exported(self.out).read()["models"]
        for name, entry in exported.items():
            stays = finished or name.startswith(EXPORTS)  # the others are made again
            if entry.get(FOR_TASKS) or not stays or not (self.out / name / CONFIG).exists():
                continue
            if models.get(name, {}).get("exported") != entry or self.store.size(f"{name}/{CONFIG}") is None:
                self.add_model(name)

    # --- checkpoints ----------------------------------------------------------------------------------

    def reserve(self, step: int) -> str | None:
        """Before a save, on the first rank: where the ranks are to meet to copy it; None where it is not copied, since the
        one before it still is. LeaseLost where another run has taken the mirror over.
        """
        if self._lost:
            raise self._lost
        self._newest = step
        busy = self.step_in_work
        if not self._checkpoints.wait(0 if busy is not None and busy == self._waited_for else BUSY_SECONDS):
            self._waited_for = busy
            self.note(f"{self.url}: the copy of step {busy} is still going on, so step {step} is not copied there")
            return None
        return self._meet(step)

    def _meet(self, step: int) -> str:
        folder = temporary_name(self.out / CHECKPOINTS / f"mirror-{step:06d}")
        folder.mkdir(parents=True)
        self.step_in_work = step
        return str(folder)

    def copy(self, step: int, meeting: str, saved: Future | None = None) -> None:
        """Have the checkpoint of a step copied beside the training. All ranks; saved: the save that comes first, on the first rank."""
        if self.world.first:
            self._checkpoints.submit(partial(self._lead, step, Path(meeting), saved))
        else:
            self._checkpoints.submit(partial(self._follow, step, Path(meeting)))

    def _lead(self, step: int, meeting: Path, saved: Future | None) -> None:
        index = f"{checkpoint_name(step)}/{INDEX}"
        try:
            if saved is not None and saved.exception() is not None:
                return  # which the save itself raises
            self.store.delete(index, self._check)
            (meeting / GO).touch()
            self._send_share(step)
            quiet = self.world.timeout.total_seconds()
            for rank in range(1, self.world.size):
                wait_for_report(
                    meeting, rank, quiet, self._ending, "copy the files that it wrote; nothing is lost in OUT"
                )
            self._send_records()
            self._check()
            self.store.upload(self.out / index, index)
            self._copied = step
            self._retain(step)
        except LeaseLost as error:
            self._lost = error
        except Exception as error:
            self._reason = text_of(error)
            if not self._ending.is_set():
                self.note(
                    f"{self.url}: step {step:,} could not be copied there ({self._reason}); the training goes on, and the next "
                    "checkpoint is tried"
                )
        finally:
            shutil.rmtree(meeting, ignore_errors=True)
            self.step_in_work = None

    def _follow(self, step: int, meeting: Path) -> None:
        rank, beat = self.world.rank, min(5.0, self.world.timeout.total_seconds() / 5)
        with contextlib.suppress(OSError), signs_of_life(meeting, rank, beat):
            while not (meeting / GO).exists():
                if self._ending.is_set() or not meeting.exists():
                    return
                time.sleep(POLL_SECONDS)
            report = {}
            try:
                self._send_share(step)
            except Exception as error:
                report = {"error": text_of(error)}
            leave_report(meeting, rank, report)

    def _send_share(self, step: int) -> None:
        name = checkpoint_name(step)
        index = json.loads((self.out / name / INDEX).read_text(encoding="utf-8"))
        own = share(index, self.world.rank, self.world.size)
        send(self.store, {f"{name}/{file}": self.out / name / file for file in own}, self._go_on)

    def _retain(self, step: int) -> None:
        """Leave the newest checkpoints up to `step`, and of that one its own files alone."""
        name = checkpoint_name(step)
        known = {INDEX, *json.loads((self.out / name / INDEX).read_text(encoding="utf-8"))["files"]}
        for file in {*self.store.names(name)} - known:  # of a copy that was cut off
            self.store.delete(f"{name}/{file}", self._check)
        there = steps_there(self.store)
        good = [other for other in there if other < step and other not in self.damaged]
        older = [other for other in good if is_whole(self.store, other)]
        kept = {step, *older[max(0, len(older) - self.keep + 1) :]}
        for other in there:
            if other not in kept:
                remove(self.store, checkpoint_name(other), INDEX, self._check)
        self.damaged = set()

    # --- exports and records --------------------------------------------------------------------------

    def add_model(self, name: str) -> None:
        """Have an export of OUT copied beside the training, on the first rank."""
        self._missing[name] = "it was not begun"
        self._models.submit(partial(self._copy_model, name))

    def _copy_model(self, name: str) -> None:
        try:
            files = files_of(self.out / name)
            with self._writing:
                models = read_models(self.store)
                self.store.delete(f"{name}/{CONFIG}", self._check)
            last = files.pop(CONFIG)
            send(self.store, {f"{name}/{file}": path for file, path in files.items()}, self._go_on)
            hashes = {file: sha256_file(path) for file, path in (files | {CONFIG: last}).items()}
            with self._writing:
                models = read_models(self.store)
                entry = {"exported": Exported(self.out).read()["models"].get(name), "files": hashes}
                write_models(self.store, models | {name: entry})
                self._send_records()
                self._check()
                self.store.upload(last, f"{name}/{CONFIG}")
            for file in {*self.store.names(name)} - {*hashes}:
                self.store.delete(f"{name}/{file}", self._check)
            self._missing.pop(name, None)
        except LeaseLost as error:
            self._lost = error
        except Exception as error:
            self._missing[name] = text_of(error)
            if not self._ending.is_set():
                self.note(
                    f"{self.url}: {name} could not be copied there ({text_of(error)}); it is tried again at the end"
                )

    def _send_records(self) -> None:
        """Copy the records that have changed."""
        board = self.out / TENSORBOARD
        with self._writing:
            for path in (*(self.out / name for name in RECORDS), *(board.rglob("*") if board.exists() else ())):
                if not path.is_file():
                    continue
                name, state = path.relative_to(self.out).as_posix(), path.stat()
                if self._sent.get(name) != (now := (state.st_size, state.st_mtime_ns)):
                    self._check()
                    self.store.upload(path, name)
                    self._sent[name] = now

    # --- the end --------------------------------------------------------------------------------------

    def finish(self, should_stop: Callable[[], bool], finished: bool) -> None:
        """Wait until the newest checkpoint and all exports are there, and try once more what has failed. All ranks.

        Of a run that is not `finished`, or once should_stop says so, for --timeout-seconds at most. RuntimeError where a finished
        run is not there as a whole.
        """
        world, wait = self.world, _Wait(self, should_stop, not finished)
        is_in_time = wait.until_idle() if world.first else True
        world.meet()
        meeting = None
        if world.first and is_in_time and not self._lost:
            if self._newest > self._copied:
                meeting = self._meet(self._newest)
            for name in list(self._missing):
                self.add_model(name)
        if meeting := world.from_first(meeting):
            self.copy(self._newest, meeting)
        if world.first:
            wait.until_idle()
        world.meet()
        problem, lost = world.from_first(
            (self._problem(finished), self._lost and str(self._lost)) if world.first else None
        )
        if lost:
            raise LeaseLost(lost)
        if problem and finished:
            raise RuntimeError(problem)
        if problem:
            self.note(problem)

    def _problem(self, finished: bool) -> str | None:
        missing = dict(self._missing)
        if self._newest > self._copied:
            missing[f"step {self._newest:,}"] = self._reason
        if not missing:
            return None
        reason = next((reason for reason in missing.values() if reason), "there was no time for it")
        what = "the run is finished and whole" if finished else "the run's checkpoints are whole"
        return (
            f"{self.url}: lacks {', '.join(missing)} ({reason}); {what} in {self.out}, and the same command again copies what is "
            "missing"
        )


class _Wait:
    """Waiting for what is being copied, with a line that says so, within the time that is left."""

    def __init__(self, mirror: Mirror, should_stop: Callable[[], bool], is_stopping: bool) -> None:
        self._mirror, self._should_stop = mirror, should_stop
        self._began = time.monotonic()
        self._deadline = self._began + mirror.limit if is_stopping else None
        self._is_said = False

    def until_idle(self) -> bool:
        """Whether all is done in time."""
        mirror = self._mirror
        while not (mirror._checkpoints.wait(0.2) and mirror._models.wait(0.2)):
            now = time.monotonic()
            if self._deadline is None and self._should_stop():
                self._deadline = now + mirror.limit
            if self._deadline is not None and now > self._deadline:
                return False
            if not self._is_said and now - self._began > QUIET_SECONDS:
                self._is_said = True
                limit = "" if self._deadline is None else f", for at most {mirror.limit:g} s"
                mirror.note(f"waiting for the copy in {mirror.url}{limit}")
        return True


@contextlib.contextmanager
def mirroring(config: TrainConfig, world: World, note: Callable[[str], None]) -> Iterator[Mirror | None]:
    """The mirror of a run for the block, which opens it; None without --mirror."""
    if config.mirror is None:
        yield None
        return
    mirror = Mirror(config, world, note)
    try:
        yield mirror
    finally:
        mirror.close()
