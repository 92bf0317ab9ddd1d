"""Run an ordered list of stages, one after the other; those whose result is there are left alone.

    run_stages(stages, folder, should_stop=..., watch=...)

A stage is done when its record stands. A kill at any moment costs nothing but time: the same call finds what is done,
and the command that was at work goes on in what it has written. A command outlives a driver that is killed; the next
driver waits for it.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipelines.flywheel.folder import ROOT, Attempts, Folder, Look, Record, look, record_of, words_of
from pipelines.flywheel.stages import Stage, check_order, files_of
from pipelines.terminal import STOPPED, note
from shards.lease import machine, process_start
from shards.output_folder import writing

TAIL = 15  # lines of a log that are shown
Watch = Callable[[str, Stage, Record], None]
"""watch("reading" | "done before" | "waits" | "started" | "running" | "stopped" | "finished", stage, facts).

facts: the record of a done stage; {"log"} of one that starts; {"pid"} of the command that is waited for; {"log", "seconds"}
of the one that runs, some times per second; {"log", "lines"} of one that has ended with code 3 unasked.
"""
# writes the process's start down under its own id, and becomes the command
LAUNCH = 'read -r stat < /proc/$$/stat; echo "$stat" >> "$0"; exec "$@"'


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
    folder: Folder

    def result(self, name: str) -> Path:
        """Where the result of a stage is."""
        return self.folder.result(self.records[name])


def run_stages(
    stages: Sequence[Stage],
    path: Path,
    should_stop: Callable[[], bool] = lambda: False,
    watch: Watch = lambda what, stage, facts: None,
    stop_seconds: float = 300,
) -> Outcome:
    """Run what is not done yet, in the order of `stages`.

    should_stop: asked some times per second; when true, the command that runs gets SIGTERM and after stop_seconds a kill.

    Raises ValueError for a list or an input that cannot be used and for a result that was changed, RuntimeError where
    another driver works in the folder, StageFailed where a stage fails.
    """
    check_order(stages)
    folder, done = Folder(path), dict[str, Record]()
    with writing(folder.path, note):
        try:
            for stage in stages:
                watch("reading", stage, {})
                found = look(stage, folder, done)
                if found.change:
                    assert found.record is not None
                    raise ValueError(
                        f"stage {stage.name}: its result was changed since it was made: {found.change}; put it back, or "
                        f"delete {folder.path / found.record['output']}, and the same command makes it again"
                    )
                record, what = found.record, "done before"
                if record is None:
                    if not wait_for_others(folder, stage, should_stop, watch):
                        break
                    folder.overview(stages, done, running=stage.name)
                    record, what = make(found, folder, should_stop, watch, stop_seconds), "finished"
                    if record is None:
                        break
                done[stage.name] = record
                watch(what, stage, record)
                if should_stop():
                    break
        finally:
            folder.overview(stages, done)
    return Outcome(len(done) == len(stages), done, folder)


def wait_for_others(folder: Folder, stage: Stage, should_stop: Callable[[], bool], watch: Watch) -> bool:
    """Wait until the commands that a killed driver has left behind are through; False where a signal ends the wait.

    On another machine they cannot be asked for. Those that resume hold the lease of their folder, whoever asks.
    """
    for file in sorted((folder.path / "running").glob("*")):
        host, _, stat = file.read_text(errors="replace").partition("\n")
        pid, start = int(stat.split(" ", 1)[0] or 0), stat.rpartition(")")[2].split()[19:20]
        if host != machine():
            note(
                f"{file.name}: was begun by a driver on another machine, and cannot be seen from here; end it if it still runs"
            )
        told = False
        while host == machine() and start and process_start(pid) == start[0]:
            if not told:
                watch(
                    "waits",
                    stage,
                    {"pid": pid, "for": file.name, "log": str(folder.path / "logs" / f"{file.name}.log")},
                )
            told = True
            if should_stop():
                return False
            time.sleep(0.2)
        file.unlink(missing_ok=True)
    return True


def make(
    found: Look, folder: Folder, should_stop: Callable[[], bool], watch: Watch, stop_seconds: float
) -> Record | None:
    """Run a stage's command and record its result; None where a signal stopped it."""
    stage, key = found.stage, found.key
    assert key is not None
    output, log = folder.place("stages", stage, key), folder.place("logs", stage, key)
    attempts = Attempts(folder, stage, key)
    if not stage.resumes and output.exists():  # checked and renamed by a driver that died before its record
        return record_of(found, folder, output, attempts)
    work = output if stage.resumes else folder.part(stage, key)
    if stage.resumes:
        work.parent.mkdir(parents=True, exist_ok=True)  # the command makes its folder itself
    else:
        clear(work)
    running = folder.place("running", stage, key)
    for place in (log, running):
        place.parent.mkdir(parents=True, exist_ok=True)
    running.write_text(f"{machine()}\n")
    attempts.begin()
    watch("started", stage, {"log": str(log)})
    start = log.stat().st_size if log.exists() else 0
    environment = environment_of(stage) | {
        name: words_of(folder, found, work, (word,))[0] for name, word in stage.environment.items()
    }
    command = ["/bin/sh", "-c", LAUNCH, str(running), *words_of(folder, found, work, stage.words)]
    code, asked = run(stage, command, environment, log, should_stop, watch, stop_seconds)
    running.unlink(missing_ok=True)
    attempts.end()
    tail = log_tail(log, TAIL, start)
    # a command that starts anew may leave with 0 when it is told to end, with half of its work
    if code == STOPPED or (asked and (code != 0 or not stage.resumes)):
        if not asked:  # a signal to it alone, or its own idea
            watch("stopped", stage, {"log": str(log), "lines": tail})
        return None
    if code != 0:
        how = (
            f"was ended by signal {code - 128}"
            if code - 128 in signal.valid_signals()
            else f"failed with exit code {code}"
        )
        said = next((line for line in reversed(tail) if not line.startswith("---")), "it printed nothing")
        raise StageFailed(
            f"stage {stage.name} {how}: {said} (log: {log}); the same command again goes on from here", tail
        )
    watch("reading", stage, {})
    try:
        result = work / stage.result if stage.result else work
        if not stage.resumes:
            require_own(result)
        if stage.check is not None:
            stage.check(result, {name: path for name, (path, _) in found.inputs.items()})
        if not stage.resumes:
            sync(result)
            os.rename(work, output)
        return record_of(found, folder, output, attempts)
    except (ValueError, OSError) as error:
        message = f"stage {stage.name}: its command ended well, but its result is refused: {error} (log: {log})"
        raise StageFailed(message, tail) from None


def environment_of(stage: Stage) -> dict[str, str]:
    """Variables of a command; one of ours imports the packages of this process, whatever lies in the current folder."""
    variables = os.environ | {"PYTHONUNBUFFERED": "1"}
    if any(isinstance(word, str) and word.split(".")[0] in ("pipelines", "benchmarks") for word in stage.command):
        if not any(word.endswith(".py") for word in stage.launcher):  # which may have modules beside it
            variables["PYTHONSAFEPATH"] = "1"  # python -m would look in the current folder first
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return dict(variables)


def run(
    stage: Stage, command: list[str], environment: dict[str, str], log: Path, should_stop: Callable[[], bool],
    watch: Watch, stop_seconds: float,
) -> tuple[int, bool]:  # fmt: skip
    """Run a command into its log. Its exit code, 128 + N for signal N, and whether it was asked to end."""
    with open(log, "ab") as file:
        file.write(f"--- {time.strftime('%Y-%m-%d %H:%M:%S')} {stage.name}\n".encode())
        file.flush()
        # a session of its own: Ctrl-C reaches the driver alone, which hands it on
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    began, asked = time.monotonic(), 0.0
    try:
        while process.poll() is None:
            time.sleep(0.05)
            now = time.monotonic()
            watch("running", stage, {"log": str(log), "seconds": now - began})
            if not asked and should_stop():
                asked = now
                process.terminate()
            if asked and now > asked + stop_seconds:
                break
    finally:  # what is left of it and of what it has started
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    code = process.wait()
    return (code if code >= 0 else 128 - code), bool(asked)


def clear(folder: Path) -> None:
    """An empty folder; where a command has put a link in its place, the link goes and what it leads to stays."""
    if folder.is_symlink():
        folder.unlink()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def require_own(result: Path) -> None:
    """ValueError where a stage's result is a link, or holds one that leads out of it: what it is would not be in it."""
    inside = os.path.realpath(result)
    for where, folders, files in os.walk(result):
        for path in (Path(where, name) for name in (*folders, *files)):
            target = os.path.realpath(path)
            if path.is_symlink() and os.path.commonpath([inside, target]) != inside:
                raise ValueError(f"{path}: is a link to {target}, expected a copy of what it leads to")
    if result.is_symlink():
        raise ValueError(f"{result}: is a link to {inside}, expected a folder with copies of what is there")


def sync(result: Path) -> None:
    """Have the disk hold a result before its folder gets its name."""
    for file in files_of(result).values():
        with open(file, "rb") as opened:
            os.fsync(opened.fileno())


def log_tail(log: Path, lines: int, start: int = 0) -> list[str]:
    """The last lines of a log from byte `start` on; of what a progress bar wrote over itself, the last state."""
    try:
        with open(log, "rb") as file:
            file.seek(max(start, log.stat().st_size - 20_000))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    shown = [line.rstrip("\r").rpartition("\r")[2].rstrip() for line in text.split("\n")]
    return [line for line in shown if line][-lines:]
