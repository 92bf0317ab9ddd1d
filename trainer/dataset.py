"""The rows of annotated shards for other people's training loops::

    rows = RowDataset("shards", reference="rl", seed=0)
    loader = StatefulDataLoader(rows, batch_size=8, collate_fn=Collator(rows.context))   # of torchdata
    trainer = transformers.Trainer(model, args, train_dataset=rows, data_collator=Collator(rows.context),
        compute_loss_func=TrainerLoss("remit", epsilon=0.2))

args needs remove_unused_columns=False, and max_steps, because an IterableDataset has no length; with several processes
also accelerator_config={"dispatch_batches": False}, because batches are padded to different lengths.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from trainer.batch import MicroBatch, Row, collate
from trainer.data import RowReader, RowReaders, context_of_rows
from trainer.head import token_losses
from trainer.mixed_shards import MixedShards, require_epochs
from trainer.mixture import Mixture, given_mixture
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.objectives.objective import Tokens
from trainer.packed_rows import unpack_rows
from trainer.windows import OwnRows

READ_AHEAD_ROWS = 64
"""Taken at a time."""
IGNORED = -100


class RowDataset(IterableDataset):
    """Rows in training order, without end unless epochs or max_steps is given; state_dict and load_state_dict resume
    exactly.

    The state lives where the rows are read: torchdata's StatefulDataLoader collects it from its workers, torch's own
    DataLoader does so without workers only.

    Each item is a trainer.batch.Row. shards: a shard folder; or mix: a file that describes a mixture, as for remit train, with
    global_batch_size, of which its stages count steps. reference: name of the stored log-probs, or None for plain next-token
    prediction. Rows that a reference of their folder could not score predict nothing, whatever `reference` is.
    context: packed, document, or None, which chooses as remit train does: as the reference was scored; without one as all
    references of the folders were, packed where those differ or there are none. max_steps: the rows end after so many steps
    of global_batch_size rows; a mixture with max_epochs needs it. num_embeddings: token ids must be below it. rank and
    world_size: this process takes every world_size-th row; the workers of a DataLoader divide those among them in turn, so
    the order within a batch depends on num_workers (0 and 1 are exact). Each of these readers reads every block, since they
    cannot exchange rows as remit train does. seq_len: the most tokens that a row may have. ValueError as for remit train.
    """

    def __init__(
        self,
        shards: str | Path | Sequence[str] = (),
        reference: str | None = None,
        *,
        mix: str | Path | None = None,
        global_batch_size: int | None = None,
        seed: int = 0,
        epochs: float | None = None,
        max_steps: int | None = None,
        context: str | None = None,
        num_embeddings: int = 2**31 - 1,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        given = (str(shards),) if isinstance(shards, str | Path) else tuple(shards)
        mixture = given_mixture(given, None if mix is None else Path(mix))
        if len(mixture.stages) > 1 and global_batch_size is None:
            raise ValueError(f"{mix}: has stages, which begin after a number of steps; give global_batch_size too")
        if mixture.is_mixed and epochs is not None:
            raise ValueError(f"epochs is {epochs:g}, and a mixture has no passes of its own; leave it out")
        _require_end_in(mixture, epochs, max_steps, global_batch_size)
        mixed = MixedShards.open(mixture)
        mixed.require_alike(reference)
        self.context = context_of_rows(mixed.folders, reference, context or "auto")
        readers, files = [], 0
        for folder in mixed.folders:
            left_out = tuple(folder.manifest.references)
            readers.append(
                RowReader(folder, self.context, reference, num_embeddings, left_out=left_out, first_source=files)
            )
            files += len(folder.manifest.corpus)
        self.seq_len = max(folder.manifest.seq_len for folder in mixed.folders)
        self._readers_of_sources = RowReaders(readers)
        self._order = mixed.order(seed, global_batch_size or 1)
        self._end = None if epochs is None else round(epochs * self._order.num_rows)
        if max_steps is not None and global_batch_size is not None:
            require_epochs(mixed, self._order, max_steps, global_batch_size)
            self._end = max_steps * global_batch_size
        self._rank, self._world_size = rank, world_size
        self._next: int | None = None
        self._loaded: dict[str, Any] = {}

    def __iter__(self) -> Iterator[Row]:
        worker = get_worker_info()
        index, stride = (0, 1) if worker is None else (worker.id, worker.num_workers)
        stride *= self._world_size
        here = self._readers(stride)
        if self._loaded and self._loaded != here:
            raise ValueError(f"the state is of {self._loaded}, this is {here}; rows would be lost and train twice")
        if self._next is None:
            self._next = index * self._world_size + self._rank
        first, span = self._next, READ_AHEAD_ROWS * stride
        own = OwnRows(
            self._order, self._readers_of_sources.read_packed, first, self._end, reader=first % stride, readers=stride
        )
        with closing(own):
            while self._end is None or self._next < self._end:
                count = span if self._end is None else min(span, self._end - self._next)
                for row in unpack_rows(own.take(self._next, count)[1]):
                    self._next += stride  # before the yield: the state after it is that of the row that was taken
                    yield row
        self._next = None

    def state_dict(self) -> dict[str, Any]:
        """Position of the next row, and who reads: rank, and ranks times workers, which must be the same again."""
        worker = get_worker_info()
        return {"next": self._next} | self._readers(self._world_size * (worker.num_workers if worker else 1))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
        self._loaded = {key: value for key, value in state.items() if key != "next"}

    def _readers(self, stride: int) -> dict[str, Any]:
        return {"seed": self._order.seed, "rank": self._rank, "readers": stride}


def _require_end_in(mixture: Mixture, epochs: float | None, max_steps: int | None, batch: int | None) -> None:
    """ValueError unless what ends the rows goes together, and max_epochs of the sources can be kept."""
    if max_steps is not None and epochs is not None:
        raise ValueError(f"epochs is {epochs:g} and max_steps {max_steps}, expected one of them; leave the other out")
    if max_steps is not None and (batch is None or max_steps < 1):
        raise ValueError(f"max_steps is {max_steps}, expected 1 or more, of global_batch_size rows each; give both")
    for source in mixture.sources:
        if source.max_epochs is None:
            continue
        if epochs is None and max_steps is None:
            raise ValueError(
                f"{source.name}: max_epochs is {source.max_epochs:g}, and rows without an end would not keep it; take it out, or "
                "give RowDataset max_steps and global_batch_size"
            )
        if epochs is not None and epochs > source.max_epochs:
            raise ValueError(
                f"{source.name}: max_epochs is {source.max_epochs:g}, epochs {epochs:g}; give fewer epochs"
            )


class Collator:
    """Pads rows to a batch for a transformers model: input_ids [B, T], labels [B, T], and position_ids [B, T] in
    document context.

    labels are int64 and hold the token id in the low and the stored log-prob, float32, in the high half, so that they
    pass through a Trainer as one tensor; -100 where a token does not count. TrainerLoss takes them apart.
    """

    def __init__(self, context: str) -> None:
        self.context = context

    def __call__(self, rows: list[Row]) -> dict[str, Tensor]:
        batch = collate(rows, self.context, "cpu")
        labels = packed_labels(batch)
        positions = {} if batch.position_ids_BT is None else {"position_ids": batch.position_ids_BT}
        return {"input_ids": batch.input_ids_BT, "labels": labels, **positions}


def packed_labels(batch: MicroBatch) -> Tensor:
    """Labels int64 [B, T] of the tokens of a batch on the CPU, as Collator has them: each at the place of its own token."""
    missing = torch.full(batch.input_ids_BT.shape, torch.nan)  # which TrainerLoss refuses where it needs them
    logprobs = batch.columns.get("logprobs", missing)
    high = logprobs.contiguous().view(torch.int32).long() << 32
    return torch.where(batch.predicted_BT, high | batch.input_ids_BT, IGNORED)


def split_labels(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids int64, stored log-probs float32, and where they count, bool; all as `labels`, int64, which Collator made."""
    predicted = labels != IGNORED
    logprobs = (labels >> 32).int().view(torch.float32)
    ids = labels & 0xFFFFFFFF
    return ids.where(predicted, 0), logprobs.where(predicted, 0.0), predicted


class TrainerLoss:
    """compute_loss_func of transformers' Trainer for an objective: Eq. 6 over the batch that Collator made.

    settings: of the objective by keyword, as trainer.objectives.settings names them. ValueError for what cannot be
    computed from labels and logits of a batch: kd, centring by document, the global scope of rho1.
    """

    def __init__(self, objective: str = "remit", **settings: Any) -> None:
        if objective == "rho1":
            settings = {"scope": "row"} | settings
        chosen = ObjectiveSettings(objective=objective, **settings)  # type: ignore[arg-type]
        self._objective = make_objective(chosen)
        unknown = set(self._objective.columns) - {"logprobs"}
        if (
            self._objective.weigh is None
            or unknown
            or self._objective.scope == "global"
            or chosen.centring == "document"
        ):
            raise ValueError(
                f"objective {objective!r} with {settings}: needs more than the labels of one batch; use remit train"
            )

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
        """outputs.logits [B, T, V]; labels [B, T]; num_items_in_batch: predicted tokens of the whole optimizer step."""
        ids_BT, logprobs_BT, predicted_BT = split_labels(labels)
        total = outputs.logits[..., :0].float().sum()  # 0 that depends on the model, for rows that predict nothing
        rows = torch.arange(len(labels), device=labels.device)
        for scope in [rows] if self._objective.scope == "micro" else rows[:, None]:
            inner_N, position_N = predicted_BT[scope].nonzero().unbind(1)
            row_N = scope[inner_N]
            if len(row_N):
                logits_NV = outputs.logits[row_N, position_N - 1].float()
                losses_N = token_losses(logits_NV, ids_BT[row_N, position_N])[0]
                columns = dict.fromkeys(self._objective.columns, logprobs_BT[row_N, position_N])
                if any(bool(values.isnan().any()) for values in columns.values()):
                    raise ValueError("the rows were read without a reference; give RowDataset the name of one")
                tokens = Tokens(losses_N.detach(), inner_N, torch.zeros_like(inner_N), columns)
                assert self._objective.weigh is not None
                total = total + (self._objective.weigh(tokens).weights_N * losses_N).sum()
        if num_items_in_batch is None:
            return total / predicted_BT.sum().clamp(min=1)
        return total / torch.as_tensor(num_items_in_batch).sum()  # one entry per GPU under DataParallel
