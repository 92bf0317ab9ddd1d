"""Which rows of a folder remit inspect shows: by number, by document, by text.

In: a shard folder and the options. Out: row numbers, counted over all parts, ascending.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipelines.inspect.settings import InspectConfig
from pipelines.token_text import TokenText
from shards.folder import ShardFolder
from shards.rows import Rows

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
    for done, rows in _batches(folder, ["doc_ids", "doc_lengths", "source"], config.source):
        has_it = [
            rows.source[row] == (config.source or 0) and config.doc in rows.doc_ids[rows.piece_place(row)]
            for row in range(len(rows))
        ]
        yield done, folder.manifest.rows, rows.numbers[has_it].tolist()


def _has_text(folder: ShardFolder, config: InspectConfig) -> Iterator[tuple[int, int, list[int]]]:
    """The rows whose decoded text holds --search, record batch by record batch."""
    tokenizer = TokenText(folder).tokenizer
    for done, rows in _batches(folder, ["input_ids", "source"], config.source):
        ids = [rows.ids[rows.place(row)].tolist() for row in range(len(rows))]
        texts = tokenizer.decode_batch(ids, skip_special_tokens=False)
        has_it = [
            (config.search or "") in text and config.source in (None, own)
            for text, own in zip(texts, rows.source.tolist())
        ]
        yield done, folder.manifest.rows, rows.numbers[has_it].tolist()


def _batches(folder: ShardFolder, columns: list[str], source: int | None) -> Iterator[tuple[int, Rows]]:
    """Record batches of all parts that are committed, or that may have rows of `source`; before each, the row that
    follows its last."""
    manifest = folder.manifest
    first, last = 0, manifest.rows
    if source is not None and not manifest.selections:  # a selection kept some rows of each file
        first = sum(file.rows for file in manifest.corpus[:source])
        last = first + manifest.corpus[source].rows
    missing = set(folder.missing_parts())
    starts = range(0, manifest.rows, manifest.rows_per_part)
    parts = [
        plan.name
        for start, plan in zip(starts, manifest.parts)
        if start < last and start + plan.rows > first and plan.name not in missing
    ]
    for rows in folder.batches(columns, parts):
        yield int(rows.numbers[-1]) + 1, rows
