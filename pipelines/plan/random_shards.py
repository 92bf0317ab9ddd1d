"""A shard folder of random tokens, for timing alone: rows of full length, as remit pack writes them."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from shards import CorpusFile, Manifest, PartPlan, ShardFolder, row_schema, write_part
from shards.manifest import part_name


def make_shards(
    folder: Path, vocabulary: int, parts: int, rows_per_part: int, seq_len: int, docs_per_row: int = 1
) -> ShardFolder:
    """Write such a folder of parts x rows_per_part rows, with an empty tokenizer.

    docs_per_row: documents of equal length in each row; divides seq_len.
    """
    rng = np.random.default_rng(0)
    rows = parts * rows_per_part
    docs, doc_length = rows * docs_per_row, seq_len // docs_per_row
    assert doc_length * docs_per_row == seq_len
    source = CorpusFile("random", docs, "0" * 64, docs, docs, 0, 0, rows, rows * seq_len)
    tokenizer = {"fingerprint": "0" * 64, "eos_token_id": 0, "vocab_size": vocabulary, "special_tokens": "parse"}
    plans = tuple(PartPlan(part_name(index), rows_per_part, rows_per_part * seq_len) for index in range(parts))
    manifest = Manifest(seq_len, rows_per_part, rows_per_part, tokenizer, (source,), plans)
    manifest.write(folder)
    write_tokenizer(folder)
    for index, plan in enumerate(plans):
        ids = rng.integers(1, vocabulary, (rows_per_part, seq_len)).astype(np.int32)
        ids[:, doc_length - 1 :: doc_length] = 0
        doc_ids = np.arange(rows_per_part * docs_per_row).reshape(rows_per_part, docs_per_row)
        doc_ids += index * rows_per_part * docs_per_row
        columns = [
            pa.array(list(ids), pa.list_(pa.int32())),
            pa.array([[doc_length] * docs_per_row] * rows_per_part, pa.list_(pa.int32())),
            pa.array(list(doc_ids), pa.list_(pa.int64())),
            pa.array([0] * rows_per_part, pa.int32()),
        ]
        batch = pa.record_batch(columns, schema=row_schema())
        write_part(folder, plan.name, row_schema(), manifest.part_metadata(index), [batch])
    return ShardFolder(folder)


def write_tokenizer(folder: Path) -> None:
    """An empty tokenizer, which a shard folder without text needs too."""
    (folder / "_tokenizer").mkdir()
    (folder / "_tokenizer" / "tokenizer.json").write_text('{"model": {"vocab": {}, "merges": []}}')
