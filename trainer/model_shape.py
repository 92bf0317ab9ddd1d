"""What a plan, and a choice of sharding, need to know of a model, from its config.json alone: transformers builds it on fake
tensors, which have shapes and no memory, and torch counts what the decoder layers compute (trainer/model_flops.py) and keep.

FLOPs are floating point operations, two per multiply-add.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shards.modelfolder import max_positions
from trainer.model_flops import build, forward, pairs


@dataclass(frozen=True)
class ModelShape:
    """A causal language model in rows of one length.

    parameters: all, tied embeddings once. Per token, on average over a row: matrix_flops, of the layers' products with
    weights (of experts the chosen ones); attention_flops, of the causal half of the attention, less with a sliding window; kept_bytes,
    what all layers together keep for their backward.
    """

    name: str
    parameters: int
    vocab_size: int
    hidden_size: int
    tied: bool
    num_layers: int
    matrix_flops: float
    attention_flops: float
    kept_bytes: float
    max_position: int | None

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    @property
    def layers_flops(self) -> float:
        """Of the forward of all layers, per token."""
        return self.matrix_flops + self.attention_flops

    @property
    def forward_flops(self) -> float:
        """Of a forward with logits, per token."""
        return self.layers_flops + 2 * self.head_parameters

    @property
    def train_flops(self) -> float:
        """Of forward and backward, per token: the backward has two products for each of the forward's."""
        return 3 * self.forward_flops


def mean_context(seq_len: int, window: int | None = None) -> float:
    """Tokens that a token of a row attends to on average, itself included."""
    return float(pairs(np.array(float(seq_len)), window)) / seq_len


def count(option: str, config: Any, name: str, seq_len: int, dtype: str = "float32") -> ModelShape:
    """The shape of a config's causal language model in rows of `seq_len`, its products in `dtype`.

    option: the model's name on the command line, for messages. ValueError where it is no causal language model or cannot be run
    without values. Two rows less one is what a row takes: what is kept once (weights cast to bfloat16) cancels out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        try:
            model = build(config)
            one, two = (_run(model, rows, seq_len, dtype) for rows in (1, 2))
        except Exception as error:
            unknown = "Unrecognized configuration class" in str(error)
            what = "is no causal language model of transformers" if unknown else "cannot be counted without weights"
            raise ValueError(f"{option} {name}: {what} ({first_line(error)})") from None
        text, head = config.get_text_config(), model.get_output_embeddings().weight
        matrix, attention, kept = ((more - less) / seq_len for less, more in zip(one, two))
        return ModelShape(
            name=name,
            parameters=sum(parameter.numel() for parameter in model.parameters()),
            vocab_size=head.shape[0],
            hidden_size=head.shape[1],
            tied=model.get_input_embeddings().weight is head,
            num_layers=text.num_hidden_layers,
            matrix_flops=matrix,
            attention_flops=attention,
            kept_bytes=kept,
            max_position=max_positions(
                text.to_dict() | {"max_position_embeddings": getattr(text, "max_position_embeddings", None)}
            ),
        )


def _run(model: Any, rows: int, seq_len: int, dtype: str) -> tuple[float, float, float]:
    """Forward of the decoder layers: FLOPs of products, FLOPs of attention, bytes kept for the backward."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    low = torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32")
    with low, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        products, attention = forward(model, rows, seq_len)
    attended = sum(rows * seq_len * per_pair * mean_context(seq_len, window) for per_pair, window in attention)
    return products, attended, sum(storage.nbytes() for storage in kept.values())


def first_line(error: Exception) -> str:
    """What an error says, short enough for a line of its own."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 160 else text[:160] + "..."
