"""Write a part so that readers see all of it or nothing, and record what was written.

In: record batches. Out: `part-00000.arrow` and its commit record `_commits/part-00000.json`.
A part without a record does not exist: a reader ignores it and a rerun replaces it.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa

METADATA_KEY = b"remit"
COMMITS = "_commits"


@dataclass(frozen=True)
class CommitRecord:
    """What a committed part must be: its file name, sha256 of its bytes, size in bytes, rows, tokens."""

    part: str
    sha256: str
    size: int
    rows: int
    tokens: int


def sha256_file(path: Path) -> str:
    """Hexadecimal sha256 of a file's bytes, read in pieces."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fsync_folder(folder: Path) -> None:
    """Make renames and links in `folder` survive a power cut."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def temporary_name(final: Path) -> Path:
    """A name in the same folder that no reader looks at and no other process uses."""
    return final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")


def publish(temporary: Path, final: Path) -> None:
    """Give a finished temporary file its final name without overwriting; FileExistsError if it exists."""
    try:
        os.link(temporary, final)  # unlike rename, link never replaces what is there
    finally:
        temporary.unlink()
    fsync_folder(final.parent)


def publish_json(value: dict[str, Any], final: Path) -> None:
    """Write JSON durably and whole. The same content already there is fine, other content raises."""
    text = json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    temporary = temporary_name(final)
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    try:
        publish(temporary, final)
    except FileExistsError:
        if final.read_text(encoding="utf-8") != text:
            raise ValueError(f"{final}: exists with other content; another run writes to this folder") from None


def record_path(folder: Path, part: str) -> Path:
    """Where the commit record of a part stands."""
    return folder / COMMITS / (Path(part).stem + ".json")


def read_record(folder: Path, part: str) -> CommitRecord | None:
    """The commit record of a part, or None where the part was not committed.

    Raises ValueError for a damaged record.
    """
    path = record_path(folder, part)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}); delete it and run the same command again") from None
    if (
        not isinstance(value, dict)
        or {(name, type(field)) for name, field in value.items()}
        != {(field.name, field.type) for field in fields(CommitRecord)}
        or value["part"] != part
    ):
        raise ValueError(f"{path}: not the commit record of {part}; delete it and run the same command again")
    return CommitRecord(**value)


def write_part(
    folder: Path,
    part: str,
    schema: pa.Schema,
    provenance: dict[str, Any],
    batches: Iterable[pa.RecordBatch],
) -> CommitRecord:
    """Write, fsync, hash and publish one part, then its commit record.

    batches: in the order of the rows; the same batches give the same bytes. provenance: JSON object
    for the schema metadata under the key `remit`. Where an exception leaves `batches`, nothing is
    published and the temporary file is removed.
    """
    final = folder / part
    if record_path(folder, part).exists():
        raise ValueError(f"{final}: is committed already; a committed part is never written again")
    temporary = temporary_name(final)
    schema = schema.with_metadata({METADATA_KEY: json.dumps(provenance, sort_keys=True, ensure_ascii=False)})
    rows = tokens = 0
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    try:
        with (
            open(temporary, "wb") as file,
            pa.ipc.new_file(file, schema, options=options) as writer,
        ):
            for batch in batches:
                writer.write_batch(batch.replace_schema_metadata(schema.metadata))
                rows += batch.num_rows
                tokens += len(batch.column("input_ids").flatten())
            writer.close()  # writes the footer, which must be on disk before the hash is taken
            file.flush()
            os.fsync(file.fileno())
        record = CommitRecord(part, sha256_file(temporary), temporary.stat().st_size, rows, tokens)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if final.exists():
        # A run that died between part and record left this file. Without a record nobody has read it.
        os.replace(temporary, final)
        fsync_folder(folder)
    else:
        publish(temporary, final)
    publish_json(asdict(record), record_path(folder, part))
    return record
