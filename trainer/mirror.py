"""--mirror URL: checkpoints and exports of a run, copied to an object store or another folder beside the training.

OUT leads: nothing of it is touched for the mirror, and nothing comes from there but to an OUT without checkpoint and model
(trainer/mirror_fetch.py). Each rank copies its share of the files of a checkpoint; the first one puts checkpoint.json last. The
ranks meet over files in OUT, in no collective. What cannot be copied is said, and the training goes on.
"""

import contextlib
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any

from shards.lease import Lease
from shards.output_folder import MODEL, read_record, refuse_other
from shards.store import Store, open_store, temporary_name
from shards.store_errors import text_of
from trainer.config import TrainConfig
from trainer.distributed import World
from trainer.going_on import CHECKPOINTS, first_settings
from trainer.mirror_copies import Copies
from trainer.mirror_ranks import Shares
from trainer.mirror_store import CONFIG, checkpoint_name, require_mirror, whole_steps
from trainer.mirror_worker import Worker
from trainer.run_folder import refuse_other_settings
from trainer.session import Session

RELEASE_SECONDS = 15.0
ROUND_SECONDS = 1.0  # of waiting at the end, after each of which the ranks meet
QUIET_ROUNDS = 2  # before a line says so
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
        self._shares: Shares
        self._copies: Copies  # on the first rank
        self._lease: Lease | None = None
        self._ending = threading.Event()
        self._worker = Worker()
        self._missing: dict[str, tuple[str, str]] = {}  # by the name of the job: what is not there, and why
        self._changing = threading.Lock()

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
        self.world.meet()
        meeting = self.world.from_first(temporary_name(self.out / "mirror"))
        self._shares = Shares(self.out, self.store, self.world, meeting, self._ending)
        if self.world.first:
            self._copies = Copies(self.out, self.store, self._shares, self.keep, self._check)

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
            if hasattr(self, "_shares"):
                shutil.rmtree(self._shares.meeting, ignore_errors=True)

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
        self._copies.records()
        for name in self._copies.missing_exports(finished):
            self.copy_export(name)

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
        self._shares.go_on()
        assert self._lease is not None
        self._lease.check()

    def _copy_checkpoint(self, step: int, saved: Future | None) -> None:
        if saved is not None and saved.exception() is not None:
            return  # which the save itself raises
        self.step_in_work = step
        try:
            self._copies.checkpoint(step, self.damaged)
        finally:
            self.step_in_work = None

    def _copy_export(self, name: str) -> None:
        if not self._copies.export(name):
            self.note(f"{self.url}: {name} is no longer in {self.out}, and is not copied there")

    # --- the end ---------------------------------------------------------------------------------------

    def finish(self, session: Session, finished: bool) -> None:
        """Wait until all is there. All ranks.

        Of a run that is not `finished`, or once a process is asked to stop, for --timeout-seconds at most. RuntimeError where a
        finished run is not there as a whole.
        """
        world, end, rounds = self.world, math.inf, 0
        while True:
            is_done = not world.first or self._worker.wait(min(ROUND_SECONDS, self.limit / 4))
            if session.somebody_stops() or not finished:
                end = min(end, time.monotonic() + self.limit)
            if world.from_first(is_done or time.monotonic() > end):
                break
            rounds += 1
            if rounds == QUIET_ROUNDS:
                self.note(f"waiting for the copy in {self.url}{'' if math.isinf(end) else f', up to {self.limit:g} s'}")
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
