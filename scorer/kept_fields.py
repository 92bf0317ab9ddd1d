"""Fields that remit pack keeps beside the rows: collected while a corpus file is tokenised, typed once all are known.

A field has one type over the whole corpus: that of its values where they are of one kind, numbers where some are whole and
some not, else the text of JSON. While a file is read its values are JSON; the tables (shards/side_table.py) are made of
them before the plan is frozen.
"""

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa

from shards.part import sha256_file
from shards.side_table import DOC_ID, table_name, table_schema
from shards.store import Store

ROWS_AT_ONCE = 1 << 13
EXACT = 1 << 53  # whole numbers up to here are exact as floats
KINDS = ("null", "bool", "small", "int", "float", "string", "json")
"""Of values; small: whole numbers that are exact as floats."""


def kind_of(value: Any) -> str:
    """Of a value of JSON or of a table."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "small" if abs(value) <= EXACT else "int" if -(1 << 63) <= value < 1 << 63 else "json"
    if isinstance(value, float):
        return "float" if math.isfinite(value) else "json"
    return "string" if isinstance(value, str) and _is_unicode(value) else "json"


def _is_unicode(text: str) -> bool:
    """Whether a table can hold a text; one with half of a pair of surrogates stays JSON, which spells it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def join(kinds: set[str]) -> str:
    """The kind of a field that has values of these kinds."""
    kinds = kinds - {"null"}
    if not kinds:
        return "null"
    if kinds <= {"small", "int"}:
        return "int"
    if kinds <= {"small", "float"}:
        return "float"
    return next(iter(kinds)) if len(kinds) == 1 else "json"


def text_of_value(value: Any) -> str | None:
    """A value as JSON, in which what JSON has not, such as a date of a table, is its text."""
    return None if value is None else json.dumps(value, ensure_ascii=True, default=str)


class KeptFields:
    """The kept fields of a corpus file, in a staging file. Nothing is written where no field is kept."""

    def __init__(self, path: Path, names: tuple[str, ...]) -> None:
        self.path, self.names = path, names
        self.kinds: list[set[str]] = [set() for _ in names]
        self._doc_ids: list[int] = []
        self._rows: list[tuple[Any, ...]] = []
        self._schema = pa.schema([(DOC_ID, pa.int64()), *((name, pa.large_string()) for name in names)])
        self._writer = self._open() if names else None

    def _open(self) -> Any:
        return pa.ipc.new_file(str(self.path), self._schema, options=pa.ipc.IpcWriteOptions(compression="zstd"))

    def add(self, doc_ids: list[int], rows: list[tuple[Any, ...]]) -> None:
        """Take in the fields of some documents."""
        if self._writer is None:
            return
        self._doc_ids += doc_ids
        self._rows += rows
        if len(self._rows) >= ROWS_AT_ONCE:
            self._flush()

    def _flush(self) -> None:
        assert self._writer is not None
        columns = list(zip(*self._rows)) if self._rows else [()] * len(self.names)
        for kinds, column in zip(self.kinds, columns):
            kinds.update(map(kind_of, column))
        arrays = [pa.array(map(text_of_value, column), pa.large_string()) for column in columns]
        self._writer.write_batch(pa.record_batch([pa.array(self._doc_ids, pa.int64()), *arrays], schema=self._schema))
        self._doc_ids, self._rows = [], []

    def clear(self) -> None:
        """Forget all documents."""
        if self._writer is not None:
            self._writer.close()
            self.kinds, self._doc_ids, self._rows = [set() for _ in self.names], [], []
            self._writer = self._open()

    def close(self) -> list[list[str]]:
        """Write what is left; returns the kinds that the values of each field have."""
        if self._writer is not None:
            if self._rows:
                self._flush()
            self._writer.close()
        return [sorted(kinds) for kinds in self.kinds]


def staged_name(source: int) -> str:
    """The staging file of a corpus file's fields."""
    return f"fields-{source:05d}.arrow"


def field_types(names: tuple[str, ...], kinds_of_sources: list[list[list[str]]]) -> dict[str, str]:
    """The type of each field over all corpus files. ValueError for a field that no document has."""
    types = {}
    for place, name in enumerate(names):
        kind = join({kind for source in kinds_of_sources for kind in source[place]})
        if kind == "null":
            raise ValueError(f"--keep-fields: no document of the corpus has a field {name!r}; check its name")
        types[name] = kind
    return dict(sorted(types.items()))  # as the manifest has them


def write_table(staging: Store, out: Store, source: int, types: dict[str, str]) -> str:
    """Make the table of a corpus file out of its staging file; returns its sha256."""
    name, schema = table_name(source), table_schema(types)
    temporary = out.temporary(name)
    try:
        with (
            staging.open(staged_name(source)) as file,
            pa.ipc.new_file(str(temporary), schema, options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer,
        ):
            reader = pa.ipc.open_file(file)
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index)
                columns = [pa.array([source] * batch.num_rows, pa.int32()), batch.column(DOC_ID)]
                columns += [
                    _typed(batch.column(field), kind, schema.field(field).type) for field, kind in types.items()
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
        sha256 = sha256_file(temporary)
        out.put(temporary, name)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return sha256


def _typed(column: pa.Array, kind: str, type_: pa.DataType) -> pa.Array:
    if kind == "json":
        return column
    values = [None if text is None else json.loads(text) for text in column.to_pylist()]
    return pa.array([float(value) if kind == "float" and value is not None else value for value in values], type_)
