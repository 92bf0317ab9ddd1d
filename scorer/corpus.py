"""Find the files of a corpus and stream their documents.

In: paths, globs, folders, or names of Hugging Face datasets. Out: batches of document texts in file
order, with bounded memory: no file is ever loaded whole.
"""

import glob
import hashlib
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

from shards.store import StoreSilent, is_remote, open_store

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
HUB = "hf://"
BATCH_DOCUMENTS = 1024
MAX_LINE_BYTES = 1 << 28
BOMB_BYTES, BOMB_RATIO = 1 << 30, 2000
BATCH_CHARACTERS = 1 << 20  # a token's encoding takes over 100 bytes until its ids are out


@dataclass(frozen=True)
class Source:
    """One corpus file. location: its path or URL, or None for a hub dataset; name: what the manifest calls it."""

    name: str
    location: str | None

    def open(self) -> pa.NativeFile:
        """The file's bytes, to read from front to back or at any place."""
        assert self.location is not None
        if is_remote(self.location):
            folder, _, name = self.location.rpartition("/")
            return open_store(folder).open(name)
        return pa.OSFile(self.location)

    def size(self) -> int | None:
        """Bytes of the file; None for a hub dataset."""
        if self.location is None:
            return None
        with self.open() as file:
            return file.size()

    def sha256(self) -> str | None:
        """sha256 of the file's bytes; None for a hub dataset."""
        if self.location is None:
            return None
        digest = hashlib.sha256()
        with self.open() as file:
            while data := file.read(1 << 22):
                digest.update(data)
        return digest.hexdigest()


class BadDocument(ValueError):
    """A document that cannot be packed; the message names file, place, value and remedy."""


def find_sources(corpus: list[str]) -> list[Source]:
    """Resolve `corpus` to sources, sorted within each glob and folder, in the order given.

    Raises ValueError for a path without a match, an unknown suffix or a file named twice.
    """
    found: list[str] = []
    hub: list[Source] = []
    for entry in corpus:
        matches = _remote_files(entry) if is_remote(entry) else _files(entry)
        if matches is None:
            hub.append(_hub_source(entry))
        found += matches or []
    for location in found:
        if not location.endswith(SUFFIXES):
            raise ValueError(f"{location}: not a corpus file; expected one of {', '.join(SUFFIXES)}")
    for index, location in enumerate(found):
        Source("", location).open().close()  # an unreadable file is better found now than after hours
        if location in found[:index]:
            raise ValueError(f"{location}: is in the corpus twice; name it once")
    root = _common_folder(found)
    return [Source(location[len(root) :].lstrip("/"), location) for location in found] + hub


def _files(entry: str) -> list[str] | None:
    """Absolute paths that an entry of --corpus stands for, or None where it must be a dataset name."""
    path = Path(entry)
    if entry.startswith(HUB):
        return None
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        found = [file for file in found if not any(p.startswith((".", "_")) for p in file.relative_to(path).parts)]
        if not found:
            raise ValueError(f"{entry}: folder without corpus files; expected some of {', '.join(SUFFIXES)}")
        return [str(file.resolve()) for file in found]
    if path.exists():
        return [str(path.resolve())]
    if glob.has_magic(entry):
        matches = sorted(Path(match) for match in glob.glob(entry, recursive=True))
        if not matches:
            raise ValueError(f"{entry}: no file matches this pattern; check --corpus")
        return [str(match.resolve()) for match in matches]
    # `name` or `user/name` without a file suffix may be a dataset; everything else is a missing file
    if entry.endswith(SUFFIXES) or entry.startswith((".", "/", "~")) or entry.count("/") > 1:
        raise ValueError(f"{entry}: no such file; check --corpus")
    return None


def _remote_files(entry: str) -> list[str]:
    """URLs that an entry of --corpus in an object store stands for."""
    from shards.remote import asked_again, filesystem

    fs, path = filesystem(entry)
    protocol = entry.partition("://")[0]
    if glob.has_magic(path):
        found = asked_again(lambda: fs.glob(path), entry)
        literal = next(index for index, part in enumerate(path.split("/")) if glob.has_magic(part))
        hidden: tuple[str, ...] = () if "/." in path else (".",)
    else:
        found = asked_again(lambda: fs.find(path), entry)  # the file itself, or all below a folder
        if found != [path]:
            found = [name for name in found if name.endswith(SUFFIXES)]
        literal, hidden = len(path.split("/")), (".", "_")
    # the same files in the same order as from a local folder
    found = [name for name in found if not any(part.startswith(hidden) for part in name.split("/")[literal:])]
    if not found:
        raise ValueError(f"{entry}: no corpus file there; expected some of {', '.join(SUFFIXES)}")
    return [f"{protocol}://{name}" for name in sorted(found, key=lambda name: name.split("/"))]


def _common_folder(locations: list[str]) -> str:
    """The longest folder that all locations begin with; empty where paths and URLs are mixed."""
    folder = locations[0].rpartition("/")[0] if locations else ""
    while folder and not all(location.startswith(folder + "/") for location in locations):
        folder = folder.rpartition("/")[0]
    return folder


def _hub_source(entry: str) -> Source:
    """A dataset `[hf://]NAME[:CONFIG[:SPLIT]]`, pinned to the revision that the hub has now."""
    from huggingface_hub import HfApi

    name, _, rest = entry.removeprefix(HUB).partition(":")
    try:
        revision = HfApi().dataset_info(name).sha
    except Exception as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise ValueError(
            f"{entry}: neither a local file nor a dataset that the Hugging Face hub answers for ({reason}); "
            "check --corpus"
        ) from None
    return Source(f"{HUB}{name}@{revision}:{rest}", None)


def read_documents(source: Source, text_field: str) -> Iterator[tuple[list[str | BadDocument], int]]:
    """Batches of the documents of one source, in order; a bad one stands as a BadDocument in its place.

    With each batch comes the number of bytes of the file that were read so far (0 for a hub dataset).
    Raises ValueError where the file itself cannot be read to its end: truncated, not what its suffix says.
    """
    if source.location is None:
        values = _hub_values(source, text_field)
    elif source.location.endswith(".parquet"):
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
        return BadDocument(f"{where}: has no field {text_field!r}, only {', '.join(value)[:80]}; set --text-field")
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


def _hub_values(source: Source, text_field: str) -> Iterator[tuple[str, Any, int]]:
    import datasets

    name, _, rest = source.name.removeprefix(HUB).partition("@")
    revision, _, rest = rest.partition(":")
    config, _, split = rest.partition(":")
    rows = datasets.load_dataset(name, config or None, split=split or "train", revision=revision, streaming=True)
    for number, row in enumerate(rows):
        where = f"{source.name}: row {number}"
        if text_field not in row:
            bad = BadDocument(f"{where}: has no field {text_field!r}, only {', '.join(row)[:80]}; set --text-field")
            yield where, bad, 0
        else:
            yield where, row[text_field], 0
