"""Fields of the corpus that are kept beside the rows: `_fields/source-00000.arrow`, a table for each corpus file.

A row per packed document: `_source`, the index of the corpus file; `_doc_id`, the document's ordinal in it, ascending; then
the kept fields, null where a document has none. The manifest has the names and types of the fields and the sha256 of each
table; they go along when a folder is scored or rows are selected.
"""

import hashlib
import os
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute

from shards.store import Store

if TYPE_CHECKING:
    from shards.folder import ShardFolder

FIELDS = "_fields"
SOURCE, DOC_ID = "_source", "_doc_id"
TYPES = {
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.large_string(),
    "json": pa.large_string(),
}
"""Of a kept field: all its values are of that kind, or, of json, text of JSON."""
COPIED_BYTES = 1 << 22


def table_name(source: int) -> str:
    """The table of a corpus file, by its index."""
    return f"{FIELDS}/source-{source:05d}.arrow"


def table_schema(fields: dict[str, str]) -> pa.Schema:
    """Columns of a table. fields: name and kind of each."""
    own = [pa.field(SOURCE, pa.int32(), nullable=False), pa.field(DOC_ID, pa.int64(), nullable=False)]
    return pa.schema([*own, *(pa.field(name, TYPES[kind]) for name, kind in fields.items())])


def fields_of(folder: "ShardFolder", source: int, doc_ids: list[int]) -> dict[int, dict[str, Any]]:
    """The kept fields of some documents of a corpus file, by ordinal. ValueError where the table is not the manifest's."""
    expected = folder.manifest.corpus[source].fields_sha256
    if expected is None or not folder.manifest.kept_fields:
        return {}
    name = table_name(source)
    if problem := _problem(folder.store, name, expected):
        raise ValueError(problem)
    found: dict[int, dict[str, Any]] = {}
    wanted = pa.array(sorted(set(doc_ids)), pa.int64())
    with folder.store.open(name) as file:
        reader = pa.ipc.open_file(file)
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            rows = batch.filter(pa.compute.is_in(batch.column(DOC_ID), wanted)).drop_columns([SOURCE]).to_pylist()
            found |= {row.pop(DOC_ID): row for row in rows}
            if len(found) == len(wanted):
                break
    return found


def table_problems(folder: "ShardFolder") -> list[str]:
    """What is wrong with the tables of a folder, a line each."""
    expected = {
        table_name(source): file.fields_sha256
        for source, file in enumerate(folder.manifest.corpus)
        if file.fields_sha256 is not None
    }
    found = [f"{FIELDS}/{name}" for name in folder.store.names(FIELDS) if not name.startswith(".")]
    problems = [
        f"{folder.store.where(name)}: is not in the manifest; delete it" for name in found if name not in expected
    ]
    return problems + [line for name, sha256 in expected.items() if (line := _problem(folder.store, name, sha256))]


def copy_tables(folder: "ShardFolder", to: Store) -> None:
    """Copy the tables into another folder, each checked against its hash."""
    for source, file in enumerate(folder.manifest.corpus):
        if file.fields_sha256 is None:
            continue
        name = table_name(source)
        temporary, digest = to.temporary(name), hashlib.sha256()
        try:
            with open(temporary, "wb") as copy, folder.store.open(name) as original:
                while data := original.read(COPIED_BYTES):
                    digest.update(data)
                    copy.write(data)
                copy.flush()
                os.fsync(copy.fileno())
            if digest.hexdigest() != file.fields_sha256:
                raise ValueError(_differs(folder.store, name, digest.hexdigest(), file.fields_sha256))
            to.put(temporary, name)
        except FileNotFoundError:
            temporary.unlink(missing_ok=True)
            raise ValueError(_missing(folder.store, name)) from None
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def _problem(store: Store, name: str, expected: str) -> str | None:
    try:
        sha256 = store.sha256(name)
    except FileNotFoundError:
        return _missing(store, name)
    return None if sha256 == expected else _differs(store, name, sha256, expected)


def _missing(store: Store, name: str) -> str:
    return f"{store.where(name)}: missing; copy it from a sound folder of the same corpus, or pack again"


def _differs(store: Store, name: str, found: str, expected: str) -> str:
    return (
        f"{store.where(name)}: sha256 {found[:12]}.. differs from the manifest's {expected[:12]}..; copy it from a sound folder of "
        "the same corpus, or pack again"
    )
