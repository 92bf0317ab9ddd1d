"""Stream the documents of a corpus file: batches of texts in file order, with bounded memory, no file loaded whole."""

import codecs
import io
import json
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from scorer.decompress import MAX_WINDOW, Damaged, Decompressed
from scorer.faults import BadDocument, BadFile
from scorer.fields import REMEDY as LEAVE_OUT
from scorer.fields import Fields, remedy_of
from scorer.formats import (
    HEAD_BYTES,
    TABLES,
    TOKENS,
    encoding_of,
    fault_of_head,
    fault_of_json,
    format_of,
    text_of_path,
)
from scorer.hf_datasets import HUB, REMEDY, Shard, json_files, read_rows
from scorer.sources import Source
from scorer.tables import MAGIC_BYTES, MARK, table_batches
from shards.store import is_remote
from shards.store_errors import NOT_THE_FILES

if TYPE_CHECKING:
    from scorer.conversations import ConversationFields

BATCH_DOCUMENTS = 1024
MAX_LINE_BYTES = 1 << 28
BOMB_BYTES, BOMB_RATIO = 1 << 30, 2000
CONVERSATION_CHARACTERS = 1 << 12  # about, of one that has no text yet
BATCH_CHARACTERS = 1 << 20  # a token's encoding takes over 100 bytes until its ids are out


class TableRow(dict[str, Any]):
    """A record out of a table, in which a key that a row has not got is null."""


class Documents(list[Any]):
    """Documents in order: texts, conversations, or a BadDocument. kept: of each the values of the fields that are kept beside the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[tuple[Any, ...]] = []


def read_documents(
    source: Source, fields: "Fields | ConversationFields | str", max_window: int = MAX_WINDOW
) -> Iterator[tuple[Documents, int]]:
    """Batches of the documents of one source, in order; a bad one stands as a BadDocument in its place.

    With each batch comes the number of bytes of the file that were read so far (0 for a dataset). fields: which of a
    record's to read, or the name of the one with the text; those of a conversation give one in the place of a text. max_window: bytes that a compressed file may make its reader
    keep. Raises BadFile where the file itself cannot be read to its end: cut off, not what its suffix says.
    """
    fields = Fields(fields) if isinstance(fields, str) else fields
    batch = Documents()
    characters = 0
    position = 0
    for where, record, position in records(source, fields, max_window):
        bad = isinstance(record, BadDocument)
        document = record if bad else fields.text_of(where, record)
        batch.append(document)
        batch.kept.append((None,) * len(fields.kept) if bad else fields.kept_of(record))
        characters += len(document) if isinstance(document, str) else CONVERSATION_CHARACTERS
        if len(batch) >= BATCH_DOCUMENTS or characters >= BATCH_CHARACTERS:
            yield batch, position
            batch, characters = Documents(), 0
    if batch:
        yield batch, position


def records(
    source: Source, fields: "Fields | ConversationFields", max_window: int = MAX_WINDOW
) -> Iterator[tuple[str, Any, int]]:
    """The records of a source, in order, as dicts with the fields that are wanted, or more: where each is, itself or a
    BadDocument, and the bytes of the file that were read so far."""
    if source.shard is not None:
        return _streamed_records(source.shard, fields, max_window)
    if source.format[0] in TABLES:
        return _table_records(source, fields)
    return _jsonl_records(source.where, source.open, source.format, fields, max_window)


def require_kind(source: Source) -> None:
    """BadFile where the first bytes of a local file show that it is not what its suffix says."""
    if source.shard is None and source.location is not None and not is_remote(source.location):
        form, codec = source.format
        if form in TOKENS:  # which their own readers tell
            return
        with source.open() as file:
            fault = fault_of_head(file.read(MAGIC_BYTES), MARK.get(form, codec))
        if fault:
            raise BadFile(source.where, fault)


def _jsonl_records(
    where: str,
    open_file: Callable[[], pa.NativeFile],
    form: tuple[str, str],
    fields: "Fields | ConversationFields",
    max_window: int,
) -> Iterator[tuple[str, Any, int]]:
    """The object in each line that is not empty. where: name of the file; form: its format and codec."""
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
            except NOT_THE_FILES:
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
                yield f"{where}:{number}", _json_object(f"{where}:{number}", line, fields), raw.tell()


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


def _json_object(where: str, line: bytes, fields: "Fields | ConversationFields") -> Any:
    remedy = f"correct the line, or {LEAVE_OUT}"
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
            f"{where}: is a JSON {type(value).__name__}, expected an object with {fields.names[0]!r}; {remedy}"
        )
    return value


def _table_records(source: Source, fields: "Fields | ConversationFields") -> Iterator[tuple[str, Any, int]]:
    schemas: list[pa.Schema] = []

    def choose(names: list[str]) -> list[str]:
        if missing := fields.missing(names):
            ids = [field.name for field in schemas[0] if _holds_ids(field.type)]
            option = "--keep-fields" if missing[0] not in fields.names else remedy_of(fields.option, names, ids)
            raise BadFile(source.where, f"has no column {missing[0]!r}, only {', '.join(names)[:80]}; set {option}")
        return fields.columns(names)

    for batch, first, position in table_batches(source, choose, saw=schemas.append):
        columns = [list(_column_values(column)) for column in batch.columns]
        for row, values in enumerate(zip(*columns)):
            yield f"{source.where}: row {first + row}", TableRow(zip(batch.schema.names, values)), position


def _holds_ids(kind: pa.DataType) -> bool:
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    return is_list and pa.types.is_integer(kind.value_type)


def _column_values(column: pa.Array) -> Iterator[Any]:
    for scalar in column:
        try:
            yield scalar.as_py()
        except UnicodeDecodeError:
            # not a string, so it is reported as such
            yield scalar.as_buffer().to_pybytes() if hasattr(scalar, "as_buffer") else b""


def _streamed_records(
    shard: Shard, fields: "Fields | ConversationFields", max_window: int
) -> Iterator[tuple[str, Any, int]]:
    files = json_files(shard)
    if files is None:
        yield from _row_records(shard, fields, None)
        return
    for file in files:
        form = format_of(file)
        if form is None or _holds_no_lines(file, form, max_window):  # a .zip, or an array
            yield from _row_records(shard, fields, file)
        else:
            name, opener = text_of_path(file), partial(_open_found, file)
            try:
                for where, value, _ in _jsonl_records(name, opener, form, fields, max_window):
                    yield where, value, 0
            except BadFile:
                raise
            except Exception as error:
                if not file.startswith(HUB):
                    raise
                raise ValueError(f"{name}: cannot be read to its end ({error}); {REMEDY}") from None


def _row_records(
    shard: Shard, fields: "Fields | ConversationFields", file: str | None
) -> Iterator[tuple[str, Any, int]]:
    try:
        for number, row in enumerate(read_rows(shard, fields, file)):
            yield f"{shard.name}: row {number}", TableRow(row), 0
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
