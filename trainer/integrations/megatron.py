"""Megatron trains on what `remit export --to megatron` wrote: a dataset and a loss (for Megatron Core 0.16)::

    rows = ScoredRows("exported", reference="rl")          # of train_valid_test_datasets_provider
    losses = model(tokens, position_ids, attention_mask, labels=labels)      # [B, S], of GPTModel
    loss, tokens = weighted_loss(losses, batch)             # of the loss function of forward_step

A sequence of the .bin is a row. GPTDataset would cut the rows anew, into windows in which tokens have another context than the
one that the reference saw; here a sample is a row, padded to seq_len.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset
from torch import Tensor
from torch.utils.data import Dataset

from trainer.integrations.folder import DOCUMENTS, IDS, MASK, Exported
from trainer.integrations.weights import row_objective, row_weights


class ScoredRows(Dataset):
    """Rows of an export in corpus order, as the dicts that GPTDataset gives: tokens, labels, position_ids int64 [S], loss_mask
    float32 [S]; and logprobs, float32 [S]. Of labels, loss_mask and logprobs position t belongs to token t + 1.

    reference: needed where the export has several. In document context position_ids begin again with each document, and
    attention_mask, bool [1, S, S], is True where a position must not look. ValueError as of Exported.open.
    """

    def __init__(self, folder: Path | str, reference: str | None = None) -> None:
        self.exported = Exported.open(folder, "megatron")
        self.reference = self.exported.reference(reference)
        columns = (IDS, MASK, DOCUMENTS, f"{self.reference}_logprobs")
        self._ids, self._mask, self._documents, self._logprobs = (
            IndexedDataset(self.exported.files(column)[0].removesuffix(".bin")) for column in columns
        )

    def __len__(self) -> int:
        return self.exported.rows

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        length = self.exported.seq_len
        ids, mask, logprobs = (dataset[index] for dataset in (self._ids, self._mask, self._logprobs))
        present = np.where(mask > 0, logprobs, 0.0).astype(np.float32)
        sample = {
            "tokens": _padded(ids, length, self.exported.eos_token_id),
            "labels": _padded(ids[1:], length, self.exported.eos_token_id),
            "loss_mask": _padded(mask[1:], length, 0).float(),
            "logprobs": _padded(present[1:], length, 0),
            "position_ids": torch.arange(length),
        }
        if self.exported.context == "document":
            pieces = [*self._documents[index].tolist(), length - len(ids)]
            document = torch.repeat_interleave(torch.arange(len(pieces)), torch.tensor(pieces))
            starts = torch.tensor(pieces).cumsum(0) - torch.tensor(pieces)
            sample["position_ids"] = torch.arange(length) - starts[document]
            causal = torch.ones(length, length, dtype=torch.bool).triu(1)
            sample["attention_mask"] = (causal | (document[:, None] != document[None, :]))[None]
        return sample


def _padded(values: np.ndarray, length: int, padding: float) -> Tensor:
    """int64 of integers, float32 of others, [length]."""
    kind = torch.float32 if values.dtype.kind == "f" else torch.int64
    padded = torch.full((length,), padding, dtype=kind)
    padded[: len(values)] = torch.from_numpy(values.copy()).to(kind)
    return padded


def weighted_loss(
    losses_BS: Tensor, batch: dict[str, Tensor], objective: str = "remit", **settings: Any
) -> tuple[Tensor, Tensor]:
    """Sum of the weighted losses of a micro-batch, with gradient, and its number of predicted tokens, as Megatron's loss
    functions return them: their quotient over a step is Eq. 6 of arXiv 2602.03075.

    losses_BS: -log p for each label, as GPTModel returns them, whole rows: not under context parallelism. batch: loss_mask
    and logprobs as ScoredRows has them. objective, settings: as remit train has them; ValueError for others than row_objective
    takes.
    """
    predicted_BS = batch["loss_mask"] > 0
    weights_BS = row_weights(losses_BS, batch["logprobs"], predicted_BS, row_objective(objective, **settings))
    return (losses_BS.float() * weights_BS).sum(), predicted_BS.sum()
