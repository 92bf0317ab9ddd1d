"""What a plan, and a choice of sharding, need to know of a model, from its config.json alone: transformers builds it on fake
tensors, which have shapes and no memory, and torch counts what the decoder layers compute and keep.

B = rows, T = tokens of a row, H = hidden size, V = vocabulary, S = pairs of a token and an expert that it chose, K = experts per
token, N = heads. FLOPs are floating point operations, two per multiply-add.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shards.modelfolder import max_positions

COUNTING = "remit_counting"
"""Name of the attention and of the experts that the counted model is built with."""


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
    reach = seq_len if window is None else min(window, seq_len)
    return reach - reach * (reach - 1) / (2 * seq_len)


def count(option: str, config: Any, name: str, seq_len: int, dtype: str = "float32") -> ModelShape:
    """The shape of a config's causal language model in rows of `seq_len`, its products in `dtype`.

    option: the model's name on the command line, for messages. ValueError where it is no causal language model or cannot be run
    without values. Two rows less one is what a row takes: what is kept once (weights cast to bfloat16) cancels out.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AttentionInterface, AutoModelForCausalLM
    from transformers.integrations.moe import ExpertsInterface

    AttentionInterface.register(COUNTING, _attend)
    ExpertsInterface.register(COUNTING, _choose)
    with FakeTensorMode():
        try:
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=torch.float32, trust_remote_code=False,
                attn_implementation=COUNTING, experts_implementation=COUNTING,
            )  # fmt: skip
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
    from torch.utils.flop_counter import FlopCounterMode

    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}
    attention: list[float] = []
    for module in model.modules():
        module.remit_attention_flops = attention
        if hasattr(module, "rope_type"):  # some look at the largest position, a value; their kind costs nothing
            kind = module.rope_type
            module.rope_type = dict.fromkeys(kind, "default") if isinstance(kind, dict) else "default"

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    low = torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32")
    counter = FlopCounterMode(display=False)
    with low, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), counter:
        model.get_decoder()(input_ids=torch.zeros(rows, seq_len, dtype=torch.long), use_cache=False)
    return counter.get_total_flops(), sum(attention), sum(storage.nbytes() for storage in kept.values())


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
    """Attention of transformers' interface that computes nothing and counts its causal half."""
    rows, heads, seq_len, size = query_BNTH.shape
    context = mean_context(seq_len, sliding_window)
    module.remit_attention_flops.append(2 * rows * seq_len * heads * (size + value_BNTH.shape[-1]) * context)
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


def first_line(error: Exception) -> str:
    """What an error says, short enough for a line of its own."""
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 160 else text[:160] + "..."
