"""What the first rank copies to the mirror of a run (--mirror): checkpoints, with the other ranks, exports and records."""

from collections.abc import Callable
from pathlib import Path

from shards.output_folder import MODEL, read_record
from shards.store import Store
from shards.transfer import send, upload
from trainer.checkpoint_files import INDEX, read_files
from trainer.export import EXPORTS
from trainer.exported import FOR_TASKS, Exported
from trainer.going_on import AVERAGE_MODEL, fingerprint, length_of, settings_now
from trainer.mirror_ranks import Shares
from trainer.mirror_store import CONFIG, RECORDS, checkpoint_name, files_of, retain, settings_of
from trainer.run_folder import TENSORBOARD


class Copies:
    """Copies of what the run in `out` has. check: asked before what counts is written or deleted; raises where it must not be."""

    def __init__(self, out: Path, store: Store, shares: Shares, keep: int, check: Callable[[], None]) -> None:
        self.out, self.store, self.shares, self.keep, self.check = out, store, shares, keep, check
        self._sent: dict[str, tuple[int, int]] = {}  # records as they were when they were copied

    def checkpoint(self, step: int, damaged: set[int]) -> None:
        """Copy a checkpoint, its list last, and delete older ones. damaged: steps of those there that are, less this one then."""
        name = checkpoint_name(step)
        index, theirs, settings = self.out / name / INDEX, f"{name}/{INDEX}", fingerprint(self.out)
        files = read_files(index.read_bytes(), str(index), settings)
        if isinstance(files, str):
            raise ValueError(files)
        self.records()
        if step in damaged or self.store.size(theirs) is None or self.store.read(theirs) != index.read_bytes():
            if settings_of(self.store, step) not in (None, settings):
                raise ValueError(f"{self.store.where(name)}: is of another run, and stays")
            self.store.delete(theirs, self.check)
            self.shares.have_sent(step)
            self._finish(name, {*files}, index)
            damaged.discard(step)
        retain(self.store, step, self.keep, settings, damaged, self.check)

    def export(self, name: str) -> bool:
        """Copy an export, its config.json last; False where it is no longer in OUT."""
        config = self.out / name / CONFIG
        try:
            files = {f"{name}/{file}": path for file, path in files_of(self.out / name).items() if path != config}
            if config.exists():
                self.store.delete(f"{name}/{CONFIG}", self.check)
                send(self.store, files, self.shares.go_on)
                self.records()
                self._finish(name, {file.removeprefix(f"{name}/") for file in files}, config)
        except FileNotFoundError:
            if config.exists():
                raise
        return config.exists()

    def _finish(self, name: str, files: set[str], last: Path) -> None:
        """Of a folder delete what was cut off or is no longer part of it, and copy the file that makes it whole."""
        for stale in {*self.store.names(name)} - files:
            self.store.delete(f"{name}/{stale}", self.check)
        upload(self.store, last, f"{name}/{last.name}", self.check)

    def missing_exports(self, finished: bool) -> list[str]:
        """The exports of OUT that are not there. finished: the run is, so that its last model is not made again."""
        models = Exported(self.out).read()["models"]
        kept = [name for name in models if (finished or name.startswith(EXPORTS)) and not models[name].get(FOR_TASKS)]
        return [name for name in kept if not self._has(name)]

    def _has(self, name: str) -> bool:
        files = files_of(self.out / name)
        return all(self.store.size(f"{name}/{file}") == path.stat().st_size for file, path in files.items())

    def records(self) -> None:
        """Copy the records that have changed. A model there of a run that has another length now does not count any more."""
        theirs, ours = read_record(self.store), read_record(self.out)
        if theirs and ours and length_of(settings_now(theirs)) != length_of(settings_now(ours)):
            for model in (MODEL, AVERAGE_MODEL):
                self.store.delete(f"{model}/{CONFIG}", self.check)
        for path in (*(self.out / name for name in RECORDS), *(self.out / TENSORBOARD).glob("*")):
            if path.is_file():
                name, state = path.relative_to(self.out).as_posix(), path.stat()
                if self._sent.get(name) != (now := (state.st_size, state.st_mtime_ns)):
                    upload(self.store, path, name, self.check)
                    self._sent[name] = now
