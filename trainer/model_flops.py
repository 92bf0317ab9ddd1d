"""Model FLOPs of a training step: what the matrix products of its forward and backward take, whichever kernels compute them.

In: a model's config and the rows of a step. Out: floating point operations, two per multiply-add. A token costs 6 N, N the
weights that it is multiplied with (Kaplan et al., arXiv 2001.08361, section 2.1): of experts those of the chosen ones, with the
head where the token is predicted, without the input embedding, which is looked up. Attention costs 6 heads (d_qk + d_v) for each
pair of a token and one that it attends to: 12 L H Q T of PaLM (arXiv 2204.02311, appendix B), but for what the causal mask,
windows and the ends of documents leave out. What is computed a second time (activation checkpointing, logits of a row in
pieces, the first pass of --scope global) does not count.

transformers builds the model on tensors that have shapes and no memory, and torch counts the products of its layers.
B = rows, T = tokens of a row, H = hidden size, S = pairs of a token and an expert that it chose, K = experts per token, N = heads.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trainer.batch import Row

COUNTING = "remit_counting"
"""Name of the attention and of the experts that the counted model is built with."""
SHORT, LONG = (4, 8), 256
"""Tokens of the rows that are counted: products with weights cost the same per token in rows of any length. Where the short ones
differ, layers work in chunks, which they pad (state space, linear attention), and a long row is counted."""
TRAINING = 3  # the backward has two products for each of the forward's


@dataclass(frozen=True)
class ModelFlops:
    """FLOPs of a forward. layers: per token, of the layers' products with weights; head: per predicted token; attention: per pair
    of tokens, of all layers with a window, by the window's length (None: the layers that look back to the beginning)."""

    layers: float
    head: float
    attention: Mapping[int | None, float]

    def of_step(self, rows: Sequence[Row], context: str) -> float:
        """Of forward and backward of rows, which attend within each document (context "document") or to all before."""
        if not rows:
            return 0.0
        tokens = sum(len(row.input_ids) for row in rows)
        predicted = sum(int(row.predicted.sum()) for row in rows)
        per_row = [row.doc_lengths if context == "document" else [len(row.input_ids)] for row in rows]
        lengths = np.concatenate([np.asarray(own, dtype=np.float64) for own in per_row])
        attended = sum(flops * float(pairs(lengths, window).sum()) for window, flops in self.attention.items())
        return TRAINING * (self.layers * tokens + self.head * predicted + attended)


def pairs(lengths: np.ndarray, window: int | None = None) -> np.ndarray:
    """Pairs of a token and one that it attends to, itself included, in sequences of these lengths."""
    reach = lengths if window is None else np.minimum(window, lengths)
    return lengths * reach - reach * (reach - 1) / 2


def count_model_flops(config: Any) -> ModelFlops:
    """What a config's causal language model costs.

    ValueError where transformers cannot build it or its attention cannot be replaced by one that counts.
    """
    key = f"{type(config).__name__} {config.to_json_string(use_diff=False)}"
    if key not in _counted:
        _counted[key] = _count(config)
    return _counted[key]


_counted: dict[str, ModelFlops] = {}


def _count(config: Any) -> ModelFlops:
    from transformers.initialization import no_init_weights

    with torch.device("meta"), torch.no_grad():
        try:
            with no_init_weights():
                model = build(config)
            (flops, attention), (more, _) = (forward(model, 1, length) for length in SHORT)
            per_token = flops / SHORT[0]
            if per_token != more / SHORT[1]:
                per_token = forward(model, 1, LONG)[0] / LONG
        except Exception as error:  # whatever a class does that needs values
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ValueError(f"the model FLOPs of {type(config).__name__} cannot be counted: {reason[:160]}") from None
        by_window: dict[int | None, float] = {}
        for per_pair, window in attention:
            by_window[window] = by_window.get(window, 0.0) + per_pair
        return ModelFlops(per_token, 2.0 * model.get_output_embeddings().weight.numel(), by_window)


def speed(metrics: Mapping[str, Any]) -> dict[str, float]:
    """What follows from the metrics of a step: model TFLOP/s of all processes together; empty where FLOPs were not counted."""
    if "model_flops_per_token" not in metrics:
        return {}
    return {"teraflops_per_second": metrics["model_flops_per_token"] * metrics["tokens_per_second"] / 1e12}


def build(config: Any) -> Any:
    """The model of a config in float32, to be counted; where tensors are made without memory."""
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(COUNTING, _attend)
    ExpertsInterface.register(COUNTING, _choose)
    return AutoModelForCausalLM.from_config(
        copy.deepcopy(config), dtype=torch.float32, trust_remote_code=False, attn_implementation=COUNTING,
        experts_implementation=COUNTING,
    )  # fmt: skip


def forward(model: Any, rows: int, seq_len: int) -> tuple[float, list[tuple[float, int | None]]]:
    """Forward of the decoder layers of a model from `build`: FLOPs of products with weights, and of each attention the FLOPs
    per pair of tokens and its window."""
    from torch.utils.flop_counter import FlopCounterMode

    attention: list[tuple[float, int | None]] = []
    for module in model.modules():
        module.remit_attention = attention
        if hasattr(module, "rope_type"):  # some look at the largest position, a value; their kind costs nothing
            kind = module.rope_type
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"
    with FlopCounterMode(display=False) as counter:
        model.get_decoder()(input_ids=torch.zeros(rows, seq_len, dtype=torch.long), use_cache=False)
    return counter.get_total_flops(), attention


class _Attention(torch.autograd.Function):
    """Keeps what fused attention keeps: queries, keys, values and its output, and no scores."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)
    def forward(ctx: Any, query_BNTH: Tensor, key_BNTH: Tensor, value_BNTH: Tensor) -> Tensor:
        output_BNTH = query_BNTH.new_empty(*query_BNTH.shape[:-1], value_BNTH.shape[-1])
        ctx.save_for_backward(query_BNTH, key_BNTH, value_BNTH, output_BNTH)
        return output_BNTH


def _attend(
    module: Any,
    query_BNTH: Tensor,
    key_BNTH: Tensor,
    value_BNTH: Tensor,
    mask: None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface that computes nothing and notes what it would cost."""
    _, heads, _, size = query_BNTH.shape
    module.remit_attention.append((2.0 * heads * (size + value_BNTH.shape[-1]), sliding_window))
    return _Attention.apply(query_BNTH, key_BNTH, value_BNTH).transpose(1, 2).contiguous(), None


def _choose(experts: Any, hidden_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """Experts of transformers' interface: all have one size, so the first one stands for whichever a token chooses."""

    def product(rows_SH: Tensor, name: str) -> Tensor:
        weight = getattr(experts, name)[0]
        rows_SH = rows_SH @ (weight if experts.is_transposed else weight.T)
        return rows_SH + getattr(experts, f"{name}_bias")[0] if experts.has_bias else rows_SH

    rows_SH = hidden_TH.repeat_interleave(chosen_TK.shape[-1], dim=0)
    if experts.has_gate:
        inner = experts._apply_gate(product(rows_SH, "gate_up_proj"))
    else:
        inner = experts.act_fn(product(rows_SH, "up_proj"))
    weighted = product(inner, "down_proj") * weights_TK.reshape(-1, 1)
    return weighted.view(*chosen_TK.shape, -1).sum(1).to(hidden_TH.dtype)
