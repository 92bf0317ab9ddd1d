"""Find the files of a corpus and stream their documents.

In: paths, globs, folders, or names of Hugging Face datasets. Out: batches of document texts in file
order, with bounded memory: no file is ever loaded whole.
"""

import glob
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
HUB = "hf://"
BATCH_DOCUMENTS = 1024
BATCH_CHARACTERS = 1 << 20  # a token's encoding takes over 100 bytes until its ids are out


@dataclass(frozen=True)
class Source:
    """One corpus file. path: where it is, or None for a hub dataset; name: what the manifest calls it."""

    name: str
    path: Path | None


class BadDocument(ValueError):
    """A document that cannot be packed; the message names file, place, value and remedy."""


def find_sources(corpus: list[str]) -> list[Source]:
    """Resolve `corpus` to sources, sorted within each glob and folder, in the order given.

    Raises ValueError for a path without a match, an unknown suffix or a file named twice.
    """
    paths: list[Path] = []
    hub: list[Source] = []
    for entry in corpus:
        matches = _files(entry)
        if matches is None:
            hub.append(_hub_source(entry))
        paths += matches or []
    for path in paths:
        if not path.name.endswith(SUFFIXES):
            raise ValueError(f"{path}: not a corpus file; expected one of {', '.join(SUFFIXES)}")
        with open(path, "rb"):
            pass  # an unreadable file is better found now than after hours
    resolved = [path.resolve() for path in paths]
    for index, path in enumerate(resolved):
        if path in resolved[:index]:
            raise ValueError(f"{paths[index]}: is in the corpus twice; name it once")
    root = _common_folder(resolved)
    return [Source(path.relative_to(root).as_posix(), path) for path in resolved] + hub


def _files(entry: str) -> list[Path] | None:
    """Files that an entry of --corpus stands for, or None where it must be a dataset name."""
    path = Path(entry)
    if entry.startswith(HUB):
        return None
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        found = [file for file in found if not any(p.startswith((".", "_")) for p in file.relative_to(path).parts)]
        if not found:
            raise ValueError(f"{entry}: folder without corpus files; expected some of {', '.join(SUFFIXES)}")
        return found
    if path.exists():
        return [path]
    if glob.has_magic(entry):
        found = sorted(Path(match) for match in glob.glob(entry, recursive=True))
        if not found:
            raise ValueError(f"{entry}: no file matches this pattern; check --corpus")
        return found
    # `name` or `user/name` without a file suffix may be a dataset; everything else is a missing file
    if entry.endswith(SUFFIXES) or entry.startswith((".", "/", "~")) or entry.count("/") > 1:
        raise ValueError(f"{entry}: no such file; check --corpus")
    return None


def _common_folder(paths: list[Path]) -> Path:
    folder = paths[0].parent if paths else Path("/")
    while not all(path.is_relative_to(folder) for path in paths):
        folder = folder.parent
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
    if source.path is None:
        values = _hub_values(source, text_field)
    elif source.path.name.endswith(".parquet"):
        values = _parquet_values(source.path, text_field)
    else:
        values = _jsonl_values(source.path, text_field)
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


def _jsonl_values(path: Path, text_field: str) -> Iterator[tuple[str, Any, int]]:
    with _open_lines(path) as (lines, raw):
        number = 0
        while True:
            try:
                line = lines.readline()
            except OSError as error:
                raise ValueError(
                    f"{path}: cannot be read beyond line {number} ({error}); the file is damaged or was cut off, "
                    "write it again"
                ) from None
            if not line:
                return
            number += 1
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
def _open_lines(path: Path) -> Iterator[tuple[IO[bytes], pa.NativeFile]]:
    """Binary lines of a plain or compressed file, and the file below them; reading raises OSError where compressed data is cut off."""
    codec = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix)
    if codec and path.stat().st_size == 0:
        raise ValueError(f"{path}: 0 bytes, which is not a {codec} file; write it again")
    with pa.OSFile(str(path)) as raw:
        # Arrow's decompressor, because zstandard's and fsspec's read a truncated file short without an error
        stream = pa.CompressedInputStream(raw, codec) if codec else raw
        yield io.BufferedReader(stream, 1 << 20), raw


def _parquet_values(path: Path, text_field: str) -> Iterator[tuple[str, Any, int]]:
    try:
        file = pyarrow.parquet.ParquetFile(path, pre_buffer=False, memory_map=False)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path}: not a parquet file ({str(error).splitlines()[0]}); write it again") from None
    with file:
        if text_field not in file.schema_arrow.names:
            raise ValueError(
                f"{path}: has no column {text_field!r}, only {', '.join(file.schema_arrow.names)[:80]}; set --text-field"
            )
        row, size, num_rows = 0, path.stat().st_size, max(1, file.metadata.num_rows)
        try:
            for batch in file.iter_batches(batch_size=64, columns=[text_field], use_threads=False):
                for value in _column_values(batch.column(0)):
                    yield f"{path}: row {row}", value, size * row // num_rows
                    row += 1
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
