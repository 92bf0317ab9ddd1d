"""Write a part so that readers see all of it or nothing, and record what was written.

In: record batches. Out: `part-00000.arrow` and its commit record `_commits/part-00000.json`.
A part without a record does not exist: a reader ignores it and a rerun replaces it.
"""

import hashlib
import json
import os
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
from shards.sums import sums_of

__all__ = [
    "COMMITS",
    "METADATA_KEY",
    "REMEDY",
    "CommitRecord",
    "CommittedAlready",
    "encode_json",
    "publish_json",
    "read_record",
    "record_name",
    "sha256_file",
    "write_part",
]


class CommittedAlready(ValueError):
    """A part has its record: it is done, and never written again."""


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def publish_json(store: Store, name: str, data: bytes, kind: str) -> None:
    """A new file of JSON. The same content already there is fine, other content raises ValueError."""
    try:
        store.create(name, data, kind)
    except FileExistsError:
        if store.read(name) != data:
            raise ValueError(f"{store.where(name)}: exists with other content; another run wrote it") from None


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
    """
    store = open_store(folder)
    if store.size(record_name(part)) is not None:
        raise CommittedAlready(f"{store.where(part)}: is committed already; a committed part is never written again")
    schema = schema.with_metadata({METADATA_KEY: json.dumps(metadata, sort_keys=True, ensure_ascii=False)})
    rows = sum(batch.num_rows for batch in batches)
    tokens = sum(len(batch.column("input_ids").flatten()) for batch in batches)
    temporary = store.temporary(part)
    try:
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
        record = _record_of(temporary, part, schema, metadata, (rows, tokens), quarantined or {})
        crash_point("part.synced")
        may_publish()
        _publish_part(store, temporary, part, record.sha256, may_publish)
        may_publish()
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    publish_json(store, record_name(part), encode_record(record), "record")
    return record


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


def _publish_part(store: Store, temporary: Path, part: str, sha256: str, may_publish: Callable[[], None]) -> None:
    """Publish; a file that is there without a record is taken where it has these bytes, else replaced."""
    orphan = store.size(part) is not None
    if orphan:
        if hashlib.sha256(memoryview(store.buffer(part))).hexdigest() == sha256:
            temporary.unlink()
            return
        if store.size(record_name(part)) is not None:  # since we began: an engine that was given up was not dead
            raise CommittedAlready(f"{store.where(part)}: was committed by another process meanwhile")
        store.delete(part, may_publish)
    store.publish(temporary, part)
