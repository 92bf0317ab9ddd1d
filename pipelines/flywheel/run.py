"""Run an ordered list of stages, one after the other; those whose result is there are left alone.

    run_stages(stages, folder, should_stop=...)

A stage is done when its record stands. A kill at any moment costs nothing but time: the same call finds what is done,
and the command that was at work goes on in what it has written. A command outlives a driver that is killed; the next
driver waits for it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from pipelines.flywheel.folder import ROOT, Folder, Look, Record, look, words_of, write_record
from pipelines.flywheel.stages import At, Stage, files_of
from pipelines.terminal import STOPPED, note, progress_bar
from shards.lease import machine, process_start
from shards.output_folder import writing

TAIL = 15  # lines of a log that are shown
# writes the process's start down under its own id, and becomes the command
LAUNCH = 'read -r stat < /proc/$$/stat; echo "$stat" >> "$0"; exec "$@"'
format_time = tqdm.format_interval


class StageFailed(RuntimeError):
    """A stage's command failed, or its result was refused."""


@dataclass(frozen=True)
class Outcome:
    """finished: all stages are done; else a signal stopped them. records: of the done stages, by name; ran: those that
    were not done before."""

    finished: bool
    records: dict[str, Record]
    folder: Folder
    ran: list[str]

    def result(self, name: str) -> Path:
        """Where the result of a stage is."""
        return self.folder.result(self.records[name])


def run_stages(
    stages: Sequence[Stage], path: Path, should_stop: Callable[[], bool] = lambda: False, stop_seconds: float = 300
) -> Outcome:
    """Run what is not done yet, in the order of `stages`, with a line on stderr for each.

    should_stop: asked some times per second; when true, the command that runs gets SIGTERM and after stop_seconds a kill.

    Raises ValueError for a list or an input that cannot be used and for a result that was changed, RuntimeError where
    another driver works in the folder, StageFailed where a stage fails.
    """
    if len({stage.slug for stage in stages}) < len(stages):
        raise ValueError(f"the stages are {[stage.name for stage in stages]}, expected different names")
    folder, done, ran = Folder(path), dict[str, Record](), list[str]()
    with writing(folder.path, note), progress_bar(desc="flywheel", unit=" stages", total=len(stages)) as bar:
        driver = Driver(folder, should_stop, stop_seconds, bar)
        try:
            for number, stage in enumerate(stages, 1):
                bar.set_description(f"{stage.name}, reading", refresh=False)
                bar.set_postfix_str("", refresh=False)
                found = look(stage, folder, done)
                if found.waits_for:
                    raise ValueError(
                        f"stage {stage.name} reads {found.waits_for[0]}, which does not stand before it in the list"
                    )
                if found.record is not None and found.change:
                    raise ValueError(
                        f"stage {stage.name}: its result was changed since it was made: {found.change}; put it back, or "
                        f"delete {folder.path / found.record['output']}, and the same command makes it again"
                    )
                name, record = f"[{number}/{len(stages)}] {stage.name}", found.record
                if record is None:
                    if not driver.wait_for_others():
                        break
                    folder.overview(stages, done, running=stage.name)
                    record = driver.make(found, name)
                    if record is None:
                        break
                    ran.append(stage.name)
                done[stage.name] = record
                how = "done" if stage.name in ran else "done before"
                note(f"{name}: {how} ({format_time(record['seconds'])}) -> {record['result']}")
                bar.update()
                if should_stop():
                    break
        finally:
            folder.overview(stages, done)
    return Outcome(len(done) == len(stages), done, folder, ran)


@dataclass
class Driver:
    """Makes the stages of a folder that are not done."""

    folder: Folder
    should_stop: Callable[[], bool]
    stop_seconds: float
    bar: tqdm

    def wait_for_others(self) -> bool:
        """Wait until the commands that a killed driver has left behind are through; False where a signal ends the wait.

        On another machine they cannot be asked for. Those that resume hold the lease of their folder, whoever asks.
        """
        for file in sorted((self.folder.path / "running").glob("*")):
            host, _, stat = file.read_text(errors="replace").partition("\n")
            pid, start = int(stat.split(" ", 1)[0] or 0), stat.rpartition(")")[2].split()[19:20]
            if host != machine():
                note(
                    f"{file.name}: was begun by a driver on another machine, and cannot be seen from here; end it if it still runs"
                )
            elif start and process_start(pid) == start[0]:
                note(
                    f"waits for {file.name}, which a driver that is gone has started and which goes on as process {pid} (log: "
                    f"{self.folder.path}/logs/{file.name}.log); to stop it: kill {pid}"
                )
                while process_start(pid) == start[0]:
                    if self.should_stop():
                        return False
                    time.sleep(0.2)
            file.unlink(missing_ok=True)
        return True

    def make(self, found: Look, name: str) -> Record | None:
        """Run a stage's command and record its result; None where a signal stopped it."""
        stage, key, folder = found.stage, found.key, self.folder
        output, log, running = (folder.place(kind, stage, key) for kind in ("stages", "logs", "running"))
        made = not stage.resumes and output.exists()  # checked and renamed by a driver that died before its record
        attempt = folder.attempt(stage, key, begins=not made)
        if made:
            return write_record(found, folder, output, attempt)
        work = output if stage.resumes else folder.part(stage, key)
        for place in (work, log, running):
            place.parent.mkdir(parents=True, exist_ok=True)
        if not stage.resumes:
            clear(work)
        if At("state") in (*stage.words, *stage.environment.values()):
            folder.place("state", stage, key).mkdir(parents=True, exist_ok=True)
        running.write_text(f"{machine()}\n")
        note(f"{name}: started, log: {log}")
        begin = log.stat().st_size if log.exists() else 0
        code, asked = self.run(found, work, log, running)
        running.unlink(missing_ok=True)
        tail = log_tail(log, TAIL, begin)
        # a command that starts anew may leave with 0 when it is told to end, with half of its work
        if asked and (code != 0 or not stage.resumes):
            return None
        if code != 0:
            note("\n".join(f"  | {line}" for line in tail))
        if code == STOPPED:  # a signal to it alone, or its own idea
            note(
                f"{name}: ended with exit code 3, stopped and can go on, expected 0 since nothing here has stopped it; "
                f"the same command goes on with it (log: {log})"
            )
            return None
        if code != 0:
            how = f"failed with exit code {code}" if code > 0 else f"was ended by signal {-code}"
            said = next((line for line in reversed(tail) if not line.startswith("---")), "it printed nothing")
            raise StageFailed(
                f"stage {stage.name} {how}: {said} (log: {log}); the same command again goes on from here"
            )
        self.bar.set_description(f"{stage.name}, reading")
        try:
            result = work / stage.result
            if not stage.resumes:
                require_own(result)
            if stage.check is not None:
                stage.check(result, found.paths)
            if not stage.resumes:
                sync(result)
                os.rename(work, output)
            return write_record(found, folder, output, attempt)
        except (ValueError, OSError) as error:
            message = f"stage {stage.name}: its command ended well, but its result is refused: {error} (log: {log})"
            raise StageFailed(message) from None

    def run(self, found: Look, work: Path, log: Path, running: Path) -> tuple[int, bool]:
        """Run a stage's command into its log. Its exit code, -N for signal N, and whether it was asked to end."""
        stage = found.stage
        variables = words_of(self.folder, found, work, stage.environment.values())
        command = ["/bin/sh", "-c", LAUNCH, str(running), *words_of(self.folder, found, work, stage.words)]
        with open(log, "ab") as file:
            file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {stage.name}\n".encode())
            file.flush()
            # a session of its own: Ctrl-C reaches the driver alone, which hands it on
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
                env=environment_of(stage) | dict(zip(stage.environment, variables)),
            )  # fmt: skip
        began, shown, asked = time.monotonic(), 0.0, 0.0
        try:
            while process.poll() is None:
                time.sleep(0.05)
                now = time.monotonic()
                if now - shown > (1 if sys.stderr.isatty() else 60):
                    shown = now
                    self.bar.set_description(f"{stage.name}, {format_time(now - began)}", refresh=False)
                    self.bar.set_postfix_str((log_tail(log, 1) or [""])[-1][:120])
                if not asked and self.should_stop():
                    asked = now
                    process.terminate()
                if asked and now > asked + self.stop_seconds:
                    break
        finally:  # what is left of it and of what it has started
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return process.wait(), bool(asked)


def environment_of(stage: Stage) -> dict[str, str]:
    """Variables of a command; one of ours imports the packages of this process, whatever lies in the current folder."""
    variables = os.environ | {"PYTHONUNBUFFERED": "1"}
    if any(isinstance(word, str) and word.split(".")[0] in ("pipelines", "benchmarks") for word in stage.command):
        if not any(word.endswith(".py") for word in stage.launcher):  # which may have modules beside it
            variables["PYTHONSAFEPATH"] = "1"  # python -m would look in the current folder first
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return variables


def clear(folder: Path) -> None:
    """An empty folder; where a command has put a link in its place, the link goes and what it leads to stays."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def require_own(result: Path) -> None:
    """ValueError where a stage's result is a link, or holds one that leads out of it: what it is would not be in it."""
    inside = result.parent.resolve() / result.name
    for path in (result, *result.rglob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(inside):
            raise ValueError(f"{path}: is a link to {path.resolve()}, expected a copy of what it leads to")


def sync(result: Path) -> None:
    """Have the disk hold a result before its folder gets its name."""
    for file in files_of(result).values():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def log_tail(log: Path, lines: int, begin: int = 0) -> list[str]:
    """The last lines of a log from byte `begin` on, none where it was deleted; of a progress bar the last state."""
    try:
        with open(log, "rb") as file:
            file.seek(max(begin, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in shown if line][-lines:]
