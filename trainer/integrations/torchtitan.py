"""torchtitan trains on annotated shards: a data loader and a loss for its configuration (written for torchtitan 0.3).

`remit export --to torchtitan` writes a module that torchtitan's --module takes; it calls `on_rows`. Batches are B rows of L
positions: input [B, L] and labels [B, L], of which position t predicts token t + 1 of its row. A label holds the token id in
its low and the stored log-prob of that token, float32, in its high half, so that it passes through pipeline and context
parallelism as any label does; -100 where nothing is predicted.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from math import gcd
from typing import Any, ClassVar

import spmd_types
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed._functional_collectives import all_gather_tensor, wait_tensor
from torchtitan.components.dataloader import ParallelAwareDataloader
from torchtitan.components.loss import BaseLoss, ChunkedLossWrapper, compute_logprobs
from torchtitan.config import CompileConfig
from torchtitan.distributed.spmd_types import current_spmd_mesh, spmd_mesh_size
from torchtitan.distributed.utils import get_spmd_backend
from torchtitan.models import _supported_models
from torchtitan.models.common.attention import FlexAttention, VarlenAttention
from torchtitan.trainer import Trainer

from trainer.batch import Row, collate
from trainer.dataset import IGNORED, RowDataset, packed_labels, split_labels
from trainer.integrations.weights import row_objective, row_weights

BACKENDS = ("spmd_types", "partial_dtensor")
NUM_CHUNKS = 8  # of a row, whose logits are in memory one at a time


class FixedLength:
    """Collates rows to torchtitan's batches of seq_len positions: ({"input", "positions"}, labels), all int64 [B, seq_len].

    context: "packed", where positions count through the row, or "document", where they begin again with each document, from
    which torchtitan makes its attention masks.
    """

    def __init__(self, context: str, seq_len: int) -> None:
        self.context, self.seq_len = context, seq_len

    def __call__(self, rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
        batch = collate(rows, self.context, "cpu", self.seq_len)
        positions = batch.position_ids_BT
        if positions is None:
            positions = torch.arange(self.seq_len).repeat(len(rows), 1)
        labels = F.pad(packed_labels(batch)[:, 1:], (0, 1), value=IGNORED)
        return {"input": batch.input_ids_BT, "positions": positions}, labels


class RowDataLoader(ParallelAwareDataloader):
    """The rows of remit train, in its order: step n of any number of ranks has the rows of step n there.

    ValueError where rows are longer than --training.seq_len, or the shards cannot be trained on.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ParallelAwareDataloader.Config):
        shards: list[str] = field(default_factory=list)
        """Shard folder; or several, each with its share of the tokens, A=0.7,B=0.3."""
        mix: str | None = None
        """In place of shards: file that describes a mixture."""
        reference: str | None = None
        """Name of the stored log-probs; None: plain next-token prediction."""
        context: str | None = None
        """packed, document, or None, which chooses as remit train does."""
        seed: int = 0
        """Decides the order of the rows."""
        epochs: float | None = None
        """Passes over the rows; None: without end."""
        steps_batch_size: int | None = None
        """Rows per step, for a mixture with stages."""
        num_embeddings: int = 2**31 - 1
        """Token ids must be below it."""

    batch_length: ClassVar[int] = 0
    """Positions of the batches that train."""

    def __init__(
        self,
        config: Config,
        *,
        dp_world_size: int,
        dp_rank: int,
        seq_len: int,
        local_batch_size: int,
        snapshot_every_n_steps: int | None = 1,
        **unused: Any,
    ) -> None:
        rows = RowDataset(
            config.shards,
            config.reference,
            mix=config.mix,
            global_batch_size=config.steps_batch_size,
            seed=config.seed,
            epochs=config.epochs,
            context=config.context,
            num_embeddings=config.num_embeddings,
            rank=dp_rank,
            world_size=dp_world_size,
        )
        if rows.seq_len > seq_len:
            raise ValueError(f"--training.seq_len is {seq_len}, rows have up to {rows.seq_len} tokens; give it that")
        RowDataLoader.batch_length = seq_len
        super().__init__(
            rows,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            batch_size=local_batch_size,
            collate_fn=FixedLength(rows.context, seq_len),
            drop_last=True,
            num_workers=config.num_workers,
            persistent_workers=config.persistent_workers,
            pin_memory=config.pin_memory,
            prefetch_factor=config.prefetch_factor,
            snapshot_every_n_steps=snapshot_every_n_steps,
        )


def weighted_cross_entropy(pred_BLV: Tensor, labels_BL: Tensor, weights_BL: Tensor) -> Tensor:
    """Sum of weight times -log p, of labels that are token ids or -100."""
    logprobs: Any = compute_logprobs(pred_BLV, labels_BL)
    return -(logprobs * weights_BL).sum()


class WeightedCrossEntropy(BaseLoss):
    """Cross entropy with a weight for each token, of the piece of a row that ObjectiveLoss hands it."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):
        pass

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        self.fn = weighted_cross_entropy
        self._maybe_compile(compile_config)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **inputs: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        loss = self.fn(pred, labels, inputs["weights"])
        return loss if global_valid_tokens is None else loss / global_valid_tokens, {}


class ObjectiveLoss(ChunkedLossWrapper):
    """Loss of an objective of remit train, Eq. 6: weighted losses over the predicted tokens of the whole step.

    The weights of a row depend on all of its losses, so the head runs over it twice, a piece at a time: for the losses, without
    a gradient, and for the weighted loss. Rows are whole under data, tensor and pipeline parallelism; under context
    parallelism losses are gathered first (spmd_types alone). In validation it is next-token prediction. ValueError for
    --parallelism.spmd_backend full_dtensor, and for objectives that need more than a row's log-probs.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):
        loss_fn: BaseLoss.Config = field(default_factory=WeightedCrossEntropy.Config)
        objective: str = "remit"
        """remit, ntp, or rho1 within each row."""
        epsilon: float = 0.2
        """remit: weights are clipped to 1 - epsilon .. 1 + epsilon."""
        centring: str = "row"
        """remit: row or none."""
        weight_map: str = "sigmoid"
        """remit: sigmoid, exp or linear."""
        keep_ratio: float = 0.8
        """rho1: share of the tokens that train."""

    def __init__(self, config: Config, *, compile_config: CompileConfig | None = None) -> None:
        if get_spmd_backend() not in BACKENDS:
            raise ValueError(f"--parallelism.spmd_backend is {get_spmd_backend()}, expected {' or '.join(BACKENDS)}")
        super().__init__(config, compile_config=compile_config)
        names = ("epsilon", "centring", "weight_map", "keep_ratio")
        self._settings = row_objective(config.objective, **{name: getattr(config, name) for name in names})

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """pred: hidden states [B, L, D]; labels: as FixedLength makes them, or token ids in validation."""
        if spmd_types.is_type_checking():
            raise ValueError("--debug.spmd-typechecking is on, and remit's loss has no types; leave it out")
        if pred.requires_grad and get_spmd_backend() != "spmd_types" and labels.shape[1] != RowDataLoader.batch_length:
            raise ValueError(
                f"a process has {labels.shape[1]} of {RowDataLoader.batch_length} positions of a row, and remit's loss needs all: "
                "context parallelism takes --parallelism.spmd_backend spmd_types"
            )
        ids_BL, logprobs_BL, predicted_BL = split_labels(labels)
        targets_BL = ids_BL.masked_fill(~predicted_BL, IGNORED)
        weights_BL = predicted_BL.float()
        if pred.requires_grad and self._settings.objective != "ntp":
            losses_BL = self._losses(pred, targets_BL)
            weights_BL = self._weights(losses_BL, logprobs_BL, predicted_BL)
        return super().__call__(pred, targets_BL, global_valid_tokens, weights=weights_BL)

    @torch.no_grad()
    def _losses(self, hidden_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        """-log p of each target, float32 [B, L], 0 where there is none; one chunk's logits are in memory at a time."""
        from torch.distributed._composable.fsdp import FSDPModule

        lm_head: Any = self.lm_head
        assert lm_head is not None
        if isinstance(lm_head, FSDPModule):  # gathered once, and given back by the second pass
            lm_head.set_reshard_after_forward(False)
            lm_head.unshard()
        size = -(-hidden_BLD.shape[1] // self.num_chunks)
        pieces: list[Any] = [
            compute_logprobs(lm_head(hidden), targets)
            for hidden, targets in zip(hidden_BLD.split(size, 1), targets_BL.split(size, 1))
        ]
        return -torch.cat(pieces, dim=1)

    @torch.no_grad()
    def _weights(self, losses_BL: Tensor, logprobs_BL: Tensor, predicted_BL: Tensor) -> Tensor:
        if spmd_mesh_size("cp") == 1:
            return row_weights(losses_BL, logprobs_BL, predicted_BL, self._settings)
        mesh: Any = current_spmd_mesh()
        own = torch.stack([losses_BL, logprobs_BL, predicted_BL.float()])
        whole = wait_tensor(all_gather_tensor(own, 2, mesh.get_group("cp")))
        weights = row_weights(whole[0], whole[1], whole[2] > 0, self._settings)
        rank, length = mesh.get_local_rank("cp"), losses_BL.shape[1]
        return weights[:, rank * length : (rank + 1) * length]


def find_config(name: str) -> Callable[[], Trainer.Config]:
    """A config function of torchtitan by its name, llama3_8b, or of any module, my_models.configs.tiny. AttributeError for none."""
    module, _, function = name.rpartition(".")
    modules = [module] if module else [f"torchtitan.models.{model}.config_registry" for model in _supported_models]
    for where in sorted(modules):
        try:
            found = getattr(import_module(where), function, None)
        except ImportError:  # of a model whose own dependencies are not installed
            if module:
                raise
            continue
        if callable(found):
            made: Callable[[], Trainer.Config] = found
            return made
    raise AttributeError(f"{name} is no config of torchtitan's models; give one as module.function")


def on_rows(
    config: Trainer.Config,
    shards: list[str],
    reference: str | None,
    *,
    mix: str | None = None,
    steps_batch_size: int | None = None,
    seed: int = 0,
    context: str | None = None,
    **objective: Any,
) -> Trainer.Config:
    """`config` with annotated shards as its data and an objective of remit as its loss.

    context: packed, document, or None, which chooses as remit train does. objective: as ObjectiveLoss.Config has it. What
    torchtitan's command line sets wins. ValueError where the model's attention cannot keep the documents of a row apart and
    the context is document.
    """
    if reference is None and objective.get("objective", "remit") != "ntp":
        raise ValueError("reference is None, and only the objective ntp does without log-probs; name one")
    rows = RowDataset(shards, reference, mix=mix, global_batch_size=steps_batch_size, context=context)
    assert config.model_spec is not None
    model: Any = config.model_spec.model
    if rows.context == "document" and not any(
        any(True for _ in model.traverse(kind)) for kind in (FlexAttention.Config, VarlenAttention.Config)
    ):
        raise ValueError(
            f"{config.model_spec.name}: its attention has no masks, and the rows are read in document context; use flex or "
            "varlen attention"
        )
    config.dataloader = RowDataLoader.Config(
        shards=shards,
        mix=mix,
        reference=reference,
        context=rows.context,
        seed=seed,
        steps_batch_size=steps_batch_size,
        num_embeddings=model.vocab_size,
    )
    config.training.seq_len = rows.seq_len
    chunks = getattr(config.loss, "num_chunks", NUM_CHUNKS)
    config.loss = ObjectiveLoss.Config(num_chunks=gcd(chunks, rows.seq_len), **objective)
    return config
