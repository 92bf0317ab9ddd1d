"""The exports and records of a run in its mirror, which the first rank copies there beside the training."""

import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

from shards.output_folder import MODEL, RUN
from shards.part import sha256_file
from shards.store import Store
from shards.store_errors import text_of
from shards.transfer import send
from trainer.export import EXPORTS
from trainer.exported import EXPORTED, FOR_TASKS, Exported
from trainer.going_on import AVERAGE_MODEL
from trainer.mirror_store import CONFIG, files_of, read_models, remove, write_models
from trainer.mirror_worker import Worker
from trainer.run_folder import EVALUATION, METRICS, TASK_SCORES, TENSORBOARD

RECORDS = (RUN, METRICS, EVALUATION, TASK_SCORES, EXPORTED, "wandb.json")
"""The files beside checkpoints and exports that a run goes on with."""


class MirroredExports:
    """Copies of the exports of the run in `out`. missing: those that are not there, with the reason.

    check: called before something is published or deleted; raises where this process must not. go_on: the same, cheaply, before
    each file. failed: told what could not be copied, and why.
    """

    def __init__(
        self, out: Path, store: Store, check: Callable[[], None], go_on: Callable[[], None],
        failed: Callable[[str, Exception], None],
    ) -> None:  # fmt: skip
        self.out, self.store = out, store
        self.worker = Worker("mirror of exports")
        self.missing: dict[str, str] = {}
        self._check, self._go_on, self._failed = check, go_on, failed
        self._sent: dict[str, tuple[int, int]] = {}  # records as they were when they were copied
        self._writing = threading.RLock()

    def forget(self, first_step: int) -> set[str]:
        """Remove the exports that are made again after `first_step`; the names of those that stay."""
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

    def add_missing(self, finished: bool) -> None:
        """Have the exports copied that are in OUT and not there. finished: the run is, so that its last model stays."""
        models, exported = read_models(self.store), Exported(self.out).read()["models"]
        for name, entry in exported.items():
            stays = finished or name.startswith(EXPORTS)  # the others are made again
            if entry.get(FOR_TASKS) or not stays or not (self.out / name / CONFIG).exists():
                continue
            if models.get(name, {}).get("exported") != entry or self.store.size(f"{name}/{CONFIG}") is None:
                self.add(name)

    def add(self, name: str) -> None:
        """Have an export copied beside the training."""
        self.missing[name] = "it was not begun"
        self.worker.submit(partial(self._copy_model, name))

    def _copy_model(self, name: str) -> None:
        try:
            files = files_of(self.out / name)
            self.store.delete(f"{name}/{CONFIG}", self._check)
            last = files.pop(CONFIG)
            send(self.store, {f"{name}/{file}": path for file, path in files.items()}, self._go_on)
            hashes = {file: sha256_file(path) for file, path in (files | {CONFIG: last}).items()}
            with self._writing:
                models = read_models(self.store)
                entry = {"exported": Exported(self.out).read()["models"].get(name), "files": hashes}
                write_models(self.store, models | {name: entry})
                self.send_records()
                self._check()
                self.store.upload(last, f"{name}/{CONFIG}")
            for file in {*self.store.names(name)} - {*hashes}:
                self.store.delete(f"{name}/{file}", self._check)
            self.missing.pop(name, None)
        except Exception as error:
            self.missing[name] = text_of(error)
            self._failed(name, error)

    def send_records(self) -> None:
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
