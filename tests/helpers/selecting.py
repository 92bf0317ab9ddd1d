"""Shard folders with the log-probs of several references, made without an engine, and the selection by brute force."""

import json
from collections.abc import Callable, Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
from damage import TOKENIZER, TOKENIZER_JSON
from oracles import contexts, read_rows

from shards import CorpusFile, Manifest, PartPlan, ShardFolder, row_schema, write_part
from shards.manifest import part_name
from shards.quarantine import write_quarantined_rows
from shards.schema import list_array

PACKED = {"context": "packed", "logprob_step": 0.25}
Values = Callable[[int], np.ndarray]


def corpus_rows(rng: np.random.Generator, files: Iterable[int], seq_len: int) -> tuple[list[dict], list[CorpusFile]]:
    """Rows as pack cuts them, of files with so many documents; every fifth document is EOS alone."""
    rows: list[dict] = []
    plans = []
    for source, documents in enumerate(files):
        ids: list[int] = []
        owner: list[int] = []
        for document in range(documents):
            length = 1 if document % 5 == 4 else int(rng.integers(2, 3 * seq_len))
            ids += [*rng.integers(1, 100, length - 1).tolist(), 0]
            owner += [document] * length
        starts = range(0, len(ids), seq_len)
        for start in starts:
            documents_here, counts = np.unique(owner[start : start + seq_len], return_counts=True)
            rows.append({
                "input_ids": ids[start : start + seq_len], "doc_lengths": counts.tolist(),
                "doc_ids": documents_here.tolist(), "source": source,
            })  # fmt: skip
        plans.append(CorpusFile(f"{source}.jsonl", 1, "0" * 64, documents, documents, 0, 0, len(starts), len(ids)))
    return rows, plans


def add_reference(
    rows: list[dict], name: str, reference: dict, values: Values, quarantined: Iterable[int] = ()
) -> None:
    """A column of values(count), and of as many top_k entries; null where nothing precedes and in quarantined rows."""
    k = reference.get("top_k", 0)
    for index, row in enumerate(rows):
        column: list = values(len(row["input_ids"])).tolist()
        for start, _ in contexts(row, reference["context"]):
            column[start] = None
        row[f"{name}_logprobs"] = [None] * len(column) if index in quarantined else column
        if k:
            # the token itself is the most probable one, whatever it has
            pairs = [
                (None if value is None else token, value)
                for token, value in zip(row["input_ids"], row[f"{name}_logprobs"])
            ]
            row[f"{name}_topk_ids"] = [t if t is None else [(t + 7 * j) % 101 for j in range(k)] for t, _ in pairs]
            row[f"{name}_topk_logprobs"] = [v if v is None else [v - 8.0 * j for j in range(k)] for _, v in pairs]


def write_rows(
    folder: Path,
    rows: list[dict],
    files: list[CorpusFile],
    references: dict[str, dict],
    quarantined: dict[str, list[int]],
    seq_len: int,
    rows_per_part: int,
    rows_per_batch: int,
) -> ShardFolder:
    """A complete folder of these rows. quarantined: per reference rows counted over all parts."""
    (folder / "_tokenizer").mkdir(parents=True)
    (folder / "_tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    pieces = [rows[first : first + rows_per_part] for first in range(0, len(rows), rows_per_part)]
    plans = tuple(
        PartPlan(part_name(index), len(piece), sum(len(row["input_ids"]) for row in piece))
        for index, piece in enumerate(pieces)
    )
    manifest = Manifest(seq_len, rows_per_part, rows_per_batch, TOKENIZER, tuple(files), plans, references)
    manifest.write(folder)
    store, manifest = ShardFolder(folder).store, Manifest.read(folder)  # which has the references in order of name
    for index, (plan, piece) in enumerate(zip(plans, pieces)):
        here = {
            name: [row - index * rows_per_part for row in listed if row // rows_per_part == index]
            for name, listed in quarantined.items()
        }
        side = [
            {"reference": name, "row": row, "reason": f"no {name}", "input_ids": piece[row]["input_ids"]}
            for name, listed in here.items()
            for row in listed
        ]
        write_quarantined_rows(store, plan.name, side)
        table = pa.Table.from_pylist(piece, schema=manifest.schema)
        batches = [
            table.slice(first, rows_per_batch).combine_chunks().to_batches()[0]
            for first in range(0, len(piece), rows_per_batch)
        ]
        record = {name: listed for name, listed in here.items() if listed}
        write_part(folder, plan.name, manifest.schema, manifest.part_metadata(index), batches, record)
    return ShardFolder(folder)


def write_uniform(folder: Path, num_rows: int, seq_len: int, rows_per_part: int) -> None:
    """Many rows of one length, one document each, with random log-probs rl and base; built by numpy, part by part."""
    (folder / "_tokenizer").mkdir(parents=True)
    (folder / "_tokenizer" / "tokenizer.json").write_text(json.dumps(TOKENIZER_JSON))
    file = CorpusFile("a.jsonl", 1, "0" * 64, num_rows, num_rows, 0, 0, num_rows, num_rows * seq_len)
    counts = [min(rows_per_part, num_rows - first) for first in range(0, num_rows, rows_per_part)]
    plans = tuple(PartPlan(part_name(index), count, count * seq_len) for index, count in enumerate(counts))
    references = {"base": PACKED, "rl": PACKED}
    manifest = Manifest(seq_len, rows_per_part, rows_per_part, TOKENIZER, (file,), plans, references)
    manifest.write(folder)
    rng = np.random.default_rng(0)
    for index, (plan, count) in enumerate(zip(plans, counts)):
        lengths = np.full(count, seq_len)
        ids = rng.integers(1, 100, (count, seq_len), dtype=np.int32)
        ids[:, -1] = 0
        ordinals = np.arange(count) + index * rows_per_part
        columns = [
            list_array(ids.ravel(), lengths),
            list_array(np.full(count, seq_len, np.int32), np.ones(count)),
            list_array(ordinals, np.ones(count)),
            pa.array(np.zeros(count, np.int32)),
        ]
        for _ in references:
            values = (-rng.integers(0, 40, count * seq_len) / 4).astype(np.float32)
            first = np.arange(count * seq_len) % seq_len == 0
            columns.append(list_array(pa.array(values, mask=first), lengths))
        batch = pa.record_batch(columns, schema=manifest.schema)
        write_part(folder, plan.name, manifest.schema, manifest.part_metadata(index), [batch])


def annotate_two(shards: Path, out: Path, seed: int = 0) -> Path:
    """A packed folder with columns rl_logprobs and base_logprobs of random numbers."""
    old, rng = Manifest.read(shards), np.random.default_rng(seed)
    references = {name: {"context": "packed", "logprob_step": 1 / 64, "model": name} for name in ("rl", "base")}
    manifest = Manifest(**{f: getattr(old, f) for f in old.__dataclass_fields__} | {"references": references})
    (out / "_tokenizer").mkdir(parents=True)
    for file in (shards / "_tokenizer").iterdir():
        (out / "_tokenizer" / file.name).write_bytes(file.read_bytes())
    manifest.write(out)
    schema = row_schema(sorted(references))
    for index, part in enumerate(manifest.parts):
        rows = pa.ipc.open_file(shards / part.name).read_all().to_pylist()
        for name in references:
            add_reference(rows, name, references[name], lambda count: -rng.integers(0, 400, count) / 64)
        batches = pa.Table.from_pylist(rows, schema=schema).to_batches(max_chunksize=manifest.rows_per_batch)
        write_part(out, part.name, schema, manifest.part_metadata(index), batches)
    return out


def exact_score(row: dict, teacher: str, small: str) -> Fraction | None:
    """Mean of log p_teacher less mean of log p_small, in fractions; None where there is nothing to take the mean of."""
    means = []
    for name in (teacher, small):
        values = [Fraction(value) for value in row[f"{name}_logprobs"] if value is not None]
        if not values:
            return None
        means.append(sum(values) / len(values))
    return means[0] - means[1]


def brute_force(shards: Path, teacher: str, small: str, count: int) -> tuple[list[dict], list[Fraction | None]]:
    """The rows to keep, read by pyarrow and ranked by a stable sort, and the scores of all."""
    rows = read_rows(shards)
    scores = [exact_score(row, teacher, small) for row in rows]
    ranking = sorted((index for index, score in enumerate(scores) if score is not None), key=lambda i: -scores[i])
    return [rows[index] for index in sorted(ranking[:count])], scores
