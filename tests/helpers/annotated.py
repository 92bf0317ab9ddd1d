"""Annotated shards without an engine, runs of the trainer, and the rows of a step: what the training tests share."""

import json
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from oracles import load, read_rows, row_distributions, row_logprobs

from shards import ShardFolder, write_part
from shards.entropy import entropy_columns
from shards.manifest import Manifest
from shards.quarantine import write_quarantined_rows
from shards.store import open_store
from trainer.config import TrainConfig
from trainer.data import RowReader
from trainer.order import RowOrder
from trainer.train import train


def annotate(
    shards: Path,
    out: Path,
    values: Callable[[dict], list],
    context: str,
    step: float = 0.0,
    name: str = "rl",
    top: Callable[[dict], list] | None = None,
    entropy: Callable[[dict], list] | None = None,
    temperature: float | None = None,
    unscored: Collection[int] = (),
    below: float | None = None,
    **provenance: object,
) -> Path:
    """Write `shards` again with a column NAME_logprobs that `values` gives for each row: scoring without an engine.

    top: for each row a pair (ids, log-probs) for each token, or None, for the columns of the most probable tokens.
    entropy: for each row the entropy for each token, or None; with a temperature a tuple with those and the log partition
    sum at that temperature behind it. unscored: rows, counted over all parts, of which nothing is known.
    below: the most probable tokens are kept where the entropy, that at the temperature if there is one, is at most this.
    """
    old = Manifest.read(shards)
    reference = {"context": context, "logprob_step": step, "model": "oracle", **provenance}
    parts = {part.name: pa.ipc.open_file(shards / part.name).read_all() for part in old.parts}
    tops = {part: [top(row) for row in table.to_pylist()] for part, table in parts.items()} if top else {}
    if top:
        reference["top_k"] = len(next(pair for rows in tops.values() for row in rows for pair in row if pair)[0])
    if entropy:
        reference |= {"entropy": True, "vocab_size": 1000}
    if temperature:
        reference["entropy_temperature"] = temperature
    if below is not None:
        reference["top_k_below_entropy"] = below
    plan = replace(old, references=old.references | {name: reference})
    shutil.copytree(shards / "_tokenizer", out / "_tokenizer")
    plan.write(out)
    for index, (part, table) in enumerate(parts.items()):
        columns = {column: table.column(column) for column in table.column_names}
        columns[f"{name}_logprobs"] = pa.array([values(row) for row in table.to_pylist()], pa.list_(pa.float32()))
        if entropy:
            found = [[v if temperature or v is None else (v,) for v in entropy(row)] for row in table.to_pylist()]
            for place, column in enumerate(entropy_columns(name, reference)):
                own = [[None if v is None else v[place] for v in row] for row in found]
                columns[column] = pa.array(own, pa.list_(pa.float32()))
        for place, column in enumerate((f"{name}_topk_ids", f"{name}_topk_logprobs") if top else ()):
            entries = [[None if pair is None else pair[place] for pair in row] for row in tops[part]]
            if below is not None:
                gates = columns[f"{name}_entropy" + (f"_t{temperature:g}" if temperature else "")].to_pylist()
                entries = [
                    [None if e is None or e > below else one for e, one in zip(*pair)] for pair in zip(gates, entries)
                ]
            columns[column] = pa.array(entries, plan.schema.field(column).type)
        first = index * old.rows_per_part
        bad = [number - first for number in unscored if 0 <= number - first < len(table)]
        for column in [column for column in columns if bad and column.startswith(f"{name}_")]:
            own = columns[column].to_pylist()
            own = [[None] * len(row) if number in bad else row for number, row in enumerate(own)]
            columns[column] = pa.array(own, plan.schema.field(column).type)
        whole = pa.table([columns[column] for column in plan.schema.names], schema=plan.schema)
        batches = whole.combine_chunks().to_batches(max_chunksize=plan.rows_per_batch)
        ids = columns["input_ids"].to_pylist() if bad else []
        side = [{"reference": name, "row": row, "reason": "by the test", "input_ids": ids[row]} for row in bad]
        write_quarantined_rows(open_store(out), part, side)
        write_part(out, part, plan.schema, plan.part_metadata(index), batches, {name: bad} if bad else {})
    return out


def top_by_model(model: Path, context: str, k: int, step: float = 0.0) -> Callable[[dict], list]:
    reference = load(model)

    @torch.no_grad()
    def top(row: dict) -> list:
        pairs: list = []
        for logprobs_V in row_distributions(reference, row, context):
            if logprobs_V is None:
                pairs.append(None)
                continue
            values, ids = logprobs_V.topk(k)
            values = values.clamp(max=0)
            pairs.append((ids.tolist(), (torch.round(values / step) * step if step else values).tolist()))
        return pairs

    return top


def entropies_by_model(
    model: Path, context: str, temperature: float | None, step: float = 0.0
) -> Callable[[dict], list]:
    """Entropy, and with a temperature that at it and the log partition sum, from the definitions in float64."""
    reference = load(model)

    @torch.no_grad()
    def values(row: dict) -> list:
        found: list = []
        for logprobs_V in row_distributions(reference, row, context):
            if logprobs_V is None:
                found.append(None)
                continue
            own = [-(logprobs_V.exp() * logprobs_V).sum().item()]
            if temperature:
                z = (logprobs_V / temperature).exp().sum().log()
                hot_V = logprobs_V / temperature - z
                own += [-(hot_V.exp() * hot_V).sum().item(), z.item()]
            own = [round(value / step) * step if step else value for value in own]
            found.append(tuple(own) if temperature else own[0])
        return found

    return values


def by_model(model: Path, context: str, step: float) -> Callable[[dict], list]:
    reference = load(model)

    @torch.no_grad()
    def values(row: dict) -> list:
        logprobs = [None if v is None else v.item() for v in row_logprobs(reference, row, context)]
        return [v if v is None or not step else round(v / step) * step for v in logprobs]

    return values


def run(out: Path, shards: Path, model: Path, **settings: object) -> list[dict]:
    defaults: dict = {
        "max_steps": 1, "global_batch_size": 8, "micro_batch_size": 3, "dtype": "float32", "checkpoint_every": 0,
    }  # fmt: skip
    train(TrainConfig(shards, str(model), out, **(defaults | settings)))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def rows_of_step(shards: Path, step: int, batch: int, seed: int) -> list[dict]:
    """The rows of a global batch, looked up by pyarrow at the places that the order names."""
    folder = ShardFolder(shards)
    reader = RowReader(folder, "packed", None, 10**6)
    places = RowOrder(reader.block_rows, seed).rows(step * batch, batch)
    everything = read_rows(shards)
    starts = np.cumsum(reader.block_rows) - reader.block_rows
    return [everything[starts[block] + row] for block, row in places.tolist()]
