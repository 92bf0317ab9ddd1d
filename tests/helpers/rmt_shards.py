"""Shards with made-up entropies for the tests of reinforcement mid-training, and brute force over their rows."""

import shutil
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from annotated import annotate
from oracles import contexts, read_rows

from shards import write_part
from shards.manifest import Manifest

THRESHOLDS = (0.5, 1.0, 1.5)


def made_up_entropy(row: dict) -> list[float | None]:
    """Between 0 and 2 nat in steps of 1/64, thresholds among them; none where nothing precedes in the row."""
    ids = row["input_ids"]
    values = [zlib.crc32(f"{place} {ids}".encode()) % 129 / 64 for place in range(len(ids))]
    return [None, *values[1:]]


def made_up_logprobs(row: dict) -> list[float | None]:
    return [None, *[-(1 + place) / 64 for place in range(1, len(row["input_ids"]))]]


def with_entropy(shards: Path, out: Path, **provenance: object) -> Path:
    return annotate(shards, out, made_up_logprobs, "packed", entropy=made_up_entropy, **provenance)


def with_predict(shards: Path, out: Path, predict: Callable[[dict], list[bool]]) -> Path:
    """Write `shards` again with a column of what is to be predicted, which `predict` gives for each row."""
    old = Manifest.read(shards)
    plan = replace(old, predict=True)
    shutil.copytree(shards / "_tokenizer", out / "_tokenizer")
    plan.write(out)
    for index, part in enumerate(old.parts):
        table = pa.ipc.open_file(shards / part.name).read_all()
        columns = {name: table.column(name) for name in table.column_names}
        columns["predict"] = pa.array([predict(row) for row in table.to_pylist()], plan.schema.field("predict").type)
        whole = pa.table([columns[name] for name in plan.schema.names], schema=plan.schema)
        batches = whole.combine_chunks().to_batches(max_chunksize=plan.rows_per_batch)
        write_part(out, part.name, plan.schema, plan.part_metadata(index), batches, {})
    return out


def places_by_tier(shards: Path, thresholds: tuple[float, ...] = THRESHOLDS) -> list[list[tuple[int, int]]]:
    """(row, place) of each tier in corpus order, by pyarrow alone. The first token of a document is in none, nor what
    is not to be predicted."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(len(thresholds) + 1)]
    for number, row in enumerate(read_rows(shards)):
        starts = {start for start, _ in contexts(row, "document")}
        for place, value in enumerate(row["rl_entropy"]):
            if value is not None and place not in starts and row.get("predict", [True] * (place + 1))[place]:
                found[sum(value >= threshold for threshold in thresholds)].append((number, place))
    return found
