"""Log-probs by a plain transformers forward: the independent second opinion on an engine's numbers.

Run it in a process that has not imported vLLM, which patches the transformers classes.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np


def load_forward(model: Path | str) -> Callable[..., Any]:
    """A function from a prompt, int [tokens], to the float32 [tokens - 1] log-probs of its tokens from the second on.

    With ids_NK=ids, int [tokens - 1, K], also the log-probs of these ids; with best=K also ids and log-probs, [tokens -
    1, K], of the most probable tokens.

    The model's weights are computed with in float32, whatever they are stored in.
    """
    import torch

    network = load_network(model)

    @torch.no_grad()
    def forward(prompt: np.ndarray, ids_NK: np.ndarray | None = None, best: int = 0) -> Any:
        ids_T = torch.from_numpy(prompt.astype(np.int64))
        logits_TV = network(input_ids=ids_T[None], use_cache=False).logits[0, :-1]
        logprobs_TV = logits_TV.float().log_softmax(-1)
        own_N = logprobs_TV.gather(-1, ids_T[1:, None])[:, 0].numpy()
        if ids_NK is not None:
            return own_N, logprobs_TV.gather(-1, torch.from_numpy(ids_NK.astype(np.int64))).numpy()
        if best:
            top = logprobs_TV.topk(min(best, logprobs_TV.shape[-1]))
            return own_N, top.indices.numpy(), top.values.numpy()
        return own_N

    return forward


def load_network(model: Path | str) -> Any:
    """The model with all its weights, in float32, for evaluation; ValueError where some would be random numbers.

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
        dtype=torch.float32,
        trust_remote_code=False,
        local_files_only=True,
        use_safetensors=True,
        output_loading_info=True,
    )
    for kind in ("missing_keys", "mismatched_keys"):
        if loading.get(kind):
            raise ValueError(
                f"{model}: its weights lack {sorted(map(str, loading[kind]))[0]} ({len(loading[kind])} {kind}), which would be "
                "random numbers; write the folder again with save_pretrained"
            )
    return network.eval()


def forward_all(model: Path | str, prompts: list[np.ndarray], best: int = 0) -> list[Any]:
    """The log-probs of several prompts; with best=K tuples with the most probable tokens."""
    forward = load_forward(model)
    return [forward(prompt, best=best) for prompt in prompts]


def spans(row_lengths: np.ndarray, piece_lengths: np.ndarray, context: str) -> Iterator[tuple[int, int]]:
    """First token and one past the last of what is conditioned on together, where that has two tokens at least."""
    lengths = row_lengths if context == "packed" else piece_lengths
    for end, length in zip(np.cumsum(lengths), lengths):
        if length > 1:
            yield int(end - length), int(end)
