"""OLMo-core trains on what `remit export --to olmo-core` wrote: a dataset, a collator and a train module (for OLMo-core 3)::

    dataset = ScoredRows.open("exported", reference="rl")
    loader = NumpyDataLoaderBase.wrap_numpy_dataset(dataset, collator=ScoredCollator(pad_token_id=dataset.pad_token_id), ...)
    module = WeightedTrainModule(model=model, optim=AdamWConfig(...), objective="remit", epsilon=0.2, ...)

Instances are rows, padded to seq_len. B instances of S positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from olmo_core.data import DataCollator, NumpyFSLDataset
from olmo_core.data.utils import load_array_slice
from olmo_core.nn.lm_head import LMLossImplementation, LMOutputWithLoss
from olmo_core.train import ReduceType
from olmo_core.train.train_module import TransformerTrainModule
from torch import Tensor

from trainer.integrations.folder import DOCUMENTS, IDS, LENGTHS, MASK, Exported
from trainer.integrations.weights import row_objective, row_weights


class ScoredRows(NumpyFSLDataset):
    """NumpyFSLDataset whose instances have `logprobs`, float32 [seq_len] at the places of the tokens they belong to, beside
    input_ids and label_mask; and in document context `doc_lens` of the row's own documents, the padding being one too."""

    exported: Exported
    reference: str

    @classmethod
    def open(cls, folder: Path | str, reference: str | None = None, **options: Any) -> "ScoredRows":
        """The rows of an export. reference: needed where it has several. options: of NumpyFSLDataset. ValueError as of
        Exported.open."""
        exported = Exported.open(folder, "olmo-core")
        reference = exported.reference(reference)
        dataset = cls(
            *exported.files(IDS),
            sequence_length=exported.seq_len,
            pad_token_id=exported.eos_token_id,
            eos_token_id=exported.eos_token_id,
            vocab_size=exported.vocab_size,
            dtype=getattr(np, exported.columns[IDS]["dtype"]),
            label_mask_paths=list(exported.files(MASK)),
            **options,
        )
        dataset.exported, dataset.reference = exported, reference
        return dataset

    def __getitem__(self, index: int) -> dict[str, Any]:
        item = super().__getitem__(index)
        index = int(index) % len(self)
        part = next(place for place, (start, end) in enumerate(self.offsets) if start <= index < end)
        first = (index - self.offsets[part][0]) * self.sequence_length
        file = self.exported.files(f"{self.reference}_logprobs")[part]
        dtype: Any = np.float32  # the library names dtypes of ids alone
        item["logprobs"] = torch.tensor(load_array_slice(file, first, first + self.sequence_length, dtype))
        if self.exported.context == "document":
            item["doc_lens"] = self._document_lengths(part, index - self.offsets[part][0])
        return item

    def _document_lengths(self, part: int, row: int) -> Tensor:
        """Tokens of each document of a row, and of its padding, int32 [documents]."""
        lengths = np.memmap(self.exported.files(LENGTHS)[part], np.int32, "r").reshape(-1, 2)
        pieces = np.memmap(self.exported.files(DOCUMENTS)[part], np.int32, "r")
        own = pieces[int(lengths[:row, 1].sum()) :][: int(lengths[row, 1])].tolist()
        padding = self.sequence_length - int(lengths[row, 0])
        return torch.tensor([*own, *([padding] if padding else [])], dtype=torch.int32)


@dataclass
class ScoredCollator(DataCollator):
    """DataCollator that keeps the log-probs of the instances, float32 [B, S]."""

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        batch = super().__call__(items)
        if isinstance(items[0], dict) and "logprobs" in items[0]:  # mock batches of a dry run have none
            batch["logprobs"] = torch.stack([item["logprobs"] for item in items])
        return batch


class WeightedTrainModule(TransformerTrainModule):
    """TransformerTrainModule with the loss of an objective of remit train: Eq. 6 of arXiv 2602.03075.

    objective: remit, ntp or rho1; epsilon, centring, weight_map, keep_ratio: its settings, as remit train has them; all else as
    TransformerTrainModule. The metric `train/weighted loss` is that of the objective, `train/CE loss` plain cross entropy. As
    everywhere in OLMo-core, a process divides by its own predicted tokens. ValueError for tensor and context parallelism,
    the z-loss and the fused loss, whose losses per token are not at hand.
    """

    def __init__(
        self,
        model: Any,
        *arguments: Any,
        objective: str = "remit",
        epsilon: float = 0.2,
        centring: str = "row",
        weight_map: str = "sigmoid",
        keep_ratio: float = 0.8,
        **options: Any,
    ) -> None:
        self._objective = row_objective(
            objective, epsilon=epsilon, centring=centring, weight_map=weight_map, keep_ratio=keep_ratio
        )
        for name in ("tp_config", "cp_config", "z_loss_multiplier"):
            if options.get(name) is not None:
                raise ValueError(
                    f"{name} is {options[name]}, expected None: WeightedTrainModule weighs losses token by token"
                )
        if model.lm_head.loss_implementation != LMLossImplementation.default:
            raise ValueError(
                f"loss_implementation is {model.lm_head.loss_implementation}, expected default: WeightedTrainModule weighs "
                "losses token by token"
            )
        super().__init__(model, *arguments, **options)
        self._weighted_loss, self._dry_run = torch.tensor(0.0), False

    def train_batch(self, batch: dict[str, Any], dry_run: bool = False) -> None:
        self._weighted_loss, self._dry_run = torch.zeros((), device=self.device), dry_run
        super().train_batch(batch, dry_run=dry_run)
        if not dry_run:
            self.record_metric("weighted loss", self._weighted_loss, ReduceType.mean, namespace="train")

    def model_forward(self, input_ids: Tensor, labels: Tensor | None = None, **options: Any) -> Any:
        """labels: [B, S], of which position t has token t + 1, -100 where nothing is predicted; logprobs, among the options:
        float32 [B, S], at the places of their own tokens. The losses of one whole row decide its weights."""
        logprobs_BS = options.pop("logprobs", None)
        if labels is None or options.get("loss_reduction") != "sum":  # an evaluation
            return super().model_forward(input_ids, labels=labels, **options)
        divisor = options.pop("loss_div_factor", None)
        output: Any = super().model_forward(input_ids, labels=labels, **(options | {"loss_reduction": "none"}))
        losses_BS: Tensor = output.loss  # 0 where the label is -100
        predicted_BS = (labels != self.label_ignore_index).to(losses_BS.device)
        if logprobs_BS is None:
            if self._objective.objective != "ntp" and not self._dry_run:  # whose batch OLMo-core makes up
                raise ValueError("the batch has no logprobs; give the data loader ScoredRows and ScoredCollator")
            logprobs_BS = torch.zeros_like(losses_BS)
        shifted_BS = F.pad(logprobs_BS.to(losses_BS.device)[:, 1:], (0, 1))
        weights_BS = row_weights(losses_BS, shifted_BS, predicted_BS, self._objective)
        loss, plain = (weights_BS * losses_BS).sum(), losses_BS.detach().sum()
        if divisor is not None:
            loss, plain = loss / divisor, plain / divisor
        self._weighted_loss += loss.detach()
        return LMOutputWithLoss(logits=None, loss=loss, ce_loss=plain, z_loss=None)
