"""Training steps made of the trainer's own parts, so that variants can be timed in turn in one process."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from shards import Manifest, ShardFolder, write_part
from shards.entropy import entropy_columns
from trainer.batch import MicroBatch, Row, collate
from trainer.batches import GlobalBatch, global_batches
from trainer.config import TrainConfig
from trainer.data import RowReader, RowReaders
from trainer.distributed import World, whole
from trainer.experts import Balancing, router_loss
from trainer.first_pass import first_pass
from trainer.float8 import use_float8
from trainer.head import token_losses
from trainer.loss_model import LossModel
from trainer.mix import MixedOrder
from trainer.model import Base, load_base
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.setup import make_optimizer
from trainer.statistics import StepStatistics


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def annotate(
    shards: Path,
    out: Path,
    step: float = 1 / 64,
    top_k: int = 0,
    context: str = "packed",
    temperature: float | None = None,
) -> ShardFolder:
    """`shards` with columns of random log-probs, as a reference of that vocabulary would give them in that context; with a
    temperature also of random entropies."""
    rng = np.random.default_rng(1)
    manifest = Manifest.read(shards)
    reference = {"context": context, "logprob_step": step, "model": "random", "engine": "none"}
    reference |= {"top_k": top_k} if top_k else {}
    vocabulary = manifest.tokenizer["vocab_size"]
    reference |= {"entropy": True, "entropy_temperature": temperature, "vocab_size": vocabulary} if temperature else {}
    manifest = replace(manifest, references={"rl": reference})
    manifest.write(out)
    (out / "_tokenizer").mkdir()
    for file in (shards / "_tokenizer").iterdir():
        (out / "_tokenizer" / file.name).write_bytes(file.read_bytes())
    for index, plan in enumerate(manifest.parts):
        batches = []
        for batch in pa.ipc.open_file(shards / plan.name).read_all().to_batches():
            values = []
            for row in batch.select(["input_ids", "doc_lengths"]).to_pylist():
                length = len(row["input_ids"])
                logprobs = (-np.round(rng.gamma(2.0, 5.0, length) / step) * step).tolist()
                docs = row["doc_lengths"] if context == "document" else [length]
                for start in np.cumsum([0, *docs[:-1]]):
                    logprobs[start] = None  # nothing precedes it
                values.append(logprobs)
            top = []
            if top_k:
                rows = batch.column("input_ids").to_pylist()
                values, *top = random_top(rng, rows, vocabulary, top_k, step)
            for least, largest in entropy_columns("rl", reference).values():
                own = [np.round(rng.uniform(least, largest, len(row)) / step) * step for row in values]
                own = [[None if v is None else x for v, x in zip(row, xs.tolist())] for row, xs in zip(values, own)]
                top.append(pa.array(own, pa.list_(pa.float32())))
            columns = [*batch.columns, pa.array(values, pa.list_(pa.float32())), *top]
            batches.append(pa.record_batch(columns, schema=manifest.schema))
        write_part(out, plan.name, manifest.schema, manifest.part_metadata(index), batches)
    return ShardFolder(out)


def random_top(rng: np.random.Generator, rows: list, vocabulary: int, k: int, step: float) -> tuple[list, Any, Any]:
    """Of each token of `rows` but their first ones: its log-prob, and ids and log-probs of k tokens, itself the best."""
    values, ids, logprobs = [], [], []
    for row in rows:
        places = (np.array(row)[:, None] + np.arange(k) * (vocabulary // k)) % vocabulary
        weights = np.sort(rng.gamma(0.3, 1.0, (len(row), k)), axis=1)[:, ::-1] + 1e-6
        stored = np.minimum(0, np.round(np.log(0.95 * weights / weights.sum(1, keepdims=True)) / step) * step)
        values.append([None, *stored[1:, 0].tolist()])
        ids.append([None, *places[1:].tolist()])
        logprobs.append([None, *stored[1:].tolist()])
    lists = pa.array(ids, pa.list_(pa.list_(pa.int32(), k))), pa.array(logprobs, pa.list_(pa.list_(pa.float32(), k)))
    return values, *lists


class Steps:
    """A trainer that does one step at a time. online: a reference model whose forward gives the log-probs instead of
    the shards; float8: "", "on" or "emulated"; rows: of the last step."""

    def __init__(
        self,
        shards: ShardFolder,
        model: Path,
        objective: str,
        batch_size: int,
        micro_batch_size: int,
        num_steps: int,
        device: torch.device,
        dtype: str = "float32",
        online: Base | None = None,
        compile_layers: str = "auto",
        router_aux_loss: float | None = None,
        float8: str = "",
        **settings: Any,
    ) -> None:
        self.device, self.micro_batch_size, self.online = device, micro_batch_size, online
        chosen = ObjectiveSettings(objective=objective, **settings)  # type: ignore[arg-type]
        self.objective = make_objective(chosen, shards.manifest.references.get("rl"))
        stored = self.objective.columns and online is None
        self.base = load_base(model, dtype, device)
        self.router_aux_loss = router_aux_loss or 0.0
        self.balance = None if router_aux_loss is None else router_loss(self.base.model)
        if float8:
            use_float8(self.base, emulated=float8 == "emulated")
        self.base.prepare(False, compile_layers)
        self.model = LossModel(self.base)
        self.optimizer = make_optimizer(self.model, TrainConfig(("shards",), "", Path("run"), learning_rate=1e-5))
        reference = "rl" if stored else None
        reader = RowReader(shards, "packed", reference, self.base.num_embeddings, self.objective.columns)
        order = MixedOrder.of_one(reader.block_rows, seed=0)
        read = RowReaders([reader]).read_packed
        self.batches: Iterator[GlobalBatch] = global_batches(read, order, batch_size, 0, num_steps)
        self.waited = self.seconds = self.loss = 0.0
        self.tokens, self.rows = 0, list[Row]()

    def step(self) -> float:
        """Seconds of one optimizer step, waiting for its rows included."""
        synchronize(self.device)
        began = perf_counter()
        batch = next(self.batches)
        statistics = StepStatistics(self.device, figures=self.objective.figures, per=self.objective.per)
        predicted = sum(int(row.predicted.sum()) for row in batch.rows)
        micro_batches = batch.micro_batches(self.micro_batch_size, 1)
        padded = partial(collate, context="packed", device=self.device)
        tokens = sum(len(row.input_ids) for row in batch.rows)
        balancing = self.balance and Balancing(self.balance, self.router_aux_loss, tokens)
        micro_batches, minimised = first_pass(self.model, self.objective, micro_batches, padded, World(self.device))
        for rows in micro_batches:
            micro_batch = collate(rows, "packed", self.device)
            if self.online is not None:
                micro_batch = replace(micro_batch, columns={"logprobs": reference_logprobs(self.online, micro_batch)})
            self.model(micro_batch, minimised, predicted, 1, statistics, balancing).backward()
        norm = whole(torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)).item()
        sums = statistics.sums
        assert np.isfinite([norm, *sums.values()]).all()
        self.loss = sums["loss"] / predicted
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize(self.device)
        seconds = perf_counter() - began
        self.waited, self.seconds = self.waited + batch.data_wait_seconds, self.seconds + seconds
        self.tokens, self.rows = tokens, batch.rows
        return seconds


@torch.no_grad()
def reference_logprobs(reference: Base, batch: MicroBatch) -> Any:
    """Log-probs of the tokens of a micro-batch, float32 [B, T]: what the product never computes while it trains."""
    hidden_BTH = reference.hidden_states(batch.input_ids_BT)
    weight_VH = reference.head.weight.to(hidden_BTH.dtype)
    logprobs_BT = torch.zeros(batch.input_ids_BT.shape, dtype=torch.float32, device=hidden_BTH.device)
    for row, (hidden_TH, ids_T) in enumerate(zip(hidden_BTH, batch.input_ids_BT)):
        logits_TV = torch.nn.functional.linear(hidden_TH[:-1], weight_VH).float()
        logprobs_BT[row, 1:] = -token_losses(logits_TV, ids_T[1:])[0]
    return logprobs_BT
