"""What a plan needs to know of a model, read from its config.json alone: transformers builds it without weights.

T = tokens of a row, H = hidden size, V = vocabulary. FLOPs are floating point operations, two per multiply-add.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.modelfolder import max_positions


@dataclass(frozen=True)
class Attention:
    """One layer: width = heads x (size of a query + size of a value); window: tokens it looks back on, None for all."""

    width: int
    window: int | None


@dataclass(frozen=True)
class ModelShape:
    """A causal language model as its matrix products see it.

    parameters: all, tied embeddings once; matrix_parameters: those that a token is multiplied with, without the
    embeddings and the head (of experts the chosen ones); activation_width: (float32, compute dtype) elements that a layer
    keeps per token for its backward.
    """

    name: str
    parameters: int
    matrix_parameters: int
    vocab_size: int
    hidden_size: int
    tied: bool
    attention: tuple[Attention, ...]
    activation_width: tuple[int, int]
    max_position: int | None

    @property
    def num_layers(self) -> int:
        return len(self.attention)

    @property
    def head_parameters(self) -> int:
        return self.vocab_size * self.hidden_size

    def layers_flops(self, seq_len: int, causal: bool = True) -> float:
        """Of the forward of all layers, per token of a row of seq_len. causal: half of the attention is never computed."""
        contexts = [mean_context(seq_len, layer.window) if causal else seq_len for layer in self.attention]
        attention = sum(2 * layer.width * context for layer, context in zip(self.attention, contexts))
        return 2 * self.matrix_parameters + attention

    def forward_flops(self, seq_len: int, causal: bool = True) -> float:
        """Of a forward with logits, per token."""
        return self.layers_flops(seq_len, causal) + 2 * self.head_parameters

    def train_flops(self, seq_len: int, causal: bool = True) -> float:
        """Of forward and backward, per token: the backward has two products for each of the forward's."""
        return 3 * self.forward_flops(seq_len, causal)


def mean_context(seq_len: int, window: int | None = None) -> float:
    """Tokens that a token of a row attends to on average, itself included."""
    reach = seq_len if window is None else min(window, seq_len)
    return reach - reach * (reach - 1) / (2 * seq_len)


def read_config(option: str, folder: Path) -> Any:
    """transformers' config of a folder; ValueError where it has none that transformers can build without remote code."""
    from transformers import AutoConfig

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{option} {folder}: has no config.json, expected a Hugging Face model folder, or NAME or NAME@REVISION of the hub"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{option} {folder}: its config.json cannot be used ({_reason(error)})") from None


def read_shape(option: str, folder: Path, name: str) -> ModelShape:
    """The shape of the model in `folder`. option: its name on the command line, for messages."""
    return shape_of(option, read_config(option, folder), name)


def shape_of(option: str, config: Any, name: str) -> ModelShape:
    """The shape of the causal language model of a config, built on the meta device; ValueError where it is none."""
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"{option} {name}: is no causal language model of transformers ({_reason(error)})") from None
    text = config.get_text_config()
    head = model.get_output_embeddings().weight
    looked_up = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)} | {id(head)}
    chosen = getattr(text, "num_experts_per_tok", None) or 1
    experts = getattr(text, "num_experts", None) or getattr(text, "num_local_experts", None)
    experts = experts or getattr(text, "n_routed_experts", None) or 1
    matrices = 0
    for path, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in looked_up:
            routed = ".experts." in path
            matrices += parameter.numel() * chosen // experts if routed else parameter.numel()
    vocab_size, hidden_size = head.shape
    return ModelShape(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        matrix_parameters=matrices,
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        tied=model.get_input_embeddings().weight is head,
        attention=_attention(text),
        activation_width=_activation_width(model, text, chosen if experts > 1 else 1),
        max_position=max_positions(
            text.to_dict() | {"max_position_embeddings": getattr(text, "max_position_embeddings", None)}
        ),
    )


def _attention(text: Any) -> tuple[Attention, ...]:
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    query, value = size, size
    if getattr(text, "kv_lora_rank", None):  # multi-head latent attention
        query, value = text.qk_nope_head_dim + text.qk_rope_head_dim, text.v_head_dim
    window = getattr(text, "sliding_window", None)
    if not getattr(text, "use_sliding_window", True):
        window = None
    kinds = getattr(text, "layer_types", None)
    kinds = kinds or ["sliding_attention" if window else "full_attention"] * text.num_hidden_layers
    width = heads * (query + value)
    layers = {"full_attention": Attention(width, None), "sliding_attention": Attention(width, window)}
    return tuple(layers.get(kind, Attention(0, None)) for kind in kinds)  # others do not grow with the context


def _activation_width(model: Any, text: Any, chosen_experts: int) -> tuple[int, int]:
    """Elements per token that a layer keeps: (those in float32 whatever the dtype, those in the compute dtype).

    A norm keeps its input and its normalised form in float32. Five products read the residual stream, each its own copy
    under autocast; attention keeps queries, keys, values and its output; a gated MLP keeps gate, its activation, up, and
    their product.
    """
    hidden, heads = text.hidden_size, text.num_attention_heads
    size = getattr(text, "head_dim", None) or hidden // heads
    shared = (getattr(text, "num_key_value_heads", None) or heads) * size
    query, keys, values, output = heads * size, shared, shared, heads * size
    if getattr(text, "kv_lora_rank", None):
        query = keys = heads * (text.qk_nope_head_dim + text.qk_rope_head_dim)
        values = output = heads * text.v_head_dim
    inner = getattr(text, "intermediate_size", None) or getattr(text, "n_inner", None) or 4 * hidden
    if chosen_experts > 1:
        inner = chosen_experts * (getattr(text, "moe_intermediate_size", None) or inner)
    norms = 0
    for path, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if "norm" in type(module).__name__.lower() and weight is not None:
            # a norm of each head has the weights of one
            norms += {"q_norm": query, "k_norm": keys}.get(path.rpartition(".")[2], weight.numel())
    return 2 * norms // text.num_hidden_layers, 5 * hidden + query + keys + values + output + 4 * inner


def _reason(error: Exception) -> str:
    text = (str(error).splitlines() or [type(error).__name__])[0]
    return text if len(text) <= 160 else text[:160] + "..."


def reduced(config: Any, num_layers: int) -> Any:
    """The config with fewer layers."""
    smaller = type(config).from_dict(config.to_dict())
    text = smaller.get_text_config()
    kinds = getattr(text, "layer_types", None)
    if kinds:
        text.layer_types = list(kinds)[:num_layers]
    text.num_hidden_layers = num_layers
    return smaller


def steps_of(tokens: float, seq_len: int, global_batch_size: int) -> int:
    """Optimizer steps of a pass over so many tokens."""
    return math.ceil(math.ceil(tokens / seq_len) / global_batch_size)
