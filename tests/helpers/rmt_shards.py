"""Shards with made-up entropies for the tests of reinforcement mid-training, and brute force over their rows."""

import zlib
from pathlib import Path

from annotated import annotate
from oracles import contexts, read_rows

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


def places_by_tier(shards: Path, thresholds: tuple[float, ...] = THRESHOLDS) -> list[list[tuple[int, int]]]:
    """(row, place) of each tier in corpus order, by pyarrow alone. The first token of a document is in none."""
    found: list[list[tuple[int, int]]] = [[] for _ in range(len(thresholds) + 1)]
    for number, row in enumerate(read_rows(shards)):
        starts = {start for start, _ in contexts(row, "document")}
        for place, value in enumerate(row["rl_entropy"]):
            if value is not None and place not in starts:
                found[sum(value >= threshold for threshold in thresholds)].append((number, place))
    return found
