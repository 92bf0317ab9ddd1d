"""Run a graph of stages: those whose result is there are left alone, the others run as soon as what they read is done.

    run_stages(stages, folder, jobs=2, should_stop=..., watch=...)

A stage is done when its record stands and its result is still what the record says. A kill at any moment, of this
process or of any that it has started, costs the stages that were running, and those that resume go on.
"""

import contextlib
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.flywheel import records
from pipelines.flywheel.fingerprint import Known, read_files, require_own
from pipelines.flywheel.process import Process
from pipelines.flywheel.records import Places, Record
from pipelines.flywheel.stage import Input, Output, Stage, State, Unkeyed, Word, check_graph
from pipelines.flywheel.survey import Look, changed_input, look

STOPPED = 3  # exit code of a command that a signal has stopped and that can go on
Watch = Callable[[str, Stage, Record], None]
"""watch("done before" | "changed" | "reading" | "started" | "stopped" | "finished" | "running", stage, facts), in this
thread.

facts: the record of a done stage; {"log", "output"} of one that starts; {"change", "aside"} of one whose result was
changed; {"log", "seconds"} of those that are running, some times per second;
{"log", "lines"} of one that has ended with code 3 unasked, with its last lines; {} of one whose inputs or result are read.
"""


class StageFailed(RuntimeError):
    """A stage's command failed, or its result was refused. log: the last lines that it printed."""

    def __init__(self, message: str, log: list[str]) -> None:
        super().__init__(message)
        self.log = log


@dataclass(frozen=True)
class Outcome:
    """finished: all stages are done; else a signal stopped them. records: of the done stages, by name."""

    finished: bool
    records: dict[str, Record]
    places: Places

    def result(self, name: str) -> Path:
        """Where the result of a stage is."""
        return self.places.result(self.records[name])


def run_stages(
    stages: Sequence[Stage],
    folder: Path,
    jobs: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Watch = lambda what, stage, facts: None,
    stop_seconds: float = 300,
) -> Outcome:
    """Run what is not done yet, at most `jobs` stages at once, in the order of `stages` where there is a choice.

    should_stop: asked some times per second; when true, the running stages get SIGTERM and after stop_seconds a kill.

    Raises ValueError for a graph, an input or a folder that cannot be used, StageFailed where a stage fails (the others
    that run are stopped first).
    """
    check_graph(stages)
    if jobs < 1:
        raise ValueError(f"--jobs is {jobs}, expected at least 1")
    with records.one_driver(folder) as lock:
        return Driver(stages, folder, jobs, lock, watch).run(should_stop, stop_seconds)


class Driver:
    """The loop of `run_stages`, by the one who holds the folder's lock."""

    def __init__(self, stages: Sequence[Stage], folder: Path, jobs: int, lock: int, watch: Watch) -> None:
        self.stages, self.jobs, self.lock, self.watch = list(stages), jobs, lock, watch
        self.places = Places(folder)
        self.known = Known(self.places.folder / records.KNOWN)
        self.done: dict[str, Record] = {}
        self.running: dict[str, tuple[Process, Look]] = {}
        self.cores = sorted(os.sched_getaffinity(0))
        self.free = list(self.cores)

    def run(self, should_stop: Callable[[], bool], stop_seconds: float) -> Outcome:
        failure: StageFailed | None = None
        stopped_at: float | None = None
        changed = True  # since the stages were looked at
        try:
            while True:
                stopping = failure is not None or stopped_at is not None
                if not stopping and changed:
                    try:
                        self.begin_what_can()
                    except ValueError as error:
                        if not self.running:
                            raise
                        failure = StageFailed(str(error), [])  # what runs is asked to end, not killed
                    changed = False
                if not self.running:
                    break
                time.sleep(0.05)
                for name in list(self.running):
                    process, _ = self.running[name]
                    facts = {"log": str(process.log), "seconds": process.seconds}
                    self.watch("running", process.stage, facts)
                    code = process.poll()
                    if code is None:
                        continue
                    changed = True
                    try:
                        self.end(name, code, stopped_at is not None)
                    except StageFailed as error:
                        failure = failure or error
                    except OSError as error:  # a full disk, say, under its result or its record
                        failure = failure or StageFailed(f"stage {name}: {error}; the same command again goes on", [])
                    else:
                        if name not in self.done and stopped_at is None:
                            stopped_at = time.monotonic()  # a signal that came to the stage alone
                            self.stop_all()
                if stopped_at is None and (failure or should_stop()):
                    stopped_at = time.monotonic()
                    self.stop_all()
                if stopped_at is not None and time.monotonic() > stopped_at + stop_seconds:
                    break
        finally:
            for process, _ in self.running.values():
                process.kill()
            self.running.clear()
            self.known.save()
            self.write_overview()
        if failure is not None:
            raise failure
        return Outcome(len(self.done) == len(self.stages), dict(self.done), self.places)

    def begin_what_can(self) -> None:
        """Take note of what is done, and start what may run now."""
        progress = True
        while progress:  # a stage that is found done may let an earlier one in the list go on
            progress = False
            for stage in self.stages:
                if stage.name in self.done or stage.name in self.running:
                    continue
                if any(isinstance(source, Stage) and source.name not in self.done for source in stage.inputs.values()):
                    continue
                self.watch("reading", stage, {})
                found = look(stage, self.places, self.done, self.known)
                if any(found.key == process.key for process, _ in self.running.values()):
                    continue  # the same work under another name: its record will do
                if found.record is not None and found.change:
                    for reader in self.stages:
                        # what they have begun may be made of the changed result; what they have done is not
                        if stage in reader.inputs.values():
                            self.places.drop_unfinished(reader)
                    aside = self.places.set_aside(found.record)
                    self.watch("changed", stage, {"change": found.change, "aside": str(aside)})
                elif found.record is not None:
                    self.done[stage.name] = found.record
                    self.watch("done before", stage, found.record)
                    progress = True
                    continue
                cores = self.take_cores(stage)
                if len(self.running) < self.jobs and cores is not None:
                    self.start(found, cores)
                    self.write_overview()
        self.known.save()

    def take_cores(self, stage: Stage) -> list[int] | None:
        """Cores for a stage, [] for all of them without a bound, None where too few are free."""
        share = max(1, len(self.cores) // self.jobs)
        wanted = min(stage.threads or share, len(self.cores))
        if wanted > len(self.free):
            return None
        return [] if wanted == len(self.cores) else self.free[:wanted]

    def start(self, found: Look, cores: list[int]) -> None:
        stage, key = found.stage, found.key
        assert key is not None
        output = self.places.output(stage, key)
        folder = output if stage.resumes else self.places.part(stage, key)
        if stage.resumes:
            folder.parent.mkdir(parents=True, exist_ok=True)  # the command makes its folder itself
        else:
            records.clear(folder)
        state = self.places.state(stage, key)

        def absolute(word: Word) -> str:
            if isinstance(word, Input):
                path = found.inputs[word.name][0]
                return word.written or f"{word.prefix}{path / word.sub if word.sub else path}{word.suffix}"
            if isinstance(word, Output):
                return str(folder / word.sub) if word.sub else str(folder)
            if isinstance(word, State):
                (state / word.sub).mkdir(parents=True, exist_ok=True)
                return str(state / word.sub) if word.sub else str(state)
            return word.text if isinstance(word, Unkeyed) else word

        command = [*stage.launcher, *map(absolute, stage.command)]
        environment = {name: absolute(word) for name, word in stage.environment.items()}
        log = self.places.log(stage, key)
        process = Process(stage, key, command, environment, folder, log, cores)
        records.started(self.places, key, log, process.began)
        self.watch("started", stage, {"log": str(log), "output": str(folder)})
        self.free = [core for core in self.free if core not in (cores or self.cores)]
        self.running[stage.name] = (process, found)
        process.start(self.lock)

    def end(self, name: str, code: int, stopping: bool) -> None:
        """Record a stage whose process has ended; StageFailed where it did not do its work.

        stopping: it was asked to end, so that any exit code but 0 says that it has more to do; 0 too where it may.
        """
        process, found = self.running.pop(name)
        process.kill()  # closes our end of its pipe
        self.free = sorted([*self.free, *(process.cores or self.cores)])
        stage, key = process.stage, process.key
        attempts = records.ended(self.places, key, process.seconds)
        tail = process.tail()
        if code == STOPPED or (stopping and (code != 0 or stage.zero_may_stop)):
            if not stopping:  # nobody has asked it to here: a signal to it alone, or its own idea
                self.watch("stopped", stage, {"log": str(process.log), "lines": tail})
            return
        if code != 0:
            by_signal = code - 128 in signal.valid_signals()
            how = f"was ended by signal {code - 128}" if by_signal else f"failed with exit code {code}"
            said = next((line for line in reversed(tail) if not line.startswith("---")), "it printed nothing")
            raise StageFailed(
                f"stage {stage.name} {how}: {said} (log: {process.log}); the same command again goes on from here", tail
            )
        result = process.folder / stage.result if stage.result else process.folder
        self.watch("reading", stage, {})
        try:
            require_own(result)
            files = read_files(result)
            if stage.check is not None:
                stage.check(result, {name: path for name, (path, _) in found.inputs.items()})
            if change := changed_input(found, self.places, self.done, self.known):
                self.places.drop_unfinished(stage)  # it is made of both, and would be taken for a beginning
                raise ValueError(change)
        except (ValueError, OSError) as error:
            raise StageFailed(
                f"stage {stage.name}: its command ended well, but its result is refused: {error} (log: {process.log})",
                tail,
            ) from None
        sync(result, files)
        output = self.places.output(stage, key)
        if not stage.resumes:
            shutil.rmtree(output, ignore_errors=True)
            os.rename(process.folder, output)
        self.done[name] = records.write_record(self.places, process, found, attempts, output, files)
        shutil.rmtree(self.places.state(stage, key), ignore_errors=True)
        self.places.attempts(key).unlink(missing_ok=True)
        self.watch("finished", stage, self.done[name])
        self.write_overview()

    def stop_all(self) -> None:
        for process, _ in self.running.values():
            with contextlib.suppress(ProcessLookupError):
                process.stop()

    def write_overview(self) -> None:
        def states() -> Iterator[tuple[Stage, str, Record | None]]:
            for stage in self.stages:
                if stage.name in self.done:
                    yield stage, "done", self.done[stage.name]
                else:
                    yield stage, "running" if stage.name in self.running else "to run", None

        self.places.overview(list(states()))


def sync(result: Path, files: Mapping[str, object]) -> None:
    """Have the disk hold a result before its record says that it is there."""
    for name in files:
        descriptor = os.open(result / name if name else result, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
