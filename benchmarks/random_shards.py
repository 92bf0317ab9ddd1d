"""A shard folder of random tokens, for timing alone: rows of full length, as remit pack writes them."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import CorpusFile, Manifest, PartPlan, ShardFolder, row_schema, write_part
from shards.fingerprint import tokenizer_fingerprint
from shards.manifest import part_name

NO_TOKENIZER = {"model": {"vocab": {}, "merges": []}}


def make_shards(
    folder: Path,
    vocabulary: int,
    parts: int,
    rows_per_part: int,
    seq_len: int,
    docs_per_row: int = 1,
    last_row: int | None = None,
) -> ShardFolder:
    """Write such a folder of parts x rows_per_part rows, with an empty tokenizer.

    docs_per_row: documents of equal length in each row; divides seq_len. last_row: tokens of the last row, one document;
    default: as the others.
    """
    rng = np.random.default_rng(0)
    rows = parts * rows_per_part
    doc_length = seq_len // docs_per_row
    assert doc_length * docs_per_row == seq_len
    lengths = [[doc_length] * docs_per_row] * rows
    if last_row is not None:
        lengths[-1] = [last_row]
    docs = sum(map(len, lengths))
    source = CorpusFile("random", docs, "0" * 64, docs, docs, 0, 0, rows, sum(map(sum, lengths)))
    tokenizer = {
        "fingerprint": tokenizer_fingerprint(NO_TOKENIZER),
        "eos_token_id": 0,
        "vocab_size": vocabulary,
        "special_tokens": "parse",
    }
    of_part = [lengths[first : first + rows_per_part] for first in range(0, rows, rows_per_part)]
    plans = tuple(
        PartPlan(part_name(index), rows_per_part, sum(map(sum, of_part[index]))) for index in range(parts)
    )  # fmt: skip
    manifest = Manifest(seq_len, rows_per_part, rows_per_part, tokenizer, (source,), plans)
    manifest.write(folder)
    write_tokenizer(folder)
    for index, plan in enumerate(plans):
        rows_of_ids = list(rng.integers(1, vocabulary, (rows_per_part, seq_len)).astype(np.int32))
        for row, row_lengths in enumerate(of_part[index]):
            ends = np.cumsum(row_lengths)
            rows_of_ids[row] = rows_of_ids[row][: ends[-1]]
            rows_of_ids[row][ends - 1] = 0
        first = index * rows_per_part * docs_per_row
        doc_ids = [
            [first + row * docs_per_row + doc for doc in range(len(of_part[index][row]))]
            for row in range(rows_per_part)
        ]
        columns = [
            pa.array(rows_of_ids, pa.list_(pa.int32())),
            pa.array(of_part[index], pa.list_(pa.int32())),
            pa.array(doc_ids, pa.list_(pa.int64())),
            pa.array([0] * rows_per_part, pa.int32()),
        ]
        batch = pa.record_batch(columns, schema=row_schema())
        write_part(folder, plan.name, row_schema(), manifest.part_metadata(index), [batch])
    return ShardFolder(folder)


def write_tokenizer(folder: Path) -> None:
    """An empty tokenizer, which a shard folder without text needs too."""
    (folder / "_tokenizer").mkdir()
    (folder / "_tokenizer" / "tokenizer.json").write_text(json.dumps(NO_TOKENIZER))
