"""In which dtype a reference is scored.

float16 rounds a number to 11 bits, bfloat16 to 8, at the same cost; what float16 lacks is range. Whether a bfloat16
model needs that range is seen on a few prompts of the corpus, before any engine starts.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scorer.canary import Forwards
from scorer.config import ScoreConfig
from scorer.installed import without_float16


def own_dtype(model_config: dict[str, Any]) -> str:
    """The dtype of the model's own weights, as its config.json has it."""
    return str(model_config.get("dtype") or "float32").removeprefix("torch.")


def settled_dtype(
    config: ScoreConfig,
    model: Path,
    model_config: dict[str, Any],
    recorded: str | None,
    note: Callable[[str], None],
) -> str | None:
    """The dtype to score in; None where two are possible and the numbers have to decide.

    recorded: what an earlier run of the same command has chosen. ValueError where vLLM would refuse the dtype.
    """
    own = own_dtype(model_config)
    if config.engine != "vllm":
        return own if config.dtype == "auto" else config.dtype
    model_type = str(json.loads((model / "config.json").read_text(encoding="utf-8")).get("model_type"))
    refused = without_float16()
    if model_config.get("model_type") in (refused or ()):  # of the language model in a multimodal wrapper
        model_type = str(model_config["model_type"])
    if config.dtype == "float16" and model_type in (refused or ()):
        raise ValueError(
            f"--dtype is float16, which vLLM does not run for models of the type {model_type}, expected bfloat16 or "
            f"float32; --dtype auto takes {'float32' if own == 'float16' else own}"
        )
    if config.dtype != "auto":
        return config.dtype
    if own == "float16" and model_type in (refused or ()):
        note(f"dtype float32: vLLM does not run models of the type {model_type} in float16, the model's own")
        return "float32"
    if own != "bfloat16":
        return own
    if recorded is not None:  # in float32: another run, which is refused by that field
        return recorded if recorded == "float16" else own
    if refused is None:
        why = "this release of vLLM does not say which models it runs in float16; --dtype float16 tries"
    elif model_type in refused:
        why = f"vLLM does not run models of the type {model_type} in float16; --dtype float32 is exact"
    elif not config.canary:
        why = "--no-canary leaves open whether float16 would be nearer to float32; --dtype float16 takes it"
    else:
        return None
    note(f"dtype bfloat16, the model's own: {why}")
    return "bfloat16"


def nearer_dtype(forwards: Forwards, note: Callable[[str], None]) -> str:
    """float16 where it is finite and nearer to float32 than bfloat16, else bfloat16; tells which, and how near."""
    half, own = forwards.distances["float16"], forwards.distances["bfloat16"]
    where = f"from a float32 forward in the mean over {own.tokens:,} tokens"
    if half.mean < own.mean:
        note(f"dtype float16: its log-probs are {half.mean:.2g} nat {where}, those of bfloat16 {own.mean:.2g}")
        return "float16"
    why = f"those of float16 {half.mean:.2g}" if half.mean < float("inf") else "float16 overflows"
    note(f"dtype bfloat16: its log-probs are {own.mean:.2g} nat {where}, {why}")
    return "bfloat16"
