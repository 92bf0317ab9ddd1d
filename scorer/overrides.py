"""What vLLM is told of a model's config that config.json does not say, or says for other ends.

In: a transformers config. Out: the config that the engine gets. No vLLM here: the driver asks beforehand.
"""

import math
from typing import Any

from scorer.textonly import is_wrapper, text_config_of


def engine_config(config: Any, seq_len: int, head_dtype: str | None = None) -> Any:
    """The config of an engine for rows of seq_len tokens; vLLM's hf_overrides, with the other arguments bound to it.

    head_dtype: in which states and output embedding are multiplied to logits; None for the engine's own.
    """
    if is_wrapper(config):
        config = text_config_of(config)
    if head_dtype is not None:
        config.head_dtype = head_dtype
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and rope.get("original_max_position_embeddings") == seq_len:
        # vLLM takes the long factors where it has room for more tokens than the original length, and it has room for
        # one more than a row, which is never computed. So it is told that length, and the scale of the true one.
        scale = longrope_scale(rope, config.max_position_embeddings)
        own = {"short_mscale": scale, "long_mscale": scale, "original_max_position_embeddings": seq_len + 1}
        config.rope_parameters = {**rope, **own}
        if getattr(config, "original_max_position_embeddings", None):  # Phi 3 has it beside the others, too
            config.original_max_position_embeddings = seq_len + 1
    return config


def longrope_scale(rope: dict[str, Any], max_position: int) -> float:
    """Factor of cosines and sines, as transformers computes it from parsed rope parameters."""
    given = rope.get("attention_factor")
    if given is not None:
        return float(given)
    original = rope["original_max_position_embeddings"]
    factor = rope.get("factor") or max_position / original
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
