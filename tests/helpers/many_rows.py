"""A shard folder with several record batches in a part and all the columns that there can be, of random rows."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from damage import TOKENIZER, TOKENIZER_JSON

from shards import CorpusFile, Manifest, PartPlan, ShardFolder, write_part
from shards.manifest import FORMAT_VERSION, part_name

REFERENCE = {"context": "packed", "logprob_step": 0.25, "model": "m"}
REFERENCES = {
    "rl": REFERENCE | {"top_k": 2, "vocab_size": 120, "entropy": True},
    "base": REFERENCE,
}
DOCUMENTS = ("input_ids", "doc_lengths", "doc_ids", "source")
COLUMNS = {  # that an objective asks for, and what has to be read for it
    "ntp": (("input_ids",), DOCUMENTS),
    "remit": (("input_ids", "rl_logprobs"), (*DOCUMENTS, "rl_logprobs")),
    "rho1": (("input_ids", "base_logprobs"), (*DOCUMENTS, "base_logprobs")),
    "kd": (("input_ids", "rl_topk_ids", "rl_topk_logprobs"),
           (*DOCUMENTS, "rl_logprobs", "rl_topk_ids", "rl_topk_logprobs")),
}  # fmt: skip


def values_of(rng: np.random.Generator, num_rows: int, seq_len: int) -> dict[str, list]:
    """Rows of one document each, of `seq_len` tokens but the last, which may have one alone."""
    lengths = [seq_len] * (num_rows - 1) + [int(rng.integers(1, seq_len + 1))]
    values: dict[str, list] = {
        "input_ids": [[*rng.integers(1, 50, length - 1).tolist(), 0] for length in lengths],
        "doc_lengths": [[length] for length in lengths],
        "doc_ids": [[row] for row in range(num_rows)],
        "source": [0] * num_rows,
    }
    for name in REFERENCES:
        values[f"{name}_logprobs"] = [
            [None, *(-0.25 * rng.integers(1, 30, length - 1)).tolist()] for length in lengths
        ]  # fmt: skip
    own = [list(zip(*pair)) for pair in zip(values["input_ids"], values["rl_logprobs"])]
    values["rl_topk_ids"] = [[None if v is None else [token, token + 60] for token, v in row] for row in own]
    values["rl_topk_logprobs"] = [[None if v is None else [v, v - 2.0] for _, v in row] for row in own]
    values["rl_entropy"] = [[None if v is None else 0.25 * (token % 16) for token, v in row] for row in own]
    return values


def write_many_rows(
    folder: Path,
    num_rows: int = 21,
    seq_len: int = 40,
    rows_per_part: int = 8,
    rows_per_batch: int = 3,
    seed: int = 0,
    format_version: int = FORMAT_VERSION,
) -> ShardFolder:
    """Such a folder, in parts of `rows_per_part` rows."""
    values = values_of(np.random.default_rng(seed), num_rows, seq_len)
    (folder / "_tokenizer").mkdir(parents=True)
    (folder / "_tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    tokens = [len(row) for row in values["input_ids"]]
    starts = range(0, num_rows, rows_per_part)
    pieces = [slice(start, start + rows_per_part) for start in starts]
    plans = [PartPlan(part_name(index), len(tokens[p]), sum(tokens[p])) for index, p in enumerate(pieces)]
    file = CorpusFile("a.jsonl", 1, "0" * 64, num_rows, num_rows, 0, 0, num_rows, sum(tokens))
    manifest = Manifest(
        seq_len, rows_per_part, rows_per_batch, TOKENIZER, (file,), tuple(plans), REFERENCES, format_version=format_version
    )  # fmt: skip
    manifest.write(folder)
    table = pa.table([pa.array(values[field.name], field.type) for field in manifest.schema], schema=manifest.schema)
    for index, plan in enumerate(plans):
        part = table.slice(starts[index], rows_per_part).combine_chunks()
        write_part(
            folder,
            plan.name,
            manifest.schema,
            manifest.part_metadata(index),
            part.to_batches(max_chunksize=rows_per_batch),
        )
    return ShardFolder(folder)
