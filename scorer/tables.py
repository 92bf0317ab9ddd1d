"""Columns of a parquet or Arrow file, a few rows at a time.

In: a source and how to choose its columns. Out: record batches in order. Arrow comes as file or as stream, which is what
`datasets` writes.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.parquet

from scorer.faults import BadFile
from scorer.formats import fault_of_head
from scorer.sources import Source
from shards.part import METADATA_KEY
from shards.store_errors import NOT_THE_FILES

MAGIC_BYTES = 64
ROWS_AT_ONCE = 64
STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"
MAX_BATCH_BYTES = 1 << 31  # of a batch of an Arrow file; ours and those of `datasets` are smaller
MARK = {".parquet": "parquet", ".arrow": "arrow"}


def table_batches(
    source: Source,
    choose: Callable[[list[str]], list[str]],
    rows_at_once: Callable[[Any], list[tuple[list[int], int]]] | None = None,
    saw: Callable[[pa.Schema], Any] = lambda schema: None,
) -> Iterator[tuple[pa.RecordBatch, int, int]]:
    """Record batches of the columns that `choose` picks from the names of all, each with its first row and about how many
    bytes of the file were read. rows_at_once: of the opened parquet file, how many rows to read of which row groups, in order.
    saw: is given the schema of the file before `choose` is called.

    BadFile where the file cannot be read to its end, ValueError of `choose` for what it does not find.
    """
    if source.format[0] == ".parquet":
        yield from _parquet(source, choose, rows_at_once, saw)
    else:
        yield from _arrow(source, choose, saw)


def _parquet(
    source: Source,
    choose: Callable[[list[str]], list[str]],
    rows_at_once: Callable[[Any], list[tuple[list[int], int]]] | None,
    saw: Callable[[pa.Schema], Any],
) -> Iterator[tuple[pa.RecordBatch, int, int]]:
    where = source.where
    try:
        file = pyarrow.parquet.ParquetFile(source.open(), pre_buffer=False)
    except NOT_THE_FILES:
        raise
    except (pa.ArrowException, OSError) as error:
        raise _fault(source, "a parquet file", error) from None
    with file:
        saw(file.schema_arrow)
        columns = choose(file.schema_arrow.names)
        row, size, num_rows = 0, source.size() or 0, max(1, file.metadata.num_rows)
        try:
            every = [(list(range(file.metadata.num_row_groups)), ROWS_AT_ONCE)]
            for groups, rows in every if rows_at_once is None else rows_at_once(file):
                for batch in file.iter_batches(rows, row_groups=groups, columns=columns, use_threads=False):
                    yield batch.select(columns), row, size * row // num_rows
                    row += batch.num_rows
        except NOT_THE_FILES:
            raise
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            raise BadFile(where, f"cannot be read beyond row {row} ({error}); write it again") from None


def _arrow(
    source: Source, choose: Callable[[list[str]], list[str]], saw: Callable[[pa.Schema], Any]
) -> Iterator[tuple[pa.RecordBatch, int, int]]:
    where, row, size = source.where, 0, source.size() or 0
    with source.open() as file:
        is_file = file.read(8) == b"ARROW1\0\0"
        if not is_file and file.size() >= len(STREAM_END):
            file.seek(file.size() - len(STREAM_END))
            is_cut = file.read(len(STREAM_END)) != STREAM_END  # a stream that ends early is read without an error
        file.seek(0)
        try:
            reader: Any = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        except NOT_THE_FILES:
            raise
        except (pa.ArrowException, OSError) as error:
            raise _fault(source, "an Arrow file or stream", error) from None
        if not is_file and is_cut:
            raise BadFile(where, "does not end as an Arrow stream does; it was cut off, write it again")
        if METADATA_KEY in (reader.schema.metadata or {}):
            raise BadFile(
                where, "is a part of a shard folder, whose rows are packed already; pass the corpus they came from"
            )
        saw(reader.schema)
        columns = choose(reader.schema.names)
        try:
            batches = map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader
            for batch in batches:
                batch.validate()
                for first in range(0, batch.num_rows, ROWS_AT_ONCE):
                    yield (
                        batch.slice(first, ROWS_AT_ONCE).select(columns),
                        row + first,
                        file.tell() if not is_file else size,
                    )
                row += batch.num_rows
        except NOT_THE_FILES:
            raise
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            raise BadFile(where, f"cannot be read beyond row {row} ({error}); write it again") from None


def _fault(source: Source, what: str, error: Exception) -> Exception:
    """What to raise where a file could not be opened."""
    if getattr(error, "errno", None):  # the disk's, not the file's
        return error
    with source.open() as raw:
        fault = fault_of_head(raw.read(MAGIC_BYTES), MARK[source.format[0]])
    return BadFile(source.where, fault or f"not {what} ({str(error).splitlines()[0]}); write it again")
