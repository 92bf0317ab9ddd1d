"""What a reference model is, whether it fits the rows, and what the manifest records of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from scorer.config import ScoreConfig
from scorer.engine import HEAD_DTYPE, EngineConfig
from scorer.engine_args import OF_THE_MACHINE
from scorer.installed import installed_vllm
from scorer.textonly import is_wrapper, text_architecture
from scorer.tokenizer import canonical, has_tokenizer, load_encoder
from shards.folder import ShardFolder
from shards.modelfolder import max_positions, quantisation, require_language_model, require_one_scaling
from shards.tokens import other_beginning

CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
CPU_HEAD_SIZES_OF = "0.32"  # the release of vLLM that has these; others are asked when an engine starts
NO_TOKENIZER = "none"  # the manifest's tokenizer of a reference that was not compared


@dataclass(frozen=True)
class Reference:
    """A reference model on this machine. name: folder name or hub id, for the manifest; revision: of the hub."""

    path: Path
    name: str
    revision: str | None = None


def check_reference(
    shards: ShardFolder, reference: Reference, note: Callable[[str], None] = lambda line: None
) -> tuple[dict[str, Any], list[str]]:
    """Parsed config of the reference, and in which tokens that no row has its tokenizer differs from the rows'.

    ValueError unless it can score the rows of `shards`. note: told what a user should know.
    """
    require_language_model(reference.path)
    differences: list[str] = []
    if has_tokenizer(reference.path):
        encoder, where = load_encoder(reference.path), str(reference.path)
        differences = shards.require_tokenizer(json.loads(encoder.to_str()), where, canonical)
        if differences:
            note(f"{where}: its tokenizer differs in tokens that no row has: {'; '.join(differences)}")
        if line := other_beginning(encoder, shards.manifest.tokenizer.get("bos_token_id")):
            note(f"{where}: {line}")
    else:
        note(no_tokenizer(reference.path))
    whole = AutoConfig.from_pretrained(reference.path, trust_remote_code=False, local_files_only=True)
    config = whole.get_text_config(decoder=True)
    if is_wrapper(whole) and text_architecture(whole) is None:
        raise ValueError(
            f"{reference.path}: {type(whole).__name__} holds {type(config).__name__}, expected a language model that "
            "transformers has by itself (as Gemma 3's); give the folder of the language model alone"
        )
    # by attribute too, because some architectures have other names for these in their config.json
    names = ("vocab_size", "num_attention_heads", "num_hidden_layers", "hidden_size", "max_position_embeddings")
    values = config.to_dict() | {name: getattr(config, name, None) for name in names}
    values["dtype"] = getattr(config, "dtype", None) or getattr(whole, "dtype", None)
    shards.require_embeddings(config.vocab_size, str(reference.path))
    shards.require_positions(max_positions(values), str(reference.path))
    require_one_scaling(values, shards.manifest.seq_len, str(reference.path))
    return values | {"text_alone": is_wrapper(whole)}, differences


def no_tokenizer(path: Path) -> str:
    """A line about a reference without a tokenizer: what is compared, and what is not."""
    return (
        f"{path}: has no tokenizer to compare with the rows'. It has an embedding for each of their ids, but may take an id for another "
        "token; put its tokenizer.json beside its weights to have them compared"
    )


def require_quantised_readable(path: Path, otherwise: str = "") -> None:
    """ValueError where the weights of a quantised reference cannot be read here by transformers, the second opinion.

    vLLM may serve what transformers cannot load; then nothing would tell whether its numbers are the model's. otherwise: what
    to do without them, for the message.
    """
    method = quantisation(path)
    if method is None:
        return
    config = AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    settings = getattr(config, "quantization_config", None)
    settings = settings or getattr(config.get_text_config(decoder=True), "quantization_config", None)
    if settings is None:
        raise ValueError(
            f"{path}: its weights are quantised ({method}), but config.json has no quantization_config to read them by; give "
            "the folder as the quantising tool's save_pretrained writes it, or the unquantised one"
        )
    from transformers.quantizers import AutoHfQuantizer

    try:
        AutoHfQuantizer.from_config(settings, pre_quantized=True).validate_environment(device_map="cpu")
    except Exception as error:  # each method has its own kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{path}: its weights are quantised ({method}), and the transformers forward that engines are compared with cannot "
            f"load them here: {reason}; install what it asks for, or give the unquantised folder{otherwise}"
        ) from None


def require_head_size(model_config: dict[str, Any], path: Path, device: str) -> None:
    """ValueError where the CPU build of vLLM has no attention for the model's heads."""
    heads, hidden = model_config.get("num_attention_heads"), model_config.get("hidden_size")
    size = model_config.get("head_dim") or (heads and hidden and hidden // heads)
    known = device == "cpu" and require_vllm()[1].startswith(CPU_HEAD_SIZES_OF)
    if known and size and "kv_lora_rank" not in model_config and size not in CPU_HEAD_SIZES:
        raise ValueError(
            f"{path}: has attention heads of {size} numbers, expected one of {', '.join(map(str, CPU_HEAD_SIZES))}, which "
            "vLLM has on CPUs; score on a machine with a GPU"
        )


def provenance(
    config: ScoreConfig,
    reference: Reference,
    engine: EngineConfig,
    tokenizer_differences: list[str],
    kept: dict[str, Any],
) -> dict[str, Any]:
    """What the manifest records of a reference; top_k, entropy and the size of its vocabulary only where they are
    stored, differences of its tokenizer only where there are any, and tokenizer only where it has none. kept: fields that say where its most probable tokens are.
    """
    entry: dict[str, Any] = {
        "model": reference.name,
        "revision": reference.revision,
        "weights_sha256": engine.weights_sha256,
        "config_sha256": engine.config_sha256,
        "dtype": engine.dtype,
        "engine": engine.kind,
        "engine_version": engine.version or "0",
        "tensor_parallel_size": engine.tensor_parallel_size,
        "context": config.context,
        "logprob_step": config.logprob_step,
    }
    if not has_tokenizer(reference.path):
        entry["tokenizer"] = NO_TOKENIZER
    if tokenizer_differences:
        entry["tokenizer_differences"] = tokenizer_differences
    if engine.kind == "vllm":
        entry |= {
            "engine_distribution": engine.distribution,
            "device": engine.device,
            "head_dtype": HEAD_DTYPE,
        }
    lasting = {key: value for key, value in sorted(engine.arguments.items()) if key not in OF_THE_MACHINE}
    if lasting:
        entry["engine_args"] = lasting
    if config.top_k:
        entry |= {"top_k": config.top_k, "vocab_size": engine.vocab_size}
    entry |= kept
    if config.sample_k:
        entry |= {"sample_k": config.sample_k, "vocab_size": engine.vocab_size}
    if config.entropy:
        entry |= {"entropy": True, "vocab_size": engine.vocab_size}
    if config.entropy_temperature is not None:
        entry["entropy_temperature"] = config.entropy_temperature
    return entry


def require_vocabulary(config: ScoreConfig, vocab_size: int) -> None:
    """ValueError where more most probable tokens are asked for than the reference has tokens."""
    if config.top_k > vocab_size:
        raise ValueError(
            f"--top-k is {config.top_k}, expected at most {vocab_size}, the size of the vocabulary of {config.model}"
        )


def require_vllm() -> tuple[str, str]:
    """Distribution and version of the vLLM here; ValueError where it is not installed."""
    found = installed_vllm()
    if found is not None:
        return found
    raise ValueError(
        "vLLM is not installed, which scores; in your checkout of remit: pip install '.[gpu]', or '.[cpu]' without a GPU"
    )
