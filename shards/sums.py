"""The sums of a part: sha256 of each record batch message's metadata and of each of its columns, with their places.

With them a reader hashes just what it reads. They stand in the commit record (shards/record.py).
"""

import hashlib
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import pyarrow as pa

from shards.message import CONTINUES, PREFIX, batch_offsets, column_ranges


@dataclass(frozen=True, slots=True)
class Piece:
    """Some bytes of a part: offset in the file, size in bytes, sha256."""

    offset: int
    size: int
    sha256: str

    @property
    def end(self) -> int:
        return self.offset + self.size

    @classmethod
    def parse(cls, value: dict[str, Any]) -> "Piece":
        """TypeError, KeyError or ValueError for what is no piece."""
        offset, size, sha256 = value["offset"], value["size"], value["sha256"]
        if (
            type(offset) is not int
            or type(size) is not int
            or offset < 0
            or size < 0
            or len(bytes.fromhex(sha256)) != 32
        ):
            raise ValueError(f"{value} is not an offset, a size and a sha256")
        return cls(offset, size, sha256)


@dataclass(frozen=True, slots=True)
class BatchSums:
    """A record batch message of a part: its metadata, and the body by column in the order of the schema.

    metadata: the message's prefix of 8 bytes and its flatbuffer with padding; the columns follow it without a gap.
    """

    metadata: Piece
    columns: dict[str, Piece]

    @property
    def end(self) -> int:
        """One past the last byte of the message."""
        return max([self.metadata.end, *(piece.end for piece in self.columns.values())])

    @property
    def size(self) -> int:
        """Bytes of the message."""
        return self.end - self.metadata.offset

    def pieces(self) -> Iterator[tuple[str, Piece]]:
        """All pieces, each with what it is, for messages."""
        yield "metadata", self.metadata
        yield from self.columns.items()

    def entry(self) -> dict[str, Any]:
        """As it stands in JSON."""
        columns = [{"name": name, **asdict(piece)} for name, piece in self.columns.items()]
        return {**asdict(self.metadata), "columns": columns}

    @classmethod
    def parse(cls, value: dict[str, Any]) -> "BatchSums":
        """TypeError, KeyError or ValueError for what is no entry; the columns must follow each other without a gap."""
        metadata, columns = Piece.parse(value), {entry["name"]: Piece.parse(entry) for entry in value["columns"]}
        end = metadata.end
        for name, piece in columns.items():
            if piece.offset != end:
                raise ValueError(f"column {name} begins at {piece.offset}, expected {end}")
            end = piece.end
        if len(columns) != len(value["columns"]):
            raise ValueError("a column stands twice in a record batch")
        return cls(metadata, columns)


def sums_of(data: pa.Buffer, schema: pa.Schema) -> tuple[BatchSums, ...]:
    """The sums of an Arrow file in memory; struct.error where it has not such columns or cannot be read."""
    view, found = memoryview(data), []

    def piece(start: int, stop: int) -> Piece:
        return Piece(start, stop - start, hashlib.sha256(view[start:stop]).hexdigest())

    for offset in batch_offsets(data):
        start, ranges = layout(data, offset, schema)
        columns = {field.name: piece(start + low, start + high) for field, (low, high) in zip(schema, ranges)}
        found.append(BatchSums(piece(offset, start), columns))
    return tuple(found)


def layout(data: pa.Buffer, offset: int, schema: pa.Schema) -> tuple[int, list[tuple[int, int]]]:
    """Where the body of the message at `offset` begins, and where in it each column begins and ends."""
    message = pa.ipc.read_message(pa.BufferReader(data.slice(offset)))
    start = offset + PREFIX.size + metadata_size(memoryview(data)[offset:])
    return start, column_ranges(memoryview(message.metadata), message.body.size, schema)


def metadata_size(message: memoryview) -> int:
    """Size of a message's flatbuffer with padding, from the 8 bytes before it; struct.error where they are no such prefix."""
    mark, size = PREFIX.unpack_from(message)
    if mark != CONTINUES or size < 0:
        raise struct.error("a record batch does not begin as an Arrow message")
    return size


def check_piece(data: memoryview, batch: int, what: str, piece: Piece, where: str, remedy: str) -> None:
    """ValueError unless `data` has the sum of `piece`."""
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != piece.sha256:
        raise ValueError(
            f"{where}: record batch {batch}, {what}: sha256 {sha256[:12]}.. differs from its commit record "
            f"{piece.sha256[:12]}..; {remedy}"
        )
