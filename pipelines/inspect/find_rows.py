"""Which rows of a folder remit inspect shows, and reading them: by number, by document, by text.

In: a shard folder and the options. Out: row numbers, counted over all parts, ascending; rows as plain Python values.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from pipelines.settings import InspectConfig
from shards.folder import ShardFolder

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Found:
    """rows: their numbers, counted over all parts, ascending. chosen: how, in words. remarks: why there may be more."""

    rows: list[int]
    chosen: str
    remarks: tuple[str, ...] = ()


def find_rows(folder: ShardFolder, config: InspectConfig, progress: Progress = lambda done, total: None) -> Found:
    """The rows that --row, --rows, --doc or --search name, of the last two --limit at most.

    progress(rows looked at, rows to look at). ValueError where there is none, or the corpus file is not one of the
    folder's.
    """
    if config.row_range is not None:
        first, last = config.row_range
        if last >= folder.manifest.rows:
            option, value = ("row", config.row) if config.rows is None else ("rows", config.rows)
            raise ValueError(f"--{option} is {value}, {folder.path} has rows 0..{folder.manifest.rows - 1}")
        return Found(list(range(first, last + 1)), f"row {first}" if first == last else f"rows {first} to {last}")
    corpus = folder.manifest.corpus
    if config.source is not None and config.source >= len(corpus):
        raise ValueError(f"--source is {config.source}, {folder.path} has corpus files 0..{len(corpus) - 1}")
    missing = len(folder.missing_parts())
    unread = f"{missing:,} of {len(folder.manifest.parts):,} parts are not committed yet and were not looked at"
    rows: list[int] = []
    is_cut = False
    matches = _has_document(folder, config) if config.doc is not None else _has_text(folder, config)
    for done, total, found in matches:
        rows += found
        progress(done, total)
        if rows and not found and config.doc is not None:
            break
        if len(rows) >= config.limit:
            is_cut = len(rows) > config.limit or done < total
            break
    what = f"has document {config.doc}" if config.doc is not None else f"has {config.search!r} in its text"
    if not rows:
        where = "" if config.source is None else f" from corpus file {config.source}, {corpus[config.source].path},"
        raise ValueError(
            f"{folder.path}: no row{where} {what}; "
            + (unread if missing else "remit inspect without it shows what the folder holds")
        )
    source = config.source or 0 if config.doc is not None else config.source
    chosen = "each row that " + what + ("" if source is None else f", of corpus file {corpus[source].path}")
    remarks = [f"only the first {config.limit:,} found are shown; --limit shows more, if there are"] if is_cut else []
    return Found(rows[: config.limit], chosen, (*remarks, *([unread] if missing else [])))


def _has_document(folder: ShardFolder, config: InspectConfig) -> Iterator[tuple[int, int, list[int]]]:
    """The rows with a piece of document --doc, record batch by record batch; rows of a document follow one another."""
    corpus = folder.manifest.corpus
    if config.source is None and len(corpus) > 1:
        names = ", ".join(f"{index} {file.path}" for index, file in enumerate(corpus[:8]))
        more = f" and {len(corpus) - 8} more" if len(corpus) > 8 else ""
        raise ValueError(
            f"{folder.path}: has several corpus files, each with a document {config.doc}; add --source, one of: {names}{more}"
        )
    source = config.source or 0
    for done, total, batch in _batches(folder, ["doc_ids", "source"], config.source):
        columns = batch.column("doc_ids").to_pylist(), batch.column("source").to_pylist()
        found = [row for row, (ids, own) in enumerate(zip(*columns)) if own == source and config.doc in ids]
        yield done, total, [done - batch.num_rows + row for row in found]


def _has_text(folder: ShardFolder, config: InspectConfig) -> Iterator[tuple[int, int, list[int]]]:
    """The rows whose decoded text holds --search, record batch by record batch."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(json.dumps(folder.tokenizer_json()))
    for done, total, batch in _batches(folder, ["input_ids", "source"], config.source):
        texts = tokenizer.decode_batch(batch.column("input_ids").to_pylist(), skip_special_tokens=False)
        own = batch.column("source").to_pylist()
        found = [
            row for row, text in enumerate(texts) if (config.search or "") in text and config.source in (None, own[row])
        ]
        yield done, total, [done - batch.num_rows + row for row in found]


def _batches(folder: ShardFolder, columns: list[str], source: int | None) -> Iterator[tuple[int, int, pa.RecordBatch]]:
    """Record batches of all parts that are committed, with one past the batch's last row and the folder's rows."""
    manifest = folder.manifest
    first, last = 0, manifest.rows
    if source is not None and not manifest.selections:  # a selection kept some rows of each file
        first = sum(file.rows for file in manifest.corpus[:source])
        last = first + manifest.corpus[source].rows
    missing = set(folder.missing_parts())
    for index, plan in enumerate(manifest.parts):
        done = index * manifest.rows_per_part
        if done >= last or done + plan.rows <= first or plan.name in missing:
            continue
        reader = folder.open_part(plan.name, columns)
        for number in range(reader.num_record_batches):
            batch = reader.get_batch(number)
            done += batch.num_rows
            yield done, manifest.rows, batch


def read_rows(folder: ShardFolder, rows: list[int]) -> Iterator[dict[str, Any]]:
    """The rows of these ascending numbers, as plain Python values; each of their parts is verified first, once.

    Beside its columns a row has "quarantined": the names of the references that it has no log-probs of.
    """
    manifest = folder.manifest
    opened, reader, quarantined = -1, None, {}
    for row in rows:
        if not 0 <= row < manifest.rows:
            raise ValueError(f"--row is {row}, {folder.path} has rows 0..{manifest.rows - 1}")
        part, row_of_part = divmod(row, manifest.rows_per_part)
        if part != opened:
            opened, reader = part, folder.open_part(manifest.parts[part].name)
            quarantined = folder.record(manifest.parts[part].name).quarantined
        assert reader is not None
        batch, row_of_batch = divmod(row_of_part, manifest.rows_per_batch)
        values = reader.get_batch(batch).slice(row_of_batch, 1).to_pylist()[0]
        yield values | {"quarantined": [name for name, own in quarantined.items() if row_of_part in own]}
