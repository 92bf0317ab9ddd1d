"""Stream the documents of a corpus file: batches of texts in file order, with bounded memory, no file loaded whole."""

import codecs
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet

from scorer.decompress import MAX_WINDOW, Damaged, Decompressed
from scorer.formats import HEAD_BYTES, encoding_of, fault_of_head, fault_of_json, format_of, text_of_path
from scorer.hf_datasets import HUB, REMEDY, Shard, columns_of, json_files, read_rows
from scorer.sources import Source
from shards.store import is_remote
from shards.store_errors import StoreSilent

if TYPE_CHECKING:
    from scorer.conversations import ConversationFields

MAGIC_BYTES = 64
BATCH_DOCUMENTS = 1024
MAX_LINE_BYTES = 1 << 28
BOMB_BYTES, BOMB_RATIO = 1 << 30, 2000
BATCH_CHARACTERS = 1 << 20  # a token's encoding takes over 100 bytes until its ids are out


class BadDocument(ValueError):
    """A document that cannot be packed; the message names file, place, value and remedy."""


class TableRow(dict[str, Any]):
    """A record out of a table, in which a key that a row has not got is null."""


class BadFile(ValueError):
    """A file whose bytes are at fault, so that it cannot be packed: where it is, and the reason."""

    def __init__(self, where: str, reason: str) -> None:
        super().__init__(where, reason)
        self.reason = reason

    def __str__(self) -> str:
        where, reason = self.args
        return f"{where}: {reason}; or pass --on-bad-file reject to leave such files out whole"


def read_documents(
    source: Source, text_field: "str | ConversationFields", max_window: int = MAX_WINDOW
) -> Iterator[tuple[list[Any], int]]:
    """Batches of the documents of one source, in order; a bad one stands as a BadDocument in its place.

    text_field: name of the field with the text; or the fields of a conversation, which then stands in the place of the text.
    With each batch comes the number of bytes of the file that were read so far (0 for a dataset). max_window: bytes
    that a compressed file may make its reader keep. Raises BadFile where the file itself cannot be read to its end:
    cut off, not what its suffix says.
    """
    if source.shard is not None:
        values = _streamed_values(source.shard, text_field, max_window)
    elif source.format[0] == ".parquet":
        values = _parquet_values(source, text_field)
    else:
        values = _jsonl_values(source.where, source.open, source.format, text_field, max_window)
    batch: list[Any] = []
    characters = 0
    position = 0
    for where, value, position in values:
        document: Any = value
        if isinstance(value, BadDocument):
            pass
        elif isinstance(text_field, str):
            document = _text(where, value, text_field)
        else:
            document = text_field.text_of(where, value)
        batch.append(document)
        characters += len(document) if isinstance(document, str) else getattr(document, "characters", 0)
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch, position
            batch, characters = [], 0
    if batch:
        yield batch, position


def require_kind(source: Source) -> None:
    """BadFile where the first bytes of a local file show that it is not what its suffix says."""
    if source.shard is None and source.location is not None and not is_remote(source.location):
        form, codec = source.format
        with source.open() as file:
            fault = fault_of_head(file.read(MAGIC_BYTES), "parquet" if form == ".parquet" else codec)
        if fault:
            raise BadFile(source.where, fault)


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


def _jsonl_values(
    where: str,
    open_file: Callable[[], pa.NativeFile],
    form: tuple[str, str],
    text_field: "str | ConversationFields",
    max_window: int,
) -> Iterator[tuple[str, Any, int]]:
    """The field of each line that is not empty. where: name of the file; form: its format and codec."""
    with open_file() as raw:
        fault = fault_of_head(raw.read(MAGIC_BYTES), form[1])
        if fault:
            raise BadFile(where, fault)
        raw.seek(0)
        lines = io.BufferedReader(Decompressed(raw, form[1], max_window) if form[1] else raw, 1 << 20)
        number, inflated, first = 0, 0, True
        while True:
            try:
                line = lines.readline(MAX_LINE_BYTES + 1)
            except Damaged as error:
                raise BadFile(where, f"cannot be read beyond line {number}: {error}") from None
            except StoreSilent:
                raise
            except OSError as error:
                raise ValueError(
                    f"{where}: cannot be read beyond line {number} ({error}); see that the disk is sound and run the "
                    "same command again"
                ) from None
            if not line:
                return
            number += 1
            inflated += len(line)
            if len(line) > MAX_LINE_BYTES:
                raise BadFile(
                    f"{where}:{number}",
                    f"is longer than {MAX_LINE_BYTES:,} bytes, expected one document a line; "
                    "cut the document, or look whether the file is a decompression bomb",
                )
            if inflated > BOMB_BYTES and inflated > BOMB_RATIO * raw.tell():
                raise BadFile(
                    f"{where}:{number}",
                    f"{inflated:,} bytes came out of {raw.tell():,} compressed ones, more than "
                    f"{BOMB_RATIO} times as many, which no text does: a decompression bomb; leave the file out",
                )
            line = _without_mark(line)
            if line and not line.isspace():
                if first:
                    _require_lines(where, line, form)
                    first = False
                yield f"{where}:{number}", _json_field(f"{where}:{number}", line, text_field), raw.tell()


def _without_mark(line: bytes) -> bytes:
    """`line` without the byte-order marks that it begins with: a file from Windows has one, also behind others."""
    while line.startswith(codecs.BOM_UTF8):
        line = line[len(codecs.BOM_UTF8) :]
    return line


def _require_lines(where: str, line: bytes, form: tuple[str, str]) -> None:
    """BadFile where the first line shows that the file as a whole is something else than an object a line."""
    if encoding := encoding_of(line):  # inside a compressed file, of which the head says nothing
        raise BadFile(where, f"is {encoding}, expected UTF-8; iconv -f {encoding} -t UTF-8 makes that of it")
    fault = fault_of_json(line, True) if form[0] == ".json" or line.strip() in (b"[", b"{", b"[{") else None
    if fault:
        raise BadFile(where, fault)


def _object(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        if "integer string conversion" not in str(error):
            raise
        return json.loads(text, parse_int=float)  # thousands of digits, in a field that nobody asked for


def _json_field(where: str, line: bytes, text_field: "str | ConversationFields") -> Any:
    remedy = "correct the line, or pass --on-bad-document reject to leave such documents out"
    try:
        value = _object(line.decode())
    except UnicodeDecodeError as error:
        return BadDocument(
            f"{where}: byte {error.start} is {line[error.start]:#04x}, which is not valid UTF-8; {remedy}"
        )
    except (ValueError, RecursionError) as error:
        return BadDocument(f"{where}: not JSON ({error}): {line[:40]!r}; {remedy}")
    if not isinstance(value, dict):
        return BadDocument(
            f"{where}: is a JSON {type(value).__name__}, expected an object with {columns_of(text_field, ())[0][0]!r}; {remedy}"
        )
    if not isinstance(text_field, str):
        return value
    if text_field not in value:
        return _no_field(where, text_field, value)
    return value[text_field]


def _parquet_values(source: Source, text_field: "str | ConversationFields") -> Iterator[tuple[str, Any, int]]:
    where = source.where
    try:
        file = pyarrow.parquet.ParquetFile(source.open(), pre_buffer=False)
    except StoreSilent:
        raise
    except (pa.ArrowException, OSError) as error:
        if getattr(error, "errno", None):  # the disk's, not the file's
            raise
        with source.open() as raw:
            fault = fault_of_head(raw.read(MAGIC_BYTES), "parquet")
        reason = fault or f"not a parquet file ({str(error).splitlines()[0]}); write it again"
        raise BadFile(where, reason) from None
    with file:
        names = file.schema_arrow.names
        columns, option = columns_of(text_field, names)
        if columns[0] not in names:
            raise BadFile(where, f"has no column {columns[0]!r}, only {', '.join(names)[:80]}; set {option}")
        row, size, num_rows = 0, source.size() or 0, max(1, file.metadata.num_rows)
        try:
            for batch in file.iter_batches(batch_size=64, columns=columns, use_threads=False):
                for values in zip(*(_column_values(batch.column(name)) for name in columns)):
                    value = values[0] if isinstance(text_field, str) else TableRow(zip(columns, values))
                    yield f"{where}: row {row}", value, size * row // num_rows
                    row += 1
        except StoreSilent:
            raise
        except (pa.ArrowException, OSError) as error:
            if getattr(error, "errno", None):
                raise
            raise BadFile(where, f"cannot be read beyond row {row} ({error}); write it again") from None


def _column_values(column: pa.Array) -> Iterator[Any]:
    for scalar in column:
        try:
            yield scalar.as_py()
        except UnicodeDecodeError:
            # not a string, so it is reported as such
            yield scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b""


def _streamed_values(
    shard: Shard, text_field: "str | ConversationFields", max_window: int
) -> Iterator[tuple[str, Any, int]]:
    files = json_files(shard)
    if files is None:
        yield from _row_values(shard, text_field, None)
        return
    for file in files:
        form = format_of(file)
        if form is None or _holds_no_lines(file, form, max_window):  # a .zip, or an array
            yield from _row_values(shard, text_field, file)
        else:
            name, opener = text_of_path(file), partial(_open_found, file)
            try:
                for where, value, _ in _jsonl_values(name, opener, form, text_field, max_window):
                    yield where, value, 0
            except BadFile:
                raise
            except Exception as error:
                if not file.startswith(HUB):
                    raise
                raise ValueError(f"{name}: cannot be read to its end ({error}); {REMEDY}") from None


def _row_values(
    shard: Shard, text_field: "str | ConversationFields", file: str | None
) -> Iterator[tuple[str, Any, int]]:
    try:
        for number, row in enumerate(read_rows(shard, text_field, file)):
            where = f"{shard.name}: row {number}"
            if isinstance(text_field, str):
                yield where, row[text_field] if text_field in row else _no_field(where, text_field, row), 0
            else:
                yield where, TableRow(row), 0
    except ValueError as error:
        if shard.revision:  # of the hub: it may have been the network
            raise
        raise BadFile(shard.name, str(error).removeprefix(f"{shard.name}: ")) from None


def _open_found(file: str) -> pa.NativeFile:
    """A data file that `datasets` found: a path, or a URL of the hub."""
    if not file.startswith(HUB):
        return pa.OSFile(os.fsencode(file))
    from huggingface_hub import HfFileSystem

    return pa.PythonFile(HfFileSystem().open(file), mode="r")


def _holds_no_lines(file: str, form: tuple[str, str], max_window: int) -> bool:
    """Whether a file of JSON is one array or object, which `datasets` reads too."""
    with _open_found(file) as raw:
        text = Decompressed(raw, form[1], max_window) if form[1] else raw
        try:
            head = io.BufferedReader(text, HEAD_BYTES).read(HEAD_BYTES)
        except Damaged:  # said better when it is read
            return False
    return fault_of_json(head, len(head) < HEAD_BYTES) is not None


def _no_field(where: str, text_field: str, names: Iterable[str]) -> BadDocument:
    return BadDocument(
        f"{where}: has no field {text_field!r}, only {', '.join(names)[:80]}; set --text-field, or leave such documents "
        "out with --on-bad-document reject"
    )
