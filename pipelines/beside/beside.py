"""Evaluate the models of a run on tasks beside its training, one after the other.

In: what the training exports. Out: a line of OUT/tasks.jsonl for each model, OUT/tensorboard/tasks, and a line for the user.
What waits is what lies there and has no line in the table, so a kill at any point loses nothing: the same command again finds
it. An export is renamed into place whole, and deleted once its line is written, unless --export-every keeps it.
"""

import contextlib
import json
import shutil
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from pipelines.beside import scores
from pipelines.beside.process import Launch, Running, last_words
from shards.lease import LeaseLost, lease_numbers, read_lease
from shards.output_folder import MODEL, read_record
from shards.store import TEMPORARY_SUFFIX, open_store, temporary_name
from trainer.config import TrainConfig
from trainer.export import EXPORTS
from trainer.exported import BEGUN, FOR_TASKS, Exported
from trainer.going_on import begins_at
from trainer.loggers import score_figures
from trainer.run_folder import TENSORBOARD

LOOK_SECONDS = 0.5  # between two looks at the folder of exports
MAX_FAILURES = 20  # of looks in a row
MAX_WAITING = 3
"""Exports that wait for their evaluation, or whose evaluation failed. Beyond that the oldest is passed over and deleted: a disk
that runs full would end the training."""
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
"""A base without any of these is not evaluated; its exports get the tokenizer of the shards."""


class Beside:
    """The evaluations of a run, from `start` to `close`. They never raise: what goes wrong is told to `note`.

    options: of remit eval, without --model and --out.
    """

    def __init__(self, config: TrainConfig, options: list[str], note: Callable[[str], None]) -> None:
        self.config, self.options, self.note = config, options, note
        self.out = config.out.absolute()
        self.folder = self.out / scores.FOLDER
        self.failed: dict[int, str] = {}
        self.complete = False
        """Whether nothing is left to evaluate after the training, but for what failed."""
        self._before = self._begun()
        self._trained, self._stop = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._token = ""  # of the training's lease
        self._board: Any = None

    def start(self, launch: Launch) -> None:
        """Begin to look for exports; those of this command, once the training has gone to its checkpoint."""
        self._thread = threading.Thread(target=self._work, args=(launch,), name="tasks", daemon=True)
        self._thread.start()

    def finish(self, should_stop: Callable[[], bool]) -> bool:
        """After the training: wait for what is left. False where the caller asked to stop before that."""
        if self._thread is None or self.complete or self._stop.is_set():
            return self.complete
        if waiting := [step for step in self.waiting() if step not in self.failed]:
            self.note(
                f"waiting for the task scores of {_steps(waiting)}; a signal ends that, and the same command goes on"
            )
        self._trained.set()
        while self._thread.is_alive():
            self._thread.join(LOOK_SECONDS)
            if should_stop():
                self.close()
                return False
        if self.failed:
            self.note(f"no task scores of {_steps(self.failed)}; the same command again tries once more")
        self.complete = True
        return True

    def summary(self) -> str:
        """One line about a finished run: the scores of its last model, and the mean of the base."""
        lines = {line["step"]: line for line in scores.read_scores(self.out)}
        last = lines.get(self._exported().get(MODEL, {}).get("step", -1))
        if last is None:
            model = self.config.out / MODEL
            return f"task scores: none of the last model; the same command again evaluates it, as does remit eval --model {model}"
        first, before = lines.get(0, {}), ""
        if first.get("mean") and last.get("mean") and {*first["tasks"]} == {*last["tasks"]}:
            before = f"; mean of the base {100 * first['mean']['value']:.2f} %"
        return f"task scores after {last['step']:,} steps: {scores.in_words(last)}{before}"

    def close(self) -> None:
        """End an evaluation that runs; what it has answered is kept."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def waiting(self) -> dict[int, Path]:
        """The models that have no line in the table, by step: the base, exports, the last one."""
        there: dict[int, Path] = {}
        record, base = read_record(self.out), Path(self.config.model).absolute()
        if (record is None or begins_at(record) == 0) and any((base / name).exists() for name in TOKENIZERS):
            there[0] = base
        models = self._exported()
        every = self.config.eval_tasks_every
        for folder in (self.out / EXPORTS).glob("step-*"):
            step = folder.name.removeprefix("step-")
            if step.isdigit() and (self._is_ours(models, int(step)) or (every and int(step) % every == 0)):
                there[int(step)] = folder
        if (self.out / MODEL).exists() and MODEL in models:
            there[models[MODEL]["step"]] = self.out / MODEL
        known = {line["step"] for line in scores.read_scores(self.out)}
        return {step: there[step] for step in sorted(there) if step not in known}

    def _work(self, launch: Launch) -> None:
        try:
            while not self._is_begun() and not self._trained.is_set():
                if self._stop.wait(LOOK_SECONDS):
                    return
            self._token = self._newest_token()
            failures = 0
            while not self._stop.is_set():
                try:
                    if not self._look(launch):
                        return
                    failures = 0
                except OSError as error:  # of a shared filesystem that stumbles
                    failures += 1
                    if failures == 1:
                        self.note(f"task scores: {error}; looking again")
                    if failures == MAX_FAILURES:
                        raise
                    self._stop.wait(LOOK_SECONDS)
        except Exception as error:  # whatever it is, it must not end a training
            self.note(
                f"task scores: {type(error).__name__}: {error}; no more of them now, the same command again goes on"
            )
        finally:
            if self._board is not None:
                self._board.close()

    def _look(self, launch: Launch) -> bool:
        """Evaluate the next model, or wait a little; False where nothing is left and nothing will come."""
        is_last_look = self._trained.is_set()
        self._sweep()
        self._make_room()
        found = [(step, folder) for step, folder in self.waiting().items() if step not in self.failed]
        if found:
            self._evaluate(*found[0], launch)
        elif not is_last_look:
            self._stop.wait(LOOK_SECONDS)
        return bool(found) or not is_last_look

    def _evaluate(self, step: int, folder: Path, launch: Launch) -> None:
        """One model, in a process of its own."""
        self.folder.mkdir(exist_ok=True)
        log, result = self.folder / f"step-{step:06d}.log", self.folder / f".step-{step:06d}.json"
        for file in (log, result):
            file.unlink(missing_ok=True)
        before = _identity(folder)
        words = [str(result), *self.options, "--model", str(folder), "--out", str(self.folder)]
        running = launch(words, log)
        try:
            code = self._wait_for(running, step)
        except BaseException:
            running.end()
            raise
        if code is None:
            return
        if step and before != _identity(folder):
            return  # the training has deleted it, and makes it again
        if code or not result.exists():
            self.failed[step] = reason = last_words(log, code)
            self.note(
                f"no task scores of step {step:,}: {reason} (log: {log}); the training goes on, and the same command again "
                "tries once more"
            )
            return
        line = {"step": step, **json.loads(result.read_text(encoding="utf-8"))}
        self._require_own_folder()
        scores.add(self.out, line)
        if step and self._is_ours(self._exported(), step):
            self._delete(folder, line)
        for file in (log, result):
            file.unlink(missing_ok=True)
        self.note(f"task scores of step {step:,}: {scores.in_words(line)}")
        self._show(line)

    def _wait_for(self, running: Running, step: int) -> int | None:
        """Its exit code; None where it was ended."""
        while (code := running.wait(LOOK_SECONDS)) is None:
            if self._stop.is_set():
                running.end()
                return None
            self._make_room(step)
        return code

    def _sweep(self) -> None:
        """Delete what a kill or an error left after a line was written: exports for the tasks alone, and halves of them.

        The training writes no export of a step with a line: a resume cuts the lines of the steps that it makes again.
        """
        lines = {f"step-{line['step']:06d}": line for line in scores.read_scores(self.out)}
        models = self._exported()
        for path in sorted((self.out / EXPORTS).glob("*step-*")):
            name = path.name.removeprefix(".").partition(".")[0]
            if name not in lines:
                continue
            if path.name == name and self._is_ours(models, lines[name]["step"]):
                self._require_own_folder()
                self._delete(path, lines[name])
            elif path.match(f".{name}.*{TEMPORARY_SUFFIX}"):
                self._require_own_folder()
                shutil.rmtree(path, ignore_errors=True)

    def _make_room(self, in_work: int | None = None) -> None:
        """Pass over the oldest of the exports that wait, where there are too many."""
        models = self._exported()
        ours = [
            (step, path) for step, path in self.waiting().items() if step != in_work and self._is_ours(models, step)
        ]
        for step, folder in ours[: max(0, len(ours) - MAX_WAITING)]:
            why = self.failed.pop(step, f"{MAX_WAITING} later ones waited already")
            self._require_own_folder()
            line = {"step": step, "skipped": why}
            scores.add(self.out, line)
            self._delete(folder, line)
            self.note(
                f"no task scores of step {step:,}, whose export is deleted: {why}; a larger --eval-tasks-every, fewer tasks or a "
                "limit, or --eval-device help, and --export-every keeps exports"
            )

    def _delete(self, folder: Path, line: scores.Line) -> None:
        """Delete an export that has its line in the table, its answers first: while the export is there, _sweep comes back."""
        if "results" in line:
            for answers in (self.out / line["results"]).parent.glob("answers-*"):
                answers.unlink(missing_ok=True)
        gone = temporary_name(folder)
        with contextlib.suppress(FileNotFoundError):
            folder.rename(gone)  # no reader sees half of it
            shutil.rmtree(gone, ignore_errors=True)

    def _exported(self) -> dict[str, Any]:
        """What exported.json says of each export."""
        models: dict[str, Any] = Exported(self.out).read()["models"]
        return models

    @staticmethod
    def _is_ours(models: dict[str, Any], step: int) -> bool:
        """Whether an export is there for the tasks alone."""
        return bool(models.get(f"{EXPORTS}/step-{step:06d}", {}).get(FOR_TASKS))

    def _begun(self) -> int:
        """Counts the commands that have begun to train here: each does so once it has deleted what it makes again."""
        return int(Exported(self.out).read().get(BEGUN, 0))

    def _is_begun(self) -> bool:
        """Whether the training of this command has gone to its checkpoint."""
        try:
            return self._begun() != self._before
        except OSError:  # of a shared filesystem that stumbles; the next look tells
            return False

    def _newest_token(self) -> str:
        """Of the lease of the run's folder, "" where nobody holds one."""
        store = open_store(self.out)
        number = max(lease_numbers(store), default=0)
        return str((read_lease(store, number) or {}).get("token", "")) if number else ""

    def _require_own_folder(self) -> None:
        """LeaseLost where another training holds the folder by now. After the training nobody does."""
        if self._newest_token() not in ("", self._token):
            raise LeaseLost(f"{self.out}: another training has taken this folder over; this one publishes nothing more")

    def _show(self, line: scores.Line) -> None:
        """Add a line to TensorBoard. What that has of earlier commands is hidden and written anew, as the table is now."""
        from torch.utils.tensorboard import SummaryWriter

        lines = [line]
        if self._board is None:
            self._board = SummaryWriter(str(self.out / TENSORBOARD / scores.FOLDER), purge_step=0)
            lines = scores.read_scores(self.out)
        for each in lines:
            for name, value in score_figures(each).items():
                self._board.add_scalar(f"tasks/{name}", value, each["step"])
        self._board.flush()


def _identity(path: Path) -> tuple[int, int] | None:
    """Of a file or folder: another one of the same name has another."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def _steps(steps: Iterable[int]) -> str:
    names = [f"{step:,}" for step in steps]
    return f"step{'s' if len(names) > 1 else ''} {', '.join(names)}"
