"""Held-out loss of a run, of its float32 weights and of what is exported, as lines of OUT/evaluation.jsonl.

A line: step, loss and tokens; where a model of that step is exported, exported_loss and export_dtype too: the same rows
through the same forward, with the weights rounded as the export has them. With --average the last line has average_loss,
that of the averaged weights before they are rounded.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from shards.folder import ShardFolder
from trainer.average import Average
from trainer.batch import collate
from trainer.batches import GlobalBatch
from trainer.checks import check_fits
from trainer.config import TrainConfig
from trainer.data import RowReader, RowReaders
from trainer.exchange import Alone, Exchange, Processes, make_parcels, open_parcels
from trainer.export import rounded, rounds
from trainer.loss_model import LossModel
from trainer.model import Base
from trainer.objectives.ntp import NTP
from trainer.packed_rows import unpack_rows
from trainer.run_folder import EVALUATION, keep_lines
from trainer.session import Session
from trainer.statistics import StepStatistics
from trainer.tokenizer import check_tokenizer

Measure = Callable[[], dict[str, Any]]
"""The mean loss over --eval-shards in nats per token, the tokens, and what they are. All ranks take part."""


def open_measure(
    config: TrainConfig, session: Session, base: Base, model: torch.nn.Module, context: str, trained: ShardFolder
) -> Measure | None:
    """What measures the held-out loss of `model`; None without --eval-shards.

    trained: the rows of the run. A note says where the held-out rows begin or end in another way.
    """
    if config.eval_shards is None:
        return None
    shards = ShardFolder(config.eval_shards)
    check_fits(base, Path(config.model), shards)
    check_tokenizer(Path(config.model), shards)
    for what in ("bos_token", "eos_token"):
        ours, theirs = (folder.manifest.tokenizer.get(f"{what}_id") for folder in (shards, trained))
        if ours != theirs:
            session.note(
                f"{config.eval_shards}: its {what}_id is {ours}, that of the rows that train is {theirs}: the held-out loss is "
                "of documents that begin or end otherwise"
            )
    world = session.world
    reader = RowReader(shards, context, None, base.num_embeddings)
    exchange: Exchange = Processes(world) if world.size > 1 else Alone()
    pad_to = shards.manifest.seq_len if config.deterministic else None

    def measure() -> dict[str, Any]:
        statistics = StepStatistics(world.device)
        model.eval()
        with torch.no_grad():
            for batch in in_corpus_order(reader, exchange):
                for rows in batch.micro_batches(config.micro_batch_size, world.size):
                    model(collate(rows, context, world.device, pad_to), NTP, 1, 1, statistics)
        model.train()
        world.sum(statistics.table)
        sums = statistics.sums
        # losses over other tokens do not compare
        return {
            "loss": sums["loss"] / sums["tokens"],
            "tokens": sums["tokens"],
            "manifest_sha256": shards.manifest.checksum,
        }

    return measure


def in_corpus_order(reader: RowReader, exchange: Exchange) -> Iterator[GlobalBatch]:
    """The rows of a folder, as many blocks at a time as there are processes: each reads one, and all get every n-th row."""
    readers, block_rows = RowReaders([reader]), reader.block_rows.tolist()
    for first in range(0, len(block_rows), exchange.size):
        counts = block_rows[first : first + exchange.size]
        own, start = first + exchange.rank, sum(counts[: exchange.rank])
        rows, error = list[bytes](), None
        try:
            rows = readers.read_packed(own) if own < len(block_rows) else []
        except Exception as raised:
            error = raised
        parcels = make_parcels(range(start, start + len(rows)), rows, exchange.size)
        mine = open_parcels(exchange.swap(parcels, error))
        yield GlobalBatch(unpack_rows(mine[place] for place in sorted(mine)), sum(counts), 0)


class Evaluation:
    """Appends to evaluation.jsonl, if there are --eval-shards. loss_model: has the weights; dtypes: to which an export
    rounds each of them; average: of the weights, measured after the last step."""

    def __init__(
        self,
        config: TrainConfig,
        session: Session,
        measure: Measure | None,
        loss_model: LossModel,
        dtypes: Mapping[str, torch.dtype],
        average: Average | None = None,
    ) -> None:
        self.average = average
        self.session, self.measure, self.loss_model, self.dtypes = session, measure, loss_model, dtypes
        self.path, self.export_dtype = config.out / EVALUATION, config.export_dtype

    def write(self, step: int, of_export: bool) -> None:
        """of_export: whether the model of this step is exported. All ranks take part."""
        if self.measure is None:
            return
        self.session.phase("evaluate")
        line = {"step": step, **self.measure()}
        if of_export:
            line |= {"exported_loss": line["loss"], "export_dtype": self.export_dtype}
        if of_export and rounds(self.dtypes):
            with rounded(self.loss_model, self.dtypes):
                line["exported_loss"] = self.measure()["loss"]
        if self.average and step == self.average.num_steps:
            with self.average.in_place():
                line["average_loss"] = self.measure()["loss"]
        self.session.phase("train")
        if self.session.lease:
            self.session.check_lease()
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def require_of_export(self, step: int) -> None:
        """Evaluate the last step again where it was evaluated for an export in another dtype, or by an older version."""
        if self.measure is None:
            return
        self.session.world.meet()  # the first process may still publish a checkpoint
        last = read_lines(self.path)[-1] if self.session.world.first else {}
        is_there = last.get("export_dtype") == self.export_dtype and last.get("step") == step
        if not self.session.world.from_first(is_there):
            if self.session.lease:
                self.session.check_lease()
                keep_lines(self.path, step - 1)
            self.write(step, of_export=True)

    def first_and_last(self) -> tuple[float | None, dict[str, Any]]:
        """Loss of the base, and the newest line; on the first rank."""
        if self.measure is None:
            return None, {}
        lines = read_lines(self.path)
        return lines[0]["loss"] if lines[0]["step"] == 0 else None, lines[-1]


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The lines of evaluation.jsonl; one without fields where there are none."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return [json.loads(line) for line in text.splitlines()] or [{}]
