"""Which fields of a document's record are read: the one with its text, or several that a template puts together, and
those that are kept beside the rows.

A record is a JSON object or a row of a table. In: the options. Out: the columns to read, and the text of a record.
"""

import string
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from scorer.faults import BadDocument

REMEDY = "pass --on-bad-document reject to leave such documents out"
ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}
MISSING = object()


@dataclass(frozen=True)
class Fields:
    """text: name of the field with the text, unless there is a template. kept: names of the fields that go into the side
    table. A dot in a name leads into an object: meta.url is url in meta, unless the record has a field meta.url itself."""

    text: str = "text"
    template: str | None = None
    kept: tuple[str, ...] = ()

    @cached_property
    def pieces(self) -> list[tuple[str, str | None]]:
        """The template as text and the field behind it, None at its end."""
        return parse_template(self.template or "")

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The fields that make a document's text."""
        if self.template is None:
            return (self.text,)
        return tuple(dict.fromkeys(name for _, name in self.pieces if name is not None))

    @property
    def option(self) -> str:
        """What a user sets where a field is missing."""
        return "--text-field" if self.template is None else "--template"

    def columns(self, present: Iterable[str]) -> list[str]:
        """Which of the columns that are there to read; those that are missing under the names that were asked for."""
        there = set(present)
        roots = (name if name in there else name.partition(".")[0] for name in (*self.names, *self.kept))
        return list(dict.fromkeys(roots))

    def missing(self, present: Iterable[str]) -> list[str]:
        """The columns that are not among those that are there."""
        there = set(present)
        return [name for name in self.columns(there) if name not in there]

    def text_of(self, where: str, record: Mapping[str, Any]) -> str | BadDocument:
        """The text of a record, or what is wrong with it."""
        if self.template is None:
            return text_of(where, self.text, find(record, self.text), record, self.option)
        texts = []
        for literal, name in self.pieces:
            texts.append(literal)
            if name is not None:
                value = text_of(where, name, find(record, name), record, self.option)
                if isinstance(value, BadDocument):
                    return value
                texts.append(value)
        return "".join(texts)

    def kept_of(self, record: Mapping[str, Any]) -> tuple[Any, ...]:
        """The kept fields of a record, None for one that it has not got."""
        values = (find(record, name) for name in self.kept)
        return tuple(None if value is MISSING else value for value in values)


def parse_template(template: str) -> list[tuple[str, str | None]]:
    """The pieces of a template: text, and the field behind it. {{ and }} are braces; backslash n, t and a backslash are a
    line break, a tab and a backslash. ValueError for what is no template."""
    example = r"expected fields in braces, for instance '{question}\n{answer}'; {{ and }} are braces"
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"--template {template!r}: {error}; {example}") from None
    pieces: list[tuple[str, str | None]] = []
    for literal, name, form, conversion in parsed:
        if name is not None and (not name.strip() or form or conversion):
            raise ValueError(f"--template {template!r}: {{{name}}} names no field alone; {example}")
        pieces.append((_unescaped(literal), name))
    if all(name is None for _, name in pieces):
        raise ValueError(f"--template {template!r}: has no field; {example}")
    return pieces


def _unescaped(text: str) -> str:
    """A backslash before n, t or another backslash as a shell hands it on; others stay."""
    pieces, rest = [], text
    while rest:
        before, backslash, rest = rest.partition("\\")
        pieces.append(before)
        if backslash:
            pieces.append(ESCAPES.get(rest[:1], "\\" + rest[:1]))
            rest = rest[1:]
    return "".join(pieces)


def find(record: Any, name: str) -> Any:
    """The value of a field, MISSING where there is none."""
    if not isinstance(record, Mapping):
        return MISSING
    if name in record:
        return record[name]
    for dot in (place for place, letter in enumerate(name) if letter == "."):
        value = find(record.get(name[:dot]), name[dot + 1 :])
        if value is not MISSING:
            return value
    return MISSING


def text_of(where: str, name: str, value: Any, record: Mapping[str, Any], option: str) -> str | BadDocument:
    """The text in a field, or what is wrong with it."""
    if value is MISSING:
        return BadDocument(
            f"{where}: has no field {name!r}, only {', '.join(map(str, record))[:80]}; set {option}, or leave such documents "
            "out with --on-bad-document reject"
        )
    if not isinstance(value, str):
        return BadDocument(
            f"{where}: field {name!r} is {type(value).__name__} {str(value)[:40]!r}, expected a string; correct the document, "
            f"or {REMEDY}"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:
        return BadDocument(
            f"{where}: field {name!r} has an unpaired surrogate at character {error.start}, expected valid Unicode; correct "
            f"the document, or {REMEDY}"
        )
    return value
