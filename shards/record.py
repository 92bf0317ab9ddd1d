"""The commit record of a part: what its bytes must be, whole and piece by piece.

In a folder of format 2 the record has the sums (shards/sums.py), the checksum of the manifest and a checksum of its own.
In one of format 1 it has none of these; `remit upgrade` puts the record of format 2 beside it, in `_sums/`.
"""

import hashlib
import json
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

from shards.store import Store
from shards.sums import BatchSums

METADATA_KEY = b"remit"  # of the schema metadata of a part
COMMITS = "_commits"
SUMS = "_sums"
REMEDY = "run remit verify --repair, then the command that writes this folder"
_FIELDS = {"part": str, "sha256": str, "size": int, "rows": int, "tokens": int, "quarantined": dict}
_FIELDS_OF_2 = _FIELDS | {"checksum": str, "manifest_sha256": str, "batches": list}


@dataclass(frozen=True)
class CommitRecord:
    """What a committed part must be: file name, sha256 of its bytes, size in bytes, rows, tokens.

    quarantined: per reference the rows, counted from 0 in the part, that have no log-probs of it. manifest_sha256: checksum
    of the manifest that the part belongs to; batches: the sums of its record batches; neither in a record of format 1.
    """

    part: str
    sha256: str
    size: int
    rows: int
    tokens: int
    quarantined: dict[str, list[int]] = field(default_factory=dict)
    manifest_sha256: str = ""
    batches: tuple[BatchSums, ...] = ()

    @property
    def of_format_1(self) -> "CommitRecord":
        """The same without what format 1 does not have."""
        return replace(self, manifest_sha256="", batches=())


def encode_json(value: dict[str, Any]) -> bytes:
    """JSON as this project writes it: the same value gives the same bytes."""
    return (json.dumps(value, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode()


def record_name(part: str, folder: str = COMMITS) -> str:
    """Name of the commit record of a part, relative to the shard folder."""
    return f"{folder}/{part.removesuffix('.arrow')}.json"


def with_checksum(text: str) -> bytes:
    """A JSON object with its checksum as the first line. text: its lines from the second on."""
    return f'{{\n "checksum": "{hashlib.sha256(text.encode()).hexdigest()}",\n{text}'.encode()


def checksum_of(data: bytes) -> str | None:
    """The checksum with which a JSON object begins, None where it is not that of the lines below it."""
    rest = data.partition(b"\n")[2].partition(b"\n")[2]
    sha256 = hashlib.sha256(rest).hexdigest()
    return sha256 if data[: len(data) - len(rest)] == f'{{\n "checksum": "{sha256}",\n'.encode() else None


def encode_record(record: CommitRecord) -> bytes:
    """The bytes of a record, of format 2 where it has sums; then a checksum first, and each piece on a line of its own."""
    value = {name: getattr(record, name) for name in _FIELDS}
    if not record.batches:
        return encode_json(value)
    head = encode_json(value | {"manifest_sha256": record.manifest_sha256}).decode()
    batches = []
    for batch in record.batches:
        entry = batch.entry()
        columns = ",\n".join("   " + json.dumps(column) for column in entry.pop("columns"))
        batches.append(f'  {json.dumps(entry)[:-1]}, "columns": [\n{columns}\n  ]}}')
    lines = [head.removeprefix("{\n").removesuffix("\n}\n") + ",", ' "batches": [', ",\n".join(batches), " ]", "}", ""]
    return with_checksum("\n".join(lines))


def read_record(store: Store, part: str, folder: str = COMMITS) -> CommitRecord | None:
    """The commit record of a part, or None where the part was not committed.

    Raises ValueError for a damaged record: one whose checksum is not that of its bytes, or without a checksum one with
    other bytes than this project writes for its values.
    """
    name = record_name(part, folder)
    try:
        data = store.read(name)
    except FileNotFoundError:
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{store.where(name)}: not valid JSON ({error}); {remedy_of(folder)}") from None
    try:
        return _parse(value, data, part)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(
            f"{store.where(name)}: not the commit record of {part}, or altered; {remedy_of(folder)}"
        ) from None


def summed_record(store: Store, record: CommitRecord) -> CommitRecord:
    """The same record of format 1 with the sums that stand beside it; ValueError where these are of other bytes."""
    summed = read_record(store, record.part, SUMS)
    if summed is None or summed.of_format_1 != record:
        raise ValueError(
            f"{store.where(record_name(record.part, SUMS))}: is not of the part that the commit record describes; "
            f"{remedy_of(SUMS)}"
        )
    return summed


def remedy_of(folder: str) -> str:
    """What to do about a damaged record."""
    return "run remit upgrade again" if folder == SUMS else REMEDY


def _parse(value: Any, data: bytes, part: str) -> CommitRecord:
    fields = _FIELDS_OF_2 if "checksum" in value else _FIELDS
    if {*value} != {*fields} or value["part"] != part:
        raise ValueError("other fields")
    if any(type(value[name]) is not kind for name, kind in fields.items()):
        raise TypeError("a field of another type")
    for rows in value["quarantined"].values():
        if type(rows) is not list or any(type(row) is not int or not 0 <= row < value["rows"] for row in rows):
            raise ValueError("a list of rows that the part has not got")
    if fields is _FIELDS:
        if encode_json(value) != data:
            raise ValueError("other bytes")
        return CommitRecord(**value)
    if checksum_of(data) is None:
        raise ValueError("another checksum")
    del value["checksum"]
    batches = tuple(map(BatchSums.parse, value.pop("batches")))
    if not batches or any(batch.end > value["size"] for batch in batches):
        raise ValueError("no record batch, or one beyond the end")
    if any(after.metadata.offset < before.end for before, after in pairwise(batches)):
        raise ValueError("record batches out of order, or one twice")
    return CommitRecord(**value, batches=batches)
