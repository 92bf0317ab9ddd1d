"""Read record batches of a part by its sums: just the columns that are wanted, each hashed before Arrow sees it.

Nothing of the file's schema message and footer is read: the commit record says where the pieces are, the manifest what they
are. A message is put together in memory with zeros in the place of what was not read; these pages are never touched.
"""

import struct
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from shards.manifest import Manifest
from shards.message import PREFIX, column_ranges
from shards.record import REMEDY, CommitRecord
from shards.store import Store
from shards.sums import BatchSums, Piece, check_piece, metadata_size, sums_of
from shards.whole_part import checked_part, require_size
from shards.zstd_bomb import check_count, check_message

Fill = Callable[[list[tuple[int, memoryview]]], None]
"""Reads into each of these places in memory as many bytes as it has, from the offset in the file on."""


class BatchReader:
    """The record batches of a part; any number of threads may read at once.

    fill: reads pieces of the file. columns: names of those to read, None for all. where: the file, for messages.
    """

    def __init__(
        self,
        fill: Fill,
        batches: tuple[BatchSums, ...],
        manifest: Manifest,
        columns: Iterable[str] | None,
        where: str,
    ) -> None:
        self._fill, self._batches, self._manifest, self._where = fill, batches, manifest, where
        names = manifest.schema.names
        check_count(len(batches), manifest, where)
        for number, batch in enumerate(batches):
            if [*batch.columns] != names:
                raise ValueError(
                    f"{where}: record batch {number} has columns {[*batch.columns]}, the manifest {names}; {REMEDY}"
                )
        self._fields = sorted(map(names.index, names if columns is None else columns))

    @property
    def num_record_batches(self) -> int:
        """Record batches that the part has."""
        return len(self._batches)

    def get_batch(self, number: int) -> pa.RecordBatch:
        """Record batch `number` with the columns that are read.

        ValueError where the file is missing or too short, for bytes with another sum, and for a message that is no record
        batch of the manifest's columns or would decompress to more than its rows can need.
        """
        sums, schema = self._batches[number], self._manifest.schema
        names = [schema.names[field] for field in self._fields]
        pieces = [("metadata", sums.metadata), *((name, sums.columns[name]) for name in names)]
        head = memoryview(schema.serialize())  # a stream, since only its reader takes options
        data = np.zeros(len(head) + sums.size, np.uint8)
        data[: len(head)] = head
        message, start = data.data[len(head) :], sums.metadata.offset
        self._read([(offset, message[offset - start : end - start]) for offset, end in joined(pieces)])
        for what, piece in pieces:
            check_piece(message[piece.offset - start : piece.end - start], number, what, piece, self._where, REMEDY)
        try:
            self._check_message(message, sums)
            options = pa.ipc.IpcReadOptions(included_fields=self._fields)
            return pa.ipc.open_stream(pa.py_buffer(data), options=options).read_next_batch()
        except (struct.error, pa.ArrowException, OSError, EOFError, StopIteration) as error:
            raise ValueError(
                f"{self._where}: its messages cannot be read ({error}); this is no part that remit wrote"
            ) from None

    def _read(self, pieces: list[tuple[int, memoryview]]) -> None:
        try:
            self._fill(pieces)
        except FileNotFoundError:
            raise ValueError(f"{self._where}: is committed but missing; {REMEDY}") from None
        except EOFError as error:
            raise ValueError(f"{self._where}: {error}, its commit record says otherwise; {REMEDY}") from None

    def _check_message(self, message: memoryview, sums: BatchSums) -> None:
        """ValueError or struct.error unless the message has its columns where the sums have them."""
        size = metadata_size(message)
        body = PREFIX.size + size
        if body != sums.metadata.size:
            raise struct.error(f"the metadata of a record batch has {body} bytes, not {sums.metadata.size}")
        parsed = pa.ipc.read_message(pa.py_buffer(message))
        if parsed.body.size != sums.size - body:
            raise struct.error(f"the body of a record batch has {parsed.body.size} bytes, not {sums.size - body}")
        ranges = column_ranges(memoryview(parsed.metadata), parsed.body.size, self._manifest.schema)
        base = sums.metadata.end
        if [(base + low, base + high) for low, high in ranges] != [(p.offset, p.end) for p in sums.columns.values()]:
            raise struct.error("the columns of a record batch are not where its commit record has them")
        check_message(parsed, self._manifest, self._where)


def open_batches(
    store: Store, record: CommitRecord, manifest: Manifest, metadata: dict[str, Any], columns: Iterable[str] | None
) -> BatchReader:
    """The record batches of a part: by the sums of its record, or by those of its bytes, once these are known to be sound.

    metadata: what the schema metadata of the part must hold; columns: names of those to read, None for all.
    """
    part, where = record.part, store.where(record.part)
    fill: Fill = partial(store.fill, part)
    if record.batches:
        require_size(store.size(part), record, where)
        return BatchReader(fill, record.batches, manifest, columns, where)
    data = checked_part(store, record, manifest, metadata)
    try:
        batches = sums_of(data, manifest.schema)
    except (struct.error, pa.ArrowException, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{where}: its messages cannot be read ({error}); this is no part that remit wrote") from None
    # what was fetched over a network stays in memory
    return BatchReader(fill if store.local else partial(_fill_from, data), batches, manifest, columns, where)


def _fill_from(data: pa.Buffer, pieces: list[tuple[int, memoryview]]) -> None:
    for offset, into in pieces:
        into[:] = memoryview(data)[offset : offset + len(into)]


def joined(pieces: list[tuple[str, Piece]]) -> list[tuple[int, int]]:
    """First byte and one past the last of what has to be read: neighbouring pieces in one, empty ones left out."""
    ranges: list[tuple[int, int]] = []
    for _, piece in pieces:
        if ranges and ranges[-1][1] == piece.offset:
            ranges[-1] = (ranges[-1][0], piece.end)
        elif piece.size:
            ranges.append((piece.offset, piece.end))
    return ranges
