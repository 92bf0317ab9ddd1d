"""Which rows of a folder remit inspect shows: by number, by document, by text.

In: a shard folder and the options. Out: row numbers, counted over all parts, ascending.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

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
    manifest, corpus = folder.manifest, folder.manifest.corpus
    if config.source is not None and config.source >= len(corpus):
        raise ValueError(f"--source is {config.source}, {folder.path} has corpus files 0..{len(corpus) - 1}")
    source = config.source
    if config.doc is not None and source is None:
        if len(corpus) > 1:
            names = ", ".join(f"{index} {file.path}" for index, file in enumerate(corpus[:8]))
            more = f" and {len(corpus) - 8} more" if len(corpus) > 8 else ""
            raise ValueError(
                f"{folder.path}: has several corpus files, each with a document {config.doc}; add --source, one of: {names}{more}"
            )
        source = 0
    if config.doc is not None:
        what, columns, has_it = f"has document {config.doc}", ["doc_ids", "doc_lengths"], _has_document(config.doc)
    else:
        what, columns, has_it = (
            f"has {config.search!r} in its text",
            ["input_ids"],
            _has_text(folder, config.search or ""),
        )
    missing = folder.missing_parts()
    rows: list[int] = []
    is_cut = False
    for batch in folder.batches([*columns, "source"], _parts(folder, source, missing)):
        of_source = True if source is None else batch.source == source
        found = batch.numbers[has_it(batch) & of_source].tolist()
        done = int(batch.numbers[-1]) + 1
        rows += found
        progress(done, manifest.rows)
        if rows and not found and config.doc is not None and not manifest.packing:
            break  # rows of a document follow one another, but under best-fit packing the rest of a long one comes later
        if len(rows) >= config.limit:
            is_cut = len(rows) > config.limit or done < manifest.rows
            break
    unread = f"{len(missing):,} of {len(manifest.parts):,} parts are not committed yet and were not looked at"
    if not rows:
        where = "" if config.source is None else f" from corpus file {config.source}, {corpus[config.source].path},"
        raise ValueError(
            f"{folder.path}: no row{where} {what}; "
            + (unread if missing else "remit inspect without it shows what the folder holds")
        )
    chosen = "each row that " + what + ("" if source is None else f", of corpus file {corpus[source].path}")
    remarks = [f"only the first {config.limit:,} found are shown; --limit shows more, if there are"] if is_cut else []
    return Found(rows[: config.limit], chosen, (*remarks, *([unread] if missing else [])))


def _has_document(document: int) -> Callable[[Rows], np.ndarray]:
    return lambda rows: np.array([document in rows.doc_ids[rows.piece_place(row)] for row in range(len(rows))])


def _has_text(folder: ShardFolder, wanted: str) -> Callable[[Rows], np.ndarray]:
    tokenizer = TokenText(folder).tokenizer

    def has_it(rows: Rows) -> np.ndarray:
        ids = [rows.ids[rows.place(row)].tolist() for row in range(len(rows))]
        return np.array([wanted in text for text in tokenizer.decode_batch(ids, skip_special_tokens=False)])

    return has_it


def _parts(folder: ShardFolder, source: int | None, missing: list[str]) -> list[str]:
    """The parts that are committed, and that may have rows of `source`."""
    manifest = folder.manifest
    first, last = 0, manifest.rows
    if source is not None and not manifest.selections:  # a selection kept some rows of each file
        first = sum(file.rows for file in manifest.corpus[:source])
        last = first + manifest.corpus[source].rows
    size = manifest.rows_per_part
    may_have = manifest.parts[first // size : -(-last // size)]
    left_out = set(missing)
    return [plan.name for plan in may_have if plan.name not in left_out]
