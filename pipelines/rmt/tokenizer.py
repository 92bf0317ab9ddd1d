"""The tokenizer of a run, and which tokens end what its model writes."""

from pathlib import Path
from typing import Any

from shards.folder import TOKENIZER, ShardFolder
from trainer.tokenizer import replaced_components


def load_tokenizer(model: Path, shards: ShardFolder, out: Path) -> Any:
    """The base's tokenizer, or a copy of the one that packed the rows; with an end token, and one to pad with."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = model
    if not (model / "tokenizer.json").exists() and not (model / "tokenizer_config.json").exists():
        folder = out / TOKENIZER
        folder.mkdir(parents=True, exist_ok=True)
        shards.copy_tokenizer(folder)
    # some classes of transformers leave parts of tokenizer.json out, and its ids are what the rows have
    loader: Any = PreTrainedTokenizerFast if replaced_components(folder) else AutoTokenizer
    tokenizer = loader.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{folder}: its tokenizer has no end token (eos_token), expected one, which ends a rollout")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # TRL masks by length, not by token
    return tokenizer


def ends_of(model: Any) -> tuple[int, ...]:
    """Ids that end what a transformers model writes, as its generation_config.json says."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    return tuple(ends) if isinstance(ends, list | tuple) else () if ends is None else (ends,)
