"""Check all bytes of a part against its commit record, then open it as any reader of Arrow files does.

remit verify reads parts like this, and everybody those of format 1 that have no sums yet.
"""

import hashlib
import json
import struct
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from shards.manifest import Manifest
from shards.message import batch_offsets
from shards.record import METADATA_KEY, REMEDY, CommitRecord
from shards.store import Store
from shards.sums import check_piece, layout
from shards.zstd_bomb import check_decompressed_size


def checked_part(store: Store, record: CommitRecord, manifest: Manifest, metadata: dict[str, Any]) -> pa.Buffer:
    """The bytes of a part, after all checks. metadata: what its schema metadata must hold."""
    data = read_whole(store, record)
    _check_whole(data, record, manifest, metadata, store.where(record.part))
    return data


def require_size(size: int | None, record: CommitRecord, where: str) -> None:
    """ValueError unless a part has the size of its record. size: None where there is no such file."""
    if size is None:
        raise ValueError(f"{where}: is committed but missing; {REMEDY}")
    if size != record.size:
        raise ValueError(f"{where}: {size} bytes, its commit record says {record.size}; {REMEDY}")


def read_whole(store: Store, record: CommitRecord) -> pa.Buffer:
    """The bytes of a part; ValueError unless its size, each of its sums and its sha256 are those of the record."""
    where = store.where(record.part)
    try:
        data = store.buffer(record.part)
    except FileNotFoundError:
        data = None
    require_size(None if data is None else data.size, record, where)
    view = memoryview(data)
    with ThreadPoolExecutor(1) as pool:  # the same bytes are hashed twice, side by side
        whole = pool.submit(lambda: hashlib.sha256(view).hexdigest())
        for number, batch in enumerate(record.batches):
            for what, piece in batch.pieces():
                check_piece(view[piece.offset : piece.end], number, what, piece, where, REMEDY)
        sha256 = whole.result()
    if sha256 != record.sha256:
        raise ValueError(
            f"{where}: sha256 {sha256[:12]}.. differs from its commit record {record.sha256[:12]}..; {REMEDY}"
        )
    return data


def _check_whole(
    data: pa.Buffer, record: CommitRecord, manifest: Manifest, metadata: dict[str, Any], where: str
) -> None:
    """ValueError unless the bytes of a part are an Arrow file of the manifest's columns, bound to its place in the manifest,
    whose record batches are where the record has them and do not decompress to more than their rows can need.

    metadata: what the schema metadata must hold.
    """
    try:
        schema = pa.ipc.open_file(data).schema
        found = json.loads((schema.metadata or {}).get(METADATA_KEY, b"{}"))
    except (pa.ArrowException, ValueError) as error:
        raise ValueError(f"{where}: not an Arrow file of this project ({error}); {REMEDY}") from None
    if not schema.remove_metadata().equals(manifest.schema):
        raise ValueError(f"{where}: columns {schema.names} or their types are not those of the manifest; {REMEDY}")
    if not isinstance(found, dict) or any(found.get(name) != metadata[name] for name in ("part", "manifest_sha256")):
        raise ValueError(f"{where}: its schema metadata is not that of {record.part} in this manifest; {REMEDY}")
    if found != json.loads(json.dumps(metadata)):
        raise ValueError(f"{where}: its schema metadata is not the provenance of the manifest")
    check_decompressed_size(data, manifest, where)
    if record.batches:
        _check_places(data, record, manifest, where)


def _check_places(data: pa.Buffer, record: CommitRecord, manifest: Manifest, where: str) -> None:
    found: list[Any] = []
    try:
        for offset in batch_offsets(data):
            start, ranges = layout(data, offset, manifest.schema)
            found.append((offset, [(start + low, start + high) for low, high in ranges]))
    except (struct.error, pa.ArrowException, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{where}: its messages cannot be read ({error}); this is no part that remit wrote") from None
    recorded = [(one.metadata.offset, [(p.offset, p.end) for p in one.columns.values()]) for one in record.batches]
    if found != recorded:
        raise ValueError(f"{where}: its footer has its record batches elsewhere than its commit record; {REMEDY}")
