"""--mirror URL: checkpoints and exports of a run, copied to an object store or another folder beside the training.

OUT leads: nothing of it is touched for the mirror, and nothing comes from there but to an OUT without checkpoint and model
(trainer/mirror_fetch.py). Each rank copies its share of the files of a checkpoint; the first one puts checkpoint.json last. The
ranks meet over files in OUT, in no collective. What cannot be copied is said, and the training goes on.
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
from typing import Any

from shards.lease import Lease
from shards.output_folder import MODEL, read_record, refuse_other
from shards.part import sha256_file
from shards.store import Store, open_store, temporary_name
from shards.store_errors import text_of
from shards.transfer import send, upload
from trainer.checkpoint_files import INDEX, read_files
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.export import EXPORTS
from trainer.exported import FOR_TASKS, Exported
from trainer.going_on import AVERAGE_MODEL, CHECKPOINTS, fingerprint, first_settings, length_of, settings_now
from trainer.mirror_store import (
    CONFIG,
    RECORDS,
    checkpoint_name,
    files_of,
    require_mirror,
    retain,
    whole_steps,
)
from trainer.mirror_worker import Worker
from trainer.rank_reports import leave_report, signs_of_life, wait_for_report
from trainer.run_folder import TENSORBOARD, refuse_other_settings
from trainer.session import Session

RELEASE_SECONDS = 15.0
ORDER_SECONDS = 0.5  # between two looks of a rank for what it is to copy
ROUND_SECONDS = 1.0  # of waiting at the end, after each of which the ranks meet
QUIET_SECONDS = 2.0  # of waiting before a line says so
LEFTOVERS = ".mirror*.tmp"


class Mirror:
    """The mirror of a run, on each of its ranks. step_in_work: of the checkpoint that is copied now, which OUT keeps meanwhile;
    damaged: steps of those there that were passed over."""

    def __init__(self, config: TrainConfig, world: World, note: Callable[[str], None]) -> None:
        assert config.mirror is not None
        self.url, self.out, self.world, self.note = config.mirror.rstrip("/"), config.out, world, note
        self.keep, self.limit = config.keep_checkpoints, config.timeout_seconds
        self.store: Store
        self.step_in_work: int | None = None
        self.damaged: set[int] = set()
        self._meeting: Path | None = None  # where the ranks meet, if there are several
        self._orders = 0
        self._lease: Lease | None = None
        self._ending = threading.Event()
        self._worker = Worker()
        self._missing: dict[str, tuple[str, str]] = {}  # by the name of the job: what is not there, and why
        self._changing = threading.Lock()
        self._sent: dict[str, tuple[int, int]] = {}  # records as they were when they were copied

    def open(self, session: Session, settings: dict[str, Any]) -> None:
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
            self._require_own(settings)
            self._lease = Lease(self.store, "--mirror").acquire(self.note)
            self._require_own(settings)  # not of a run that came in between
            if session.lease:
                for leftover in self.out.glob(LEFTOVERS):
                    shutil.rmtree(leftover)  # of a command that was killed
            if self.world.size > 1:
                self._meeting = temporary_name(self.out / "mirror")
                self._meeting.mkdir()
        self.world.meet()
        self._meeting = self.world.from_first(self._meeting)
        if self._meeting and not self.world.first:
            threading.Thread(target=self._follow, args=(self._meeting,), name="mirror", daemon=True).start()

    def _require_own(self, settings: dict[str, Any]) -> None:
        require_mirror(self.store)
        refuse_other_settings(self.store, settings, "--mirror")

    def close(self) -> None:
        """Give it back; what is still being copied is left."""
        self._ending.set()
        if self._lease:
            # a store that is silent would be asked for minutes
            release = threading.Thread(target=self._lease.release, name="mirror", daemon=True)
            release.start()
            release.join(RELEASE_SECONDS)
        if self._meeting and self.world.first:
            shutil.rmtree(self._meeting, ignore_errors=True)

    def require_behind(self, step: int) -> None:
        """ValueError where it has a checkpoint later than `step`, the one that OUT goes on from, or another run's. All ranks."""
        problem = self._conflict(step) if self.world.first else None
        self.world.meet()
        if problem := self.world.from_first(problem):
            raise ValueError(problem)

    def _conflict(self, step: int) -> str | None:
        theirs, ours = read_record(self.store), read_record(self.out)
        whole = [other for other in whole_steps(self.store) if other not in self.damaged]
        if whole and whole[-1] > step:
            return (
                f"{self.url}: has a checkpoint of step {whole[-1]:,}, and the run in {self.out} is at step {step:,}; an empty or another "
                f"--out fetches the newest from there, or delete what is later than step {step:,} there, or choose another --mirror"
            )
        if ours and theirs and (whole or self.store.size(f"{MODEL}/{CONFIG}") is not None):
            try:
                remedy = "choose another --mirror, or an empty --out to go on with that run"
                refuse_other(self.url, "run", first_settings(ours), first_settings(theirs), remedy)
            except ValueError as error:
                return str(error)
        return None

    # --- what is copied, on the first rank ------------------------------------------------------------

    def catch_up(self, step: int, finished: bool) -> None:
        """Have copied what it lacks of the run in OUT, which goes on after `step` or is `finished`. All ranks may call it."""
        if self.world.first and step and (self.out / checkpoint_name(step)).exists():
            self.copy(step)
        if self.world.first:
            self._submit("records", "the records", partial(self._catch_up, finished))

    def _catch_up(self, finished: bool) -> None:
        self._send_records()
        for name, entry in Exported(self.out).read()["models"].items():
            stays = finished or name.startswith(EXPORTS)  # the others are made again
            if stays and not entry.get(FOR_TASKS) and not self._has_export(name):
                self.copy_export(name)

    def _has_export(self, name: str) -> bool:
        files = files_of(self.out / name)
        return all(self.store.size(f"{name}/{file}") == path.stat().st_size for file, path in files.items())

    def copy(self, step: int, saved: Future | None = None) -> None:
        """Have a checkpoint copied beside the training. saved: the save that comes first."""
        left_out = self._submit(CHECKPOINTS, f"step {step:,}", partial(self._copy_checkpoint, step, saved))
        if left_out:
            self.note(f"{self.url}: {left_out} is not copied there, since the copy before it is still going on")

    def copy_export(self, name: str) -> None:
        """Have an export copied beside the training, in place of the one there."""
        self._submit(name, name, partial(self._copy_export, name))

    def _submit(self, name: str, what: str, work: Callable[[], None]) -> str | None:
        """Queue a job; of which thing one of the same name has not begun and never will."""
        entry = (what, "there was no time for it")
        with self._changing:
            before, _ = self._missing.get(name, entry)
            self._missing[name] = entry
        return before if self._worker.submit(name, partial(self._run, name, entry, work)) else None

    def _run(self, name: str, entry: tuple[str, str], work: Callable[[], None]) -> None:
        what, reason = entry[0], ""
        try:
            work()
        except Exception as error:
            reason = text_of(error)
            if not self._ending.is_set():
                self.note(f"{self.url}: {what} could not be copied there ({reason}); OUT has it, the training goes on")
        with self._changing:
            if self._missing[name] is not entry:  # a newer one waits already
                return
            del self._missing[name]
            if reason:
                self._missing[name] = what, reason

    def _check(self) -> None:
        """LeaseLost where another run has taken the mirror over, RuntimeError where this one ends."""
        assert self._lease is not None
        self._go_on()
        self._lease.check()

    def _go_on(self) -> None:
        if self._ending.is_set():
            raise RuntimeError("the run ends")

    def _copy_checkpoint(self, step: int, saved: Future | None) -> None:
        if saved is not None and saved.exception() is not None:
            return  # which the save itself raises
        name, self.step_in_work = checkpoint_name(step), step
        index, theirs = self.out / name / INDEX, f"{checkpoint_name(step)}/{INDEX}"
        try:
            settings = fingerprint(self.out)
            files = read_files(index.read_bytes(), str(index), settings)
            if isinstance(files, str):
                raise ValueError(files)
            self._send_records()
            if self.store.size(theirs) is None or self.store.read(theirs) != index.read_bytes():
                self.store.delete(theirs, self._check)
                self._have_sent(step)
                for stale in {*self.store.names(name)} - {*files}:  # of a copy that was cut off
                    self.store.delete(f"{name}/{stale}", self._check)
                upload(self.store, index, theirs, self._check)
            retain(self.store, step, self.keep, settings, self.damaged - {step}, self._check)
        finally:
            self.step_in_work = None

    def _copy_export(self, name: str) -> None:
        folder, config = self.out / name, f"{name}/{CONFIG}"
        files = files_of(folder)
        try:
            last = files.pop(CONFIG)
            self.store.delete(config, self._check)
            send(self.store, {f"{name}/{file}": path for file, path in files.items()}, self._go_on)
            self._send_records()
            for stale in {*self.store.names(name)} - {*files}:
                self.store.delete(f"{name}/{stale}", self._check)
            upload(self.store, last, config, self._check)
        except (KeyError, FileNotFoundError):
            if (folder / CONFIG).exists():
                raise
            self.note(f"{self.url}: {name} is no longer in {self.out}, and is not copied there")

    def _send_records(self) -> None:
        """Copy the records that have changed. A model there of a run that has another length now does not count any more."""
        theirs, ours = read_record(self.store), read_record(self.out)
        if theirs and ours and length_of(settings_now(theirs)) != length_of(settings_now(ours)):
            for model in (MODEL, AVERAGE_MODEL):
                self.store.delete(f"{model}/{CONFIG}", self._check)
        board = self.out / TENSORBOARD
        for path in (*(self.out / name for name in RECORDS), *(board.rglob("*") if board.exists() else ())):
            if path.is_file():
                name, state = path.relative_to(self.out).as_posix(), path.stat()
                if self._sent.get(name) != (now := (state.st_size, state.st_mtime_ns)):
                    upload(self.store, path, name, self._check)
                    self._sent[name] = now

    # --- the ranks -------------------------------------------------------------------------------------

    def _have_sent(self, step: int) -> None:
        """Have each rank copy its share of a checkpoint; the first error, once all are done with it."""
        if self._meeting is None:
            self._send_share(step)
            return
        self._orders += 1
        order = self._meeting / f"{self._orders}-{step}"
        order.mkdir()
        quiet, task = max(60.0, self.world.timeout.total_seconds()), "copy its share; OUT has the checkpoint"
        problems: list[Exception] = []
        for rank in range(self.world.size):
            try:
                if rank == 0:
                    self._send_share(step)
                else:
                    wait_for_report(order, rank, quiet, self._ending, "copy", task)
            except Exception as error:
                problems.append(error)
        shutil.rmtree(order, ignore_errors=True)
        if problems:
            raise problems[0]

    def _follow(self, meeting: Path) -> None:
        rank, beat, done = self.world.rank, min(5.0, self.world.timeout.total_seconds() / 5), 0
        while not self._ending.wait(ORDER_SECONDS):
            with contextlib.suppress(OSError):  # a folder that went meanwhile
                orders = [[int(word) for word in order.name.split("-")] for order in meeting.iterdir()]
                for number, step in sorted(orders):
                    if number > done:
                        done, order = number, meeting / f"{number}-{step}"
                        with signs_of_life(order, rank, beat):
                            report = {}
                            try:
                                self._send_share(step)
                            except Exception as error:
                                report = {"error": text_of(error)}
                            leave_report(order, rank, report)

    def _send_share(self, step: int) -> None:
        folder, name = self.out / checkpoint_name(step), checkpoint_name(step)
        files = json.loads((folder / INDEX).read_text(encoding="utf-8"))["files"]
        for file in sorted(files)[self.world.rank :: self.world.size]:
            self._go_on()
            if sha256_file(folder / file) != files[file]:
                raise OSError(f"{folder / file}: sha256 differs from {INDEX}")
            send(self.store, {f"{name}/{file}": folder / file}, self._go_on)

    # --- the end ---------------------------------------------------------------------------------------

    def finish(self, session: Session, finished: bool) -> None:
        """Wait until all is there. All ranks.

        Of a run that is not `finished`, or once a process is asked to stop, for --timeout-seconds at most. RuntimeError where a
        finished run is not there as a whole.
        """
        world, began, end, is_said = self.world, time.monotonic(), None, False
        while True:
            is_done = not world.first or self._worker.wait(min(ROUND_SECONDS, self.limit / 4))
            now, stops = time.monotonic(), session.somebody_stops() or not finished
            if stops and end is None:
                end = now + self.limit
            if world.first and not is_said and not is_done and now - began > QUIET_SECONDS:
                is_said = True
                self.note(
                    f"waiting for the copy in {self.url}{'' if end is None else f', for at most {self.limit:g} s'}"
                )
            if world.from_first(is_done or (end is not None and now > end)):
                break
        problem = world.from_first(self._problem(finished) if world.first else None)
        if problem and finished:
            raise RuntimeError(problem)
        if problem:
            self.note(problem)

    def _problem(self, finished: bool) -> str | None:
        with self._changing:
            missing = [*self._missing.values()]
        if not missing:
            return None
        what = "the run is finished and whole" if finished else "the run's checkpoints are whole"
        return (
            f"{self.url}: lacks {', '.join(name for name, _ in missing)} ({missing[0][1]}); {what} in {self.out}, and the same command "
            "again copies what is missing"
        )


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
