"""Write an export part by part, so that it can be interrupted, and give it its name when it is whole.

Until then it is OUT's neighbour .OUT.export, whose _progress.json says which parts are done and how long each file is; the
same command again cuts off what a killed one wrote beyond that, and goes on.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

from pipelines.export.settings import ExportConfig
from scorer.stopping import Stopped
from shards.folder import ShardFolder
from shards.lease import LEASE, Lease
from shards.output_folder import refuse_other, writing
from shards.publish import fsync_folder
from shards.record import encode_json
from shards.rows import Rows
from shards.store import LocalStore
from trainer.integrations.folder import INDEX

PROGRESS = "_progress.json"
PARTS = "parts_sha256"
"""Of what an export was made of: as parts_sha256 has it."""
HINTS = {PARTS: " (parts of --shards were written anew since, or an earlier release exported them)"}
Progress = Callable[[int], None]
"""Told the number of tokens that are done."""


class Files(Protocol):
    """Writes the files of one kind of export."""

    @property
    def read_columns(self) -> list[str] | None:
        """Of the shards; None for all."""

    @property
    def bytes_per_token(self) -> float:
        """Of what is written, about."""

    def write_part(self, index: int, batches: Iterable[Rows]) -> list[str]:
        """Write or append the rows of part `index`; the names of the files."""

    def finish(self) -> dict[str, Any]:
        """Write what comes last; what the index says of each column."""


def staging_of(out: Path) -> Path:
    """Where an export is written until it is whole."""
    out = out.absolute()
    return out.with_name(f".{out.name}.export")


def is_finished(out: Path, made_of: dict[str, Any]) -> bool:
    """Whether `out` is the export that is asked for. ValueError where it is another, or something else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    try:
        there = json.loads((out / INDEX).read_text(encoding="utf-8"))["made_of"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--out {out}: is not empty and no export; choose another --out or empty it") from None
    refuse_other(str(out), "export", made_of, there, "choose another --out, or delete that folder", hints=HINTS)
    return True


def write_export(
    out: Path,
    made_of: dict[str, Any],
    described: dict[str, Any],
    shards: ShardFolder,
    make_files: Callable[[Path], Files],
    progress: Progress,
    should_stop: Callable[[], bool],
    note: Callable[[str], None],
) -> None:
    """Write `out` unless it is there. made_of: what decides its bytes; described: what its index says besides.

    Stopped where should_stop said so, after a part; RuntimeError where another command writes the same; ValueError for rows that
    break the contract; OSError where the disk is too small.
    """
    staging = staging_of(out)
    staging.parent.mkdir(parents=True, exist_ok=True)
    with writing(staging, note) as lease:
        if _is_whole(staging, made_of):
            _rename(staging, out, lease)
            return
        state = _begin(staging, made_of)
        files, manifest = make_files(staging), shards.manifest
        done = sum(plan.tokens for plan in manifest.parts[: state["parts"]])
        LocalStore(staging).require_free(int(files.bytes_per_token * (manifest.tokens - done)), "the export")
        progress(done)
        for index in range(state["parts"], len(manifest.parts)):
            if should_stop():
                raise Stopped("stopped by a signal")
            plan = manifest.parts[index]
            names = files.write_part(index, _counted(shards, plan.name, files.read_columns, progress, done))
            done += plan.tokens
            lease.check()
            state["parts"] = index + 1
            state["sizes"] |= {name: _synced(staging / name) for name in names}
            _write(staging, PROGRESS, state)
        if made_of[PARTS] != parts_sha256(shards):
            raise ValueError(f"{shards.path}: parts were written anew during the export; run the same command again")
        columns = files.finish()
        _index(staging, made_of, described | {"columns": columns}, lease)
        _rename(staging, out, lease)


def write_small(
    out: Path, made_of: dict[str, Any], write: Callable[[Path], list[str]], note: Callable[[str], None]
) -> None:
    """Write an export of a few small files, all at once. write: writes them into a folder and returns their names."""
    staging = staging_of(out)
    staging.parent.mkdir(parents=True, exist_ok=True)
    with writing(staging, note) as lease:
        if not _is_whole(staging, made_of):
            _begin(staging, made_of)
            write(staging)
            _index(staging, made_of, {}, lease)
        _rename(staging, out, lease)


def _begin(staging: Path, made_of: dict[str, Any]) -> dict[str, Any]:
    """What is done, once the files are as long as that says; another export that was begun there is deleted."""
    try:
        state: dict[str, Any] = json.loads((staging / PROGRESS).read_text(encoding="utf-8"))
        if state["made_of"] != made_of:
            raise ValueError("another export")
        for name, size in state["sizes"].items():
            if (staging / name).stat().st_size < size:
                raise ValueError("a file was cut off")
    except (OSError, ValueError, KeyError, TypeError):
        state = {"made_of": made_of, "parts": 0, "sizes": {}}
    for path in sorted(staging.rglob("*"), reverse=True):
        name = path.relative_to(staging).as_posix()
        if path.is_file() and name.split("/")[0] != LEASE and name not in {PROGRESS, *state["sizes"]}:
            path.unlink()
    for name, size in state["sizes"].items():
        os.truncate(staging / name, size)
    _write(staging, PROGRESS, state)
    return state


def _counted(
    shards: ShardFolder, part: str, columns: list[str] | None, progress: Progress, done: int
) -> Iterable[Rows]:
    """The rows of a part, verified and checked; told of after each batch was written."""
    for rows in shards.batches(columns, [part]):
        yield rows
        done += len(rows.ids)
        progress(done)


def _index(staging: Path, made_of: dict[str, Any], index: dict[str, Any], lease: Lease) -> None:
    """Write the index of files that are whole."""
    files = [path.relative_to(staging) for path in sorted(staging.rglob("*")) if path.is_file()]
    names = [path.as_posix() for path in files if not path.parts[0].startswith((".", "_"))]
    sizes = {name: _synced(staging / name) for name in names}
    lease.check()
    _write(staging, INDEX, {"made_of": made_of, "sizes": sizes} | index)


def _is_whole(staging: Path, made_of: dict[str, Any]) -> bool:
    """Whether only the name is missing."""
    try:
        there: dict[str, Any] = json.loads((staging / INDEX).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return there["made_of"] == made_of


def _rename(staging: Path, out: Path, lease: Lease) -> None:
    """Take away what only the writing needed, and give the folder its name."""
    for path in [staging / PROGRESS, *staging.glob(".*")]:
        path.unlink(missing_ok=True)
    lease.check()
    lease.release()
    shutil.rmtree(staging / LEASE, ignore_errors=True)
    try:
        os.rename(staging, out)  # over an empty folder too
    except OSError as error:
        raise ValueError(
            f"--out {out}: cannot be put there ({error.strerror}); it is whole in {staging}, move it"
        ) from None
    fsync_folder(out.absolute().parent)


def _synced(path: Path) -> int:
    """Size of a file, once it is on disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return os.fstat(file.fileno()).st_size


def _write(folder: Path, name: str, value: dict[str, Any]) -> None:
    LocalStore(folder).replace(name, encode_json(value))


def parts_sha256(shards: ShardFolder) -> str:
    """Hash of the hashes of all parts, from their commit records: remit verify --repair and another scoring change parts under
    the same manifest. ValueError where one is not committed."""
    with ThreadPoolExecutor(8) as pool:  # each is a small file, perhaps of an object store
        sums = pool.map(lambda plan: shards.record_alone(plan.name).sha256, shards.manifest.parts)
        return hashlib.sha256("\n".join(sums).encode()).hexdigest()


def made_of(config: ExportConfig, folders: list[ShardFolder], **more: Any) -> dict[str, Any]:
    """What decides the bytes of an export. An export that copies rows needs PARTS too; torchtitan's reads them in place."""
    return {"to": config.to, "shards": [folder.manifest.checksum for folder in folders], **more}
