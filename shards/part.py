"""Write a part so that readers see all of it or nothing, and record what was written.

In: record batches. Out: `part-00000.arrow` and its commit record `_commits/part-00000.json`.
A part without a record does not exist: a reader ignores it and a rerun replaces it.
"""

import contextlib
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.crash import crash_point
from shards.record import (
    COMMITS,
    METADATA_KEY,
    REMEDY,
    CommitRecord,
    encode_json,
    encode_record,
    read_record,
    record_name,
)
from shards.store import Store, open_store
from shards.store_errors import OtherBytes
from shards.sums import sums_of

TRIES = 4  # of a part that another process writes at the same time
PAUSE_SECONDS = 0.2  # at most, between them: two that meet again and again must fall out of step

__all__ = [
    "COMMITS",
    "METADATA_KEY",
    "REMEDY",
    "CommitRecord",
    "CommittedAlready",
    "committed_record",
    "encode_json",
    "publish_json",
    "read_record",
    "record_name",
    "sha256_file",
    "write_part",
]


class CommittedAlready(ValueError):
    """A part has its record, and the file fits it: it is done, and never written again."""


class _Overtaken(Exception):
    """Another process has written the part or its record since we looked; its cause says how that was seen."""


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_json(store: Store, name: str, data: bytes, kind: str) -> None:
    """A new file of JSON. The same content already there is fine, other content raises ValueError."""
    try:
        store.create(name, data, kind)
    except FileExistsError:
        found = None
        with contextlib.suppress(FileNotFoundError):  # gone again
            found = store.read(name)
        if found != data:
            raise ValueError(f"{store.where(name)}: exists with other content; another run wrote it") from None


def fits(store: Store, record: CommitRecord, version: str = "") -> bool:
    """Whether a part has the bytes that its record says. version: what `Store.publish` said of the file that has them; where
    the store still says so, the bytes are not read."""
    if store.size(record.part) != record.size:
        return False
    try:
        if version and store.version(record.part) == version:
            return True
        return _sha256(store, record.part) == record.sha256
    except FileNotFoundError:
        return False


def committed_record(
    store: Store, part: str, may_publish: Callable[[], None] = lambda: None, version: str = ""
) -> CommitRecord | None:
    """The record of a part, None where it is not committed. A record that the file does not fit is deleted: no reader takes
    such a part, and nobody would write it again.

    may_publish, version: as of `write_part` and `fits`. ValueError for a damaged record.
    """
    record = read_record(store, part)
    if record is None or fits(store, record, version):
        return record
    store.delete(record_name(part), may_publish)
    return None


def write_part(
    folder: Store | Path | str,
    part: str,
    schema: pa.Schema,
    metadata: dict[str, Any],
    batches: Sequence[pa.RecordBatch],
    quarantined: dict[str, list[int]] | None = None,
    may_publish: Callable[[], None] = lambda: None,
) -> CommitRecord:
    """Write, fsync, hash and publish one part, then its commit record.

    batches: in the order of the rows; the same batches give the same bytes. metadata: JSON object for the schema
    metadata under the key `remit`; where its format_version is 1, the record is of format 1 too. may_publish: raises where
    this process must not publish any more. Where anything raises, nothing is committed and the temporary file is removed.
    CommittedAlready where the part is.

    Two processes may write one part at once: an engine that was given up, because its node did not answer, goes on. On GPUs
    their bytes differ. No store can replace a file and its record in one step, so each compares the two after its last
    step, deletes a record that does not fit and begins again. Whoever is last leaves both fitting, or no record.
    """
    store = open_store(folder)
    schema = schema.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True, ensure_ascii=False)})
    problem: BaseException | None = None
    for attempt in range(TRIES + 1):
        if committed_record(store, part, may_publish) is not None:
            raise CommittedAlready(f"{store.where(part)}: is committed already; such a part is never written again")
        if attempt == TRIES:
            break
        if attempt:
            time.sleep(random.uniform(0, PAUSE_SECONDS))
        try:
            return _write_once(store, part, schema, metadata, batches, quarantined or {}, may_publish)
        except _Overtaken as error:
            problem = error.__cause__
        except Exception:
            with contextlib.suppress(Exception):  # what we deleted may have got its record meanwhile
                committed_record(store, part, may_publish)
            raise
    if isinstance(problem, OtherBytes):  # what the store itself may do, each time
        raise problem
    raise OSError(
        f"{store.where(part)}: another process wrote it or its record, too, each of {TRIES} times; end that one, then run the "
        "same command again"
    )


def _write_once(
    store: Store,
    part: str,
    schema: pa.Schema,
    metadata: dict[str, Any],
    batches: Sequence[pa.RecordBatch],
    quarantined: dict[str, list[int]],
    may_publish: Callable[[], None],
) -> CommitRecord:
    """One try of `write_part`, with its arguments; _Overtaken where another process came in between."""
    temporary = store.temporary(part)
    try:
        record = _write_file(store, temporary, part, schema, metadata, batches, quarantined)
        may_publish()
        version = _publish_part(store, temporary, part, record.sha256, may_publish)
        may_publish()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _publish_record(store, record, version, may_publish)
    return record


def _write_file(
    store: Store,
    temporary: Path,
    part: str,
    schema: pa.Schema,
    metadata: dict[str, Any],
    batches: Sequence[pa.RecordBatch],
    quarantined: dict[str, list[int]],
) -> CommitRecord:
    """Write the temporary file of a part, to the disk; returns the record of its bytes."""
    rows = sum(batch.num_rows for batch in batches)
    tokens = sum(len(batch.column("input_ids").flatten()) for batch in batches)
    with (
        store.space_errors(part, sum(batch.nbytes for batch in batches)),
        open(temporary, "wb") as file,
        pa.ipc.new_file(file, schema, options=pa.ipc.IpcWriteOptions(compression=_codec(metadata))) as writer,
    ):
        crash_point("part.opened")
        for batch in batches:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
        crash_point("part.written")
        writer.close()  # writes the footer, which must be on disk before the hash is taken
        file.flush()
        os.fsync(file.fileno())
    record = _record_of(temporary, part, schema, metadata, (rows, tokens), quarantined)
    crash_point("part.synced")
    return record


def _publish_record(store: Store, record: CommitRecord, version: str, may_publish: Callable[[], None]) -> None:
    """Publish the record of a published part; _Overtaken where another one is there, or the file is another one by now."""
    data = encode_record(record)
    try:
        publish_json(store, record_name(record.part), data, "record")
    except ValueError:
        raise _Overtaken from None
    if committed_record(store, record.part, may_publish, version) != record:
        raise _Overtaken


def _record_of(
    temporary: Path,
    part: str,
    schema: pa.Schema,
    metadata: dict[str, Any],
    counts: tuple[int, int],
    quarantined: dict[str, list[int]],
) -> CommitRecord:
    """The record of the bytes that can be read back from a finished file. counts: its rows and tokens."""
    with pa.memory_map(str(temporary)) as file, ThreadPoolExecutor(1) as pool:
        data = file.read_buffer()
        sha256 = pool.submit(lambda: hashlib.sha256(memoryview(data)).hexdigest())  # beside the sums of the same bytes
        of_1 = metadata.get("format_version") == 1
        batches = () if of_1 else sums_of(data, schema)
        manifest_sha256 = "" if of_1 else metadata.get("manifest_sha256", "")
        return CommitRecord(part, sha256.result(), data.size, *counts, quarantined, manifest_sha256, batches)


def _codec(metadata: dict[str, Any]) -> pa.Codec:
    """zstd at Arrow's own level, or at 9 where a reference has entropies: these columns are a tenth smaller then."""
    has_entropy = any(reference.get("entropy") for reference in metadata.get("references", {}).values())
    return pa.Codec("zstd", compression_level=9 if has_entropy else None)


def _publish_part(store: Store, temporary: Path, part: str, sha256: str, may_publish: Callable[[], None]) -> str:
    """Publish; a file that is there without a record is taken where it has these bytes, else replaced.

    Returns the version of the file that has the bytes, as `Store.publish`. _Overtaken where another process came in between.
    """
    if store.size(part) is not None:
        try:
            version = store.version(part)
            if _sha256(store, part) == sha256:
                temporary.unlink()
                return version
        except FileNotFoundError:
            raise _Overtaken from None
        if store.size(record_name(part)) is not None:  # since we began: an engine that was given up was not dead
            raise _Overtaken
        store.delete(part, may_publish)
    try:
        return store.publish(temporary, part)
    except (FileExistsError, OtherBytes) as error:
        raise _Overtaken from error


def _sha256(store: Store, part: str) -> str:
    return hashlib.sha256(memoryview(store.buffer(part))).hexdigest()
