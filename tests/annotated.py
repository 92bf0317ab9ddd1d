"""Annotated shards without an engine, runs of the trainer, and the rows of a step: what the training tests share."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from oracles import load, read_rows, row_logprobs

from shards import ShardFolder, row_schema, write_part
from shards.manifest import Manifest
from trainer.config import TrainConfig
from trainer.data import RowReader
from trainer.order import RowOrder
from trainer.train import train


def annotate(shards: Path, out: Path, values: Callable[[dict], list], context: str, step: float = 0.0) -> Path:
    """Write `shards` again with a column rl_logprobs that `values` gives for each row: scoring without an engine."""
    old = Manifest.read(shards)
    reference = {"context": context, "logprob_step": step, "model": "oracle"}
    plan = Manifest(**{f: getattr(old, f) for f in old.__dataclass_fields__} | {"references": {"rl": reference}})
    shutil.copytree(shards / "_tokenizer", out / "_tokenizer")
    plan.write(out)
    schema = row_schema(("rl",))
    for index, part in enumerate(plan.parts):
        batches = []
        for batch in pa.ipc.open_file(shards / part.name).read_all().to_batches():
            column = pa.array([values(row) for row in batch.to_pylist()], pa.list_(pa.float32()))
            batches.append(pa.record_batch([*batch.columns, column], schema=schema))
        write_part(out, part.name, schema, plan.part_metadata(index), batches)
    return out


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
