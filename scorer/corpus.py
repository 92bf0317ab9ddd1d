"""Stream the documents of a corpus file: batches of texts in file order, with bounded memory, no file loaded whole."""

import io
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from scorer.sources import Source
from scorer.streamed import Shard, read_rows
from shards.store import StoreSilent

BATCH_DOCUMENTS = 1024
MAX_LINE_BYTES = 1 << 28
BOMB_BYTES, BOMB_RATIO = 1 << 30, 2000
BATCH_CHARACTERS = 1 << 20  # a token's encoding takes over 100 bytes until its ids are out


class BadDocument(ValueError):
    """A document that cannot be packed; the message names file, place, value and remedy."""


def read_documents(source: Source, text_field: str) -> Iterator[tuple[list[str | BadDocument], int]]:
    """Batches of the documents of one source, in order; a bad one stands as a BadDocument in its place.

    With each batch comes the number of bytes of the file that were read so far (0 for a dataset).
    Raises ValueError where the file itself cannot be read to its end: truncated, not what its suffix says.
    """
    if source.shard is not None:
        values = _streamed_values(source.shard, text_field)
    elif str(source.location).endswith(".parquet"):
        values = _parquet_values(source, text_field)
    else:
        values = _jsonl_values(source, text_field)
    batch: list[str | BadDocument] = []
    characters = 0
    position = 0
    for where, value, position in values:
        document = value if isinstance(value, BadDocument) else _text(where, value, text_field)
        batch.append(document)
        characters += len(document) if isinstance(document, str) else 0
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch, position
            batch, characters = [], 0
    if batch:
        yield batch, position


def _text(where: str, value: Any, text_field: str) -> str | BadDocument:
    if not isinstance(value, str):
        return BadDocument(
            f"{where}: field {text_field!r} is {type(value).__name__} {str(value)[:40]!r}, expected a string; "
            "correct the document, or pass --on-bad-document reject to leave such documents out"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return BadDocument(
            f"{where}: field {text_field!r} has an unpaired surrogate at character {error.start}, expected valid "
            "Unicode; correct the document, or pass --on-bad-document reject to leave such documents out"
        )
    return value


def _jsonl_values(source: Source, text_field: str) -> Iterator[tuple[str, Any, int]]:
    path = source.location
    with _open_lines(source) as (lines, raw):
        number = inflated = 0
        while True:
            try:
                line = lines.readline(MAX_LINE_BYTES + 1)
            except StoreSilent:
                raise
            except OSError as error:
                raise ValueError(
                    f"{path}: cannot be read beyond line {number} ({error}); the file is damaged or was cut off, "
                    "write it again"
                ) from None
            if not line:
                return
            number += 1
            inflated += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(
                    f"{path}:{number}: is longer than {MAX_LINE_BYTES:,} bytes, expected one document a line; "
                    "cut the document, or look whether the file is a decompression bomb"
                )
            if inflated > BOMB_BYTES and inflated > BOMB_RATIO * raw.tell():
                raise ValueError(
                    f"{path}:{number}: {inflated:,} bytes came out of {raw.tell():,} compressed ones, more than "
                    f"{BOMB_RATIO} times as many, which no text does: a decompression bomb; leave the file out"
                )
            if line.isspace():
                continue
            where = f"{path}:{number}"
            yield where, _json_field(where, line, text_field), raw.tell()


def _json_field(where: str, line: bytes, text_field: str) -> Any:
    remedy = "correct the line, or pass --on-bad-document reject to leave such documents out"
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError as error:
        return BadDocument(
            f"{where}: byte {error.start} is {line[error.start]:#04x}, which is not valid UTF-8; {remedy}"
        )
    except (ValueError, RecursionError) as error:
        return BadDocument(f"{where}: not JSON ({error}): {line[:40]!r}; {remedy}")
    if not isinstance(value, dict):
        return BadDocument(
            f"{where}: is a JSON {type(value).__name__}, expected an object with {text_field!r}; {remedy}"
        )
    if text_field not in value:
        return _no_field(where, text_field, value)
    return value[text_field]


@contextmanager
def _open_lines(source: Source) -> Iterator[tuple[IO[bytes], pa.NativeFile]]:
    """Binary lines of a plain or compressed file, and the file below them; reading raises OSError where compressed data is cut off."""
    path = str(source.location)
    codec = {".gz": "gzip", ".zst": "zstd"}.get(Path(path).suffix)
    with source.open() as raw:
        if codec and raw.size() == 0:
            raise ValueError(f"{path}: 0 bytes, which is not a {codec} file; write it again")
        # Arrow's decompressor, because zstandard's and fsspec's read a truncated file short without an error
        stream = pa.CompressedInputStream(raw, codec) if codec else raw
        yield io.BufferedReader(stream, 1 << 20), raw


def _parquet_values(source: Source, text_field: str) -> Iterator[tuple[str, Any, int]]:
    path = source.location
    try:
        file = pyarrow.parquet.ParquetFile(source.open(), pre_buffer=False)
    except StoreSilent:
        raise
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None
    with file:
        if text_field not in file.schema_arrow.names:
            raise ValueError(
                f"{path}: has no column {text_field!r}, only {', '.join(file.schema_arrow.names)[:80]}; set --text-field"
            )
        row, size, num_rows = 0, source.size() or 0, max(1, file.metadata.num_rows)
        try:
            for batch in file.iter_batches(batch_size=64, columns=[text_field], use_threads=False):
                for value in _column_values(batch.column(0)):
                    yield f"{path}: row {row}", value, size * row // num_rows
                    row += 1
        except StoreSilent:
            raise
        except (pa.ArrowException, OSError) as error:
            raise ValueError(f"{path}: cannot be read beyond row {row} ({error}); write it again") from None


def _column_values(column: pa.Array) -> Iterator[Any]:
    for scalar in column:
        try:
            yield scalar.as_py()
        except UnicodeDecodeError:
            yield scalar.as_buffer().to_pybytes()  # not a string, so it is reported as such


def _streamed_values(shard: Shard, text_field: str) -> Iterator[tuple[str, Any, int]]:
    for number, row in enumerate(read_rows(shard, text_field)):
        where = f"{shard.name}: row {number}"
        yield where, row[text_field] if text_field in row else _no_field(where, text_field, row), 0


def _no_field(where: str, text_field: str, names: Iterable[str]) -> BadDocument:
    return BadDocument(
        f"{where}: has no field {text_field!r}, only {', '.join(names)[:80]}; set --text-field, or leave such documents "
        "out with --on-bad-document reject"
    )
