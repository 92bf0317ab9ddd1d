"""Columns of token ids: lists of integers in a parquet or Arrow file, a dataset, or JSON lines.

A document is a row. In: a source and the name of the column. Out: blocks of documents, and of the kept fields.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from scorer.corpus import records
from scorer.faults import BadDocument, BadFile
from scorer.fields import MISSING, REMEDY, Fields, find
from scorer.formats import TABLES
from scorer.hf_datasets import json_files, read_columns
from scorer.sources import Source
from scorer.tables import table_batches
from scorer.tokens.blocks import BLOCK_TOKENS, TokenBlock, require_length
from scorer.tokens.masks import KINDS, Beside, IdFields, no_list, predicted

MOST_ROWS = 1024  # that are read at once, of which some may be far longer than the mean
DATASET_ROWS = 64


def column_blocks(source: Source, fields: IdFields, max_window: int) -> Iterator[TokenBlock]:
    """Blocks of the documents of a source. fields: text is the column with the ids."""
    if source.shard is not None and json_files(source.shard) is None:
        yield from _joined(_dataset_blocks(source, fields))
    elif source.shard is None and source.format[0] in TABLES:
        yield from _joined(_table_blocks(source, fields))
    else:
        yield from _joined(_record_blocks(source, fields, max_window))


def _joined(blocks: Iterator[TokenBlock]) -> Iterator[TokenBlock]:
    """Small blocks put together: what follows costs some time per block."""
    held: list[TokenBlock] = []
    tokens = 0
    for block in blocks:
        if held and tokens + len(block.ids) > BLOCK_TOKENS:
            yield join(held)
            held, tokens = [], 0
        held.append(block)
        tokens += len(block.ids)
        if tokens >= BLOCK_TOKENS:
            yield join(held)
            held, tokens = [], 0
    if held:
        yield join(held)


def join(blocks: list[TokenBlock]) -> TokenBlock:
    """One block of the documents of several; those without a mask are predicted whole where others have one."""
    if len(blocks) == 1:
        return blocks[0]
    bad: dict[int, BadDocument] = {}
    before = 0
    for block in blocks:
        bad |= {before + place: fault for place, fault in block.bad.items()}
        before += len(block.lengths)
    kept = [row for block in blocks for row in block.fields or []]
    predict = None
    if any(block.predict is not None for block in blocks):
        masks = (np.ones(len(block.ids), bool) if block.predict is None else block.predict for block in blocks)
        predict = np.concatenate(list(masks))
    return TokenBlock(
        np.concatenate([block.ids for block in blocks]),
        np.concatenate([block.lengths for block in blocks]),
        blocks[-1].position,
        predict,
        bad=bad,
        fields=kept if blocks[0].fields is not None else None,
    )


def _table_blocks(source: Source, fields: IdFields) -> Iterator[TokenBlock]:
    def choose(names: list[str]) -> list[str]:
        if missing := fields.missing(names):
            option = "--tokens-field" if missing[0] in (fields.text, fields.text.partition(".")[0]) else "--keep-fields"
            raise BadFile(source.where, f"has no column {missing[0]!r}, only {', '.join(names)[:80]}; set {option}")
        return fields.columns(names)

    def rows_at_once(file: Any) -> list[tuple[list[int], int]]:
        """Of each row group so many that a block comes of them, by what the file says of its values."""
        found: list[tuple[list[int], int]] = []
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            columns = [group.column(index) for index in range(group.num_columns)]
            values = sum(one.num_values for one in columns if f"{one.path_in_schema}.".startswith(f"{fields.text}."))
            each = max(1, values // max(1, group.num_rows))
            rows = 1 << max(0, min(MOST_ROWS, BLOCK_TOKENS // each).bit_length() - 1)  # few sizes, so few readers
            if found and found[-1][1] == rows:
                found[-1][0].append(number)
            else:
                found.append(([number], rows))
        return found

    for batch, first, position in table_batches(source, choose, rows_at_once):
        yield from _blocks_of(batch, fields, f"{source.where}: row", first, position)


def _dataset_blocks(source: Source, fields: IdFields) -> Iterator[TokenBlock]:
    assert source.shard is not None
    first = 0
    try:
        for table in read_columns(source.shard, fields, DATASET_ROWS):
            for batch in table.combine_chunks().to_batches():
                yield from _blocks_of(batch, fields, f"{source.where}: row", first, 0)
                first += batch.num_rows
    except BadFile:
        raise
    except ValueError as error:
        if source.shard.revision:
            raise
        raise BadFile(source.where, str(error).removeprefix(f"{source.shard.name}: ")) from None


def _blocks_of(batch: pa.RecordBatch, fields: IdFields, where: str, first: int, position: int) -> Iterator[TokenBlock]:
    """A block of the rows, or several where they have more tokens than a block: some rows may be far longer than most."""
    column = column_of(batch, fields.text)
    if batch.num_rows < 2 or column is None or not _is_list(column.type):
        yield _block_of(batch, fields, where, first, position)
        return
    lengths = pa.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
    ends, row = np.cumsum(lengths.astype(np.int64)), 0
    while row < batch.num_rows:
        before = int(ends[row - 1]) if row else 0
        stop = max(row + 1, int(np.searchsorted(ends, before + BLOCK_TOKENS, side="right")))
        yield _block_of(batch.slice(row, stop - row), fields, where, first + row, position)
        row = stop


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _block_of(batch: pa.RecordBatch, fields: IdFields, where: str, first: int, position: int) -> TokenBlock:
    column = column_of(batch, fields.text)
    if column is None:
        raise BadFile(
            where.removesuffix(": row"),
            f"has no column {fields.text!r}, only {', '.join(f'{field.name}: {field.type}' for field in batch.schema)[:120]}; set --tokens-field",
        )
    ids, lengths, bad = _lists(column, fields.text, where, first)
    beside = {}
    for kind in KINDS:
        named = ((name, column_of(batch, name)) for name in fields.beside(kind))
        name, column = next((pair for pair in named if pair[1] is not None), ("", None))
        if column is not None:
            beside[kind] = _beside(column, name, lengths, bad, where)
    kept = None
    if fields.kept:
        roots = Fields(fields.kept[0], kept=fields.kept).columns(batch.schema.names)
        rows = batch.select([name for name in roots if name in batch.schema.names]).to_pylist()
        kept = [fields.kept_of(row) for row in rows] if rows else [(None,) * len(fields.kept)] * batch.num_rows
    return TokenBlock(ids, lengths, position, predicted(ids, lengths, beside, where, first), bad=bad, fields=kept)


def column_of(batch: pa.RecordBatch, name: str) -> pa.Array | None:
    """The column of this name, else what a dot in it leads to in an object; None where there is neither."""
    names = batch.schema.names
    if name in names:
        return batch.column(names.index(name))
    for dot in (place for place, letter in enumerate(name) if letter == "."):
        if name[:dot] in names:
            column = batch.column(names.index(name[:dot]))
            if pa.types.is_struct(column.type):
                # flatten hands the null of an object on to what is in it
                inner = pa.RecordBatch.from_arrays(column.flatten(), names=[field.name for field in column.type])
                found = column_of(inner, name[dot + 1 :])
                if found is not None:
                    return found
    return None


def _beside(column: pa.Array, name: str, lengths: np.ndarray, bad: Mapping[int, BadDocument], where: str) -> Beside:
    """A column of lists, or of null, beside the ids; bad documents count as having none."""
    kind = column.type
    if pa.types.is_null(kind):
        column = pa.nulls(len(column), pa.list_(pa.int8()))
    elif not _is_list(kind):
        raise no_list(where.removesuffix(": row"), name, f"of type {kind}")
    if bad:
        is_bad = np.zeros(len(column), dtype=bool)
        is_bad[list(bad)] = True
        column = pa.compute.if_else(pa.array(is_bad), pa.scalar(None, column.type), column)
    is_null = column.is_null().to_numpy(zero_copy_only=False)
    own = pa.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    return Beside(name, column.flatten().to_numpy(zero_copy_only=False), own, is_null)


def _lists(
    column: pa.Array, name: str, where: str, first: int
) -> tuple[np.ndarray, np.ndarray, dict[int, BadDocument]]:
    """Values, lengths and bad rows of a column of lists."""
    kind = column.type
    is_list = _is_list(kind)
    if pa.types.is_null(kind):
        column, is_list = pa.nulls(len(column), pa.list_(pa.int32())), True
    elif not is_list or not (pa.types.is_integer(kind.value_type) or pa.types.is_null(kind.value_type)):
        raise BadFile(
            where.removesuffix(": row"),
            f"column {name!r} is of type {kind}, expected lists of integers; set --tokens-field",
        )
    bad = {}
    if column.null_count:
        for row in np.flatnonzero(column.is_null().to_numpy(zero_copy_only=False)).tolist():
            bad[row] = BadDocument(
                f"{where} {first + row}: {name} is null, expected token ids; correct it, or {REMEDY}"
            )
    values = column.flatten()  # leaves out what null lists have
    if values.null_count:
        own = pa.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False)
        has_null = np.zeros(len(column), dtype=bool)
        has_null[np.repeat(np.arange(len(column)), own)[values.is_null().to_numpy(zero_copy_only=False)]] = True
        for row in np.flatnonzero(has_null).tolist():
            bad[row] = BadDocument(f"{where} {first + row}: {name} has a null among its ids; correct it, or {REMEDY}")
        column = pa.compute.if_else(pa.array(has_null), pa.scalar(None, column.type), column)
        values = column.flatten()
    lengths = pa.compute.list_value_length(column).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    if not len(values):
        return np.zeros(0, np.int32), lengths, bad
    return values.to_numpy(zero_copy_only=False), lengths, bad


def _record_blocks(source: Source, fields: IdFields, max_window: int) -> Iterator[TokenBlock]:
    """Blocks of JSON lines."""
    for number, (where, record, position) in enumerate(records(source, fields, max_window)):
        value = record if isinstance(record, BadDocument) else find(record, fields.text)
        kept = [(None,) * len(fields.kept) if isinstance(record, BadDocument) else fields.kept_of(record)]
        ids: Any = value
        if value is MISSING:
            names = ", ".join(map(str, record))[:80]
            ids = BadDocument(f"{where}: has no field {fields.text!r}, only {names}; set --tokens-field, or {REMEDY}")
        elif isinstance(value, list) and all(type(token) is int for token in value):
            require_length(source.where, number, len(value))
            if value and not -(1 << 63) <= min(value) <= max(value) < 1 << 63:
                ids = BadDocument(
                    f"{where}: field {fields.text!r} has a number of more than 64 bits, which is no id; correct it, or {REMEDY}"
                )
        elif not isinstance(value, BadDocument):
            what = str(value)[:40] if isinstance(value, list) else f"{type(value).__name__} {str(value)[:40]!r}"
            ids = BadDocument(
                f"{where}: field {fields.text!r} is {what}, expected a list of integers; set --tokens-field, correct the line, "
                f"or {REMEDY}"
            )
        if isinstance(ids, BadDocument):
            yield TokenBlock(np.zeros(0, np.int64), np.zeros(1, np.int64), position, bad={0: ids}, fields=kept or None)
            continue
        array = np.array(ids, dtype=np.int64)
        predict = _predicted_of(record, fields, array, where)
        yield TokenBlock(array, np.array([len(ids)], np.int64), position, predict, fields=kept)


def _predicted_of(record: Any, fields: IdFields, ids: np.ndarray, where: str) -> np.ndarray | None:
    """What is to be predicted of the ids of a record, as `predicted` says."""
    beside = {}
    for kind in KINDS:
        found = ((name, find(record, name)) for name in fields.beside(kind))
        name, values = next(((name, value) for name, value in found if value is not MISSING), ("", None))
        if values is None:
            continue
        if not isinstance(values, list) or not all(isinstance(value, int | float) for value in values):
            raise no_list(where, name, f"{type(values).__name__} {str(values)[:40]}")
        lengths = np.array([len(values)], np.int64)
        beside[kind] = Beside(name, np.array(values), lengths, np.zeros(1, dtype=bool))
    return predicted(ids, np.array([len(ids)], np.int64), beside, [where])
