"""Which documents a row has, where in their file they stand, and the fields that are kept of them: in words, a line each."""

from pipelines.token_text import printable
from scorer.formats import LINES, TOKENS, format_of
from shards.folder import ShardFolder
from shards.rows import Rows
from shards.side_table import fields_of

MAX_VALUE = 120  # characters of a kept field


def place_in_file(path: str, first: int, last: int) -> str:
    """Where documents `first` to `last` of the corpus file `path` stand in it. Ordinals count from 0, lines from 1."""
    form = format_of(path)
    if form is not None and form[0] in LINES:
        return f"{_range('line', first + 1, last + 1)}, empty ones not counted"
    unit = "document" if form is not None and form[0] in TOKENS else "row"
    return f"{_range(unit, first, last)}, counted from 0"


def _range(unit: str, first: int, last: int) -> str:
    return f"{unit} {first:,}" if first == last else f"{unit}s {first:,} to {last:,}"


def document_lines(folder: ShardFolder, row: Rows) -> list[str]:
    """The documents of a row and their place in its corpus file."""
    source, doc_ids = int(row.source[0]), row.doc_ids.tolist()
    path = folder.manifest.corpus[source].path
    first, last = doc_ids[0], doc_ids[-1]
    lines = [f"{_range('document', first, last)} of {printable(path)}: {place_in_file(path, first, last)}"]
    return lines + field_lines(folder, row)


def field_lines(folder: ShardFolder, row: Rows) -> list[str]:
    """The kept fields of each document of a row."""
    source, doc_ids = int(row.source[0]), row.doc_ids.tolist()
    fields = fields_of(folder, source, doc_ids)
    return [
        f"document {doc_id}: "
        + ", ".join(f"{printable(name)} {_value(value)}" for name, value in fields[doc_id].items())
        for doc_id in dict.fromkeys(doc_ids)
        if doc_id in fields
    ]


def _value(value: object) -> str:
    text = printable(value) if isinstance(value, str) else "-" if value is None else str(value)
    return text if len(text) <= MAX_VALUE else text[: MAX_VALUE - 1] + "…"
