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
from typing import Any

from shards.lease import Lease, LeaseLost
from shards.output_folder import read_record
from shards.store import Store, open_store, temporary_name
from shards.store_errors import text_of
from shards.transfer import send
from trainer.checkpoint import INDEX
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.going_on import CHECKPOINTS
from trainer.mirror_exports import MirroredExports
from trainer.mirror_store import (
    checkpoint_name,
    is_whole,
    remove,
    require_mirror,
    share,
    steps_there,
)
from trainer.mirror_worker import Deadline, Worker
from trainer.rank_reports import POLL_SECONDS, leave_report, signs_of_life, wait_for_report
from trainer.run_folder import TENSORBOARD, refuse_other_settings

GO = "go"
BUSY_SECONDS = 30.0
"""How long a save waits for the copy of the checkpoint before it, once for each copy."""
RELEASE_SECONDS = 15.0
QUIET_SECONDS = 2.0  # of waiting before a line says so


class Mirror:
    """The mirror of a run, on each of its ranks. step_in_work: of the checkpoint that is copied now, which OUT keeps meanwhile."""

    def __init__(self, config: TrainConfig, world: World, note: Callable[[str], None]) -> None:
        assert config.mirror is not None
        self.url, self.out, self.world, self.note = config.mirror.rstrip("/"), config.out, world, note
        self.keep, self.limit = config.keep_checkpoints, config.timeout_seconds
        self.store: Store
        self.exports: MirroredExports  # on the first rank
        self.step_in_work: int | None = None
        self.damaged: set[int] = set()  # steps of checkpoints there that are; the next copy deletes them
        self._lease: Lease | None = None
        self._lost: LeaseLost | None = None
        self._ending = threading.Event()
        self._checkpoints = Worker("mirror of checkpoints")
        self._newest = self._copied = 0  # steps of the run's newest checkpoint, and of the one that was copied last
        self._waited_for: int | None = None
        self._reason = ""  # why the last checkpoint that failed did

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
            for folder in ("", TENSORBOARD):
                self.store.clean(folder)
            self.exports = MirroredExports(self.out, self.store, self._check, self._go_on, self._failed)

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

    def _failed(self, what: str, error: Exception) -> None:
        """Say that something could not be copied; LeaseLost is for the next save to raise."""
        if isinstance(error, LeaseLost):
            self._lost = error
        elif not self._ending.is_set():
            self.note(
                f"{self.url}: {what} could not be copied there ({text_of(error)}); OUT has it, the training goes on, and what is missing "
                "at the end is tried again"
            )

    # --- where a run begins or goes on ----------------------------------------------------------------

    def catch_up(self, step: int, finished: bool) -> None:
        """Begin to copy what it lacks of the run in OUT, which goes on after `step` or is `finished`. All ranks."""
        meeting = None
        if self.world.first:
            self._sweep()
            self.exports.send_records()
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
            self.exports.add_missing(finished)
        self.world.meet()
        if meeting := self.world.from_first(meeting):
            self.copy(step, meeting)

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
            self.exports.send_records()
            self._check()
            self.store.upload(self.out / index, index)
            self._copied = step
            self._retain(step)
        except Exception as error:
            self._reason = text_of(error)
            self._failed(f"step {step:,}", error)
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

    # --- the end --------------------------------------------------------------------------------------

    def finish(self, should_stop: Callable[[], bool], finished: bool) -> None:
        """Wait until the newest checkpoint and all exports are there, and try once more what has failed. All ranks.

        Of a run that is not `finished`, or once should_stop says so, for --timeout-seconds at most. RuntimeError where a finished
        run is not there as a whole.
        """
        world = self.world
        workers = (self._checkpoints, self.exports.worker) if world.first else ()
        waiting = Deadline(
            workers, self.limit, lambda: not finished or should_stop(),
            lambda limit: self.note(f"waiting for the copy in {self.url}{limit}"),
        )  # fmt: skip
        is_in_time = waiting.wait()
        world.meet()
        meeting = None
        if world.first and is_in_time and not self._lost:
            if self._newest > self._copied:
                meeting = self._meet(self._newest)
            for name in list(self.exports.missing):
                self.exports.add(name)
        step, meeting = world.from_first((self._newest, meeting))
        if meeting:
            self.copy(step, meeting)
        waiting.wait()
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
        missing = dict(self.exports.missing)
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
