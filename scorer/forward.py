"""Log-probs by a plain transformers forward: the independent second opinion on an engine's numbers.

Run it in a process that has not imported vLLM, which patches the transformers classes.

T = tokens, N = T - 1, V = vocabulary, K = most probable tokens that are asked for, E = entropies.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from scorer.engine import Answer

LOGITS_BYTES = 1 << 30  # of one prompt at once


def load_forward(model: Path | str, dtype: str = "float32") -> Callable[..., Any]:
    """A function from a prompt, int [tokens], to the float32 [tokens - 1] log-probs of its tokens from the second on.

    With ids_NK=ids, int [tokens - 1, K], also the log-probs of these ids. With best=K or temperatures an Answer instead:
    also ids and log-probs, [tokens - 1, K], of the most probable tokens, and the entropies at these temperatures, E columns
    as an engine has them.

    dtype: of weights and states, whatever the weights are stored in. The product with the output embedding gives
    float32 logits in any dtype, as an engine's does. Matrix products of float16 are computed in float32 and rounded: that is
    what a device with float16 units does, and a CPU without them takes eight times as long by itself.
    """
    import torch

    network = load_network(model, dtype)
    if dtype != "float32":
        _float32_head(network)
    products = _float16_products if dtype == "float16" else contextlib.nullcontext

    @torch.no_grad()
    def forward(
        prompt: np.ndarray, ids_NK: np.ndarray | None = None, best: int = 0, temperatures: tuple[float, ...] = ()
    ) -> Any:
        ids_T = torch.from_numpy(prompt.astype(np.int64))
        found: list[tuple[Any, ...]] = []
        with products():
            for place, logits_TV in _logits(network, ids_T):
                logprobs_TV = logits_TV.float().log_softmax(-1)
                wanted: tuple[Any, ...] = (logprobs_TV.gather(-1, ids_T[1:][place, None])[:, 0],)
                if ids_NK is not None:
                    wanted += (logprobs_TV.gather(-1, torch.from_numpy(ids_NK[place].astype(np.int64))),)
                elif best:
                    top = logprobs_TV.topk(min(best, logprobs_TV.shape[-1]))
                    wanted += (top.indices, top.values)
                if temperatures:
                    wanted += (_entropies(logprobs_TV, temperatures),)
                found.append(wanted)
        whole = [torch.cat(pieces).numpy() for pieces in zip(*found)]
        if not best and not temperatures:
            return tuple(whole) if len(whole) > 1 else whole[0]
        entropies = whole.pop() if temperatures else None
        return Answer(*whole)._replace(entropies=entropies)

    return forward


def _entropies(logprobs_TV: Any, temperatures: tuple[float, ...]) -> Any:
    """From their definition; another way than an engine's."""
    import torch

    found = []
    for temperature in temperatures:
        found.append(torch.special.entr((logprobs_TV / temperature).softmax(-1)).sum(-1))
        if temperature != 1:
            found.append((logprobs_TV / temperature).logsumexp(-1))
    return torch.stack(found, dim=-1)


def load_network(model: Path | str, dtype: str) -> Any:
    """The model with all its weights, in `dtype`, for evaluation; ValueError where some would be random numbers.

    A wrapper with other inputs beside text, which transformers does not count among the causal language models, is loaded
    as what it is: its forward of text alone is the language model's.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    config = AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=True)
    causal = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    kind_of_model: Any = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    network, loading = kind_of_model.from_pretrained(
        model,
        dtype=getattr(torch, dtype),
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
        # PyTorch's own attention computes without the soft-capping of scores (Gemma 2), as if it had not been asked for it
        attn_implementation="eager" if config.get_text_config().to_dict().get("attn_logit_softcapping") else None,
    )
    for kind in ("missing_keys", "mismatched_keys"):
        if loading.get(kind):
            raise ValueError(
                f"{model}: its weights lack {sorted(map(str, loading[kind]))[0]} ({len(loading[kind])} {kind}), which would be "
                "random numbers; write the folder again with save_pretrained"
            )
    return network.eval()


def _logits(network: Any, ids_T: Any) -> Iterator[tuple[slice, Any]]:
    """Places and logits, [places, V], of a prompt but for its last token, whose successor nobody asks for.

    Where they are too many for the memory, the layers run once, and the network's own code makes logits of their output
    piece by piece: some families scale or bound them.
    """
    tokens, vocabulary = len(ids_T), network.config.get_text_config().vocab_size
    rows = max(1, LOGITS_BYTES // (4 * vocabulary))
    layers = network.get_decoder()
    takes_part = "logits_to_keep" in inspect.signature(network.forward).parameters
    if rows >= tokens or layers is None or layers is network or not takes_part:
        yield slice(0, tokens - 1), network(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
        return
    own, kept = layers.forward, []

    def keep(*args: Any, **named: Any) -> Any:
        kept.append(own(*args, **named))
        return kept[0]

    try:
        layers.forward = keep
        network(input_ids=ids_T[None], use_cache=False, logits_to_keep=1)
        assert kept, "the model's forward does not call its decoder"
        states_1TD = kept[0].last_hidden_state
        for start in range(0, tokens - 1, rows):
            place = slice(start, min(start + rows, tokens - 1))
            kept[0].last_hidden_state = states_1TD[:, place]
            layers.forward = lambda *args, **named: kept[0]
            yield place, network(input_ids=ids_T[None, place], use_cache=False).logits[0]
    finally:
        del layers.forward


def _float32_head(network: Any) -> None:
    """Have the output embedding give float32 logits, where it is a plain matrix."""
    import torch

    head: Any = network.get_output_embeddings()
    is_plain = isinstance(head, torch.nn.Linear)
    if is_plain:
        linear = torch.nn.functional.linear
        bias = None if head.bias is None else head.bias.float()
        head.forward = lambda states: linear(states.float(), head.weight.float(), bias)


def _float16_products() -> Any:
    """In the block, linear layers on a CPU multiply in float32 and round their results to float16."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Products(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is not torch.nn.functional.linear or kwargs or args[1].dtype != torch.float16 or args[1].is_cuda:
                return func(*args, **(kwargs or {}))
            operands: Any = [None if value is None else value.float() for value in args]
            return func(*operands).half()

    return Products()


def spans(row_lengths: np.ndarray, piece_lengths: np.ndarray, context: str) -> Iterator[tuple[int, int]]:
    """First token and one past the last of what is conditioned on together, where that has two tokens at least."""
    lengths = row_lengths if context == "packed" else piece_lengths
    for end, length in zip(np.cumsum(lengths), lengths):
        if length > 1:
            yield int(end - length), int(end)
