"""Load the fast tokenizer that packs a corpus, and compare it with a model's."""

import json
import os
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from shards.fingerprint import tokenizer_fingerprint

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "spiece.model")


def has_tokenizer(folder: Path) -> bool:
    """Whether a model folder carries a tokenizer."""
    return any((folder / name).exists() for name in TOKENIZER_FILES)


@lru_cache(maxsize=4)
def load_tokenizer(folder: str) -> Any:
    """The transformers tokenizer of a folder; ValueError where it is missing or has no fast version."""
    if not has_tokenizer(Path(folder)):
        raise ValueError(f"{folder}: has no tokenizer; expected a folder with a tokenizer.json")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{folder}: its tokenizer cannot be loaded ({str(error).splitlines()[0]})") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"{folder}: its tokenizer has no fast version (tokenizer.json), which packing needs; convert it"
        )
    return tokenizer


def tokenizer_json(tokenizer: Any) -> dict[str, Any]:
    """Parsed tokenizer.json of a transformers tokenizer."""
    return json.loads(tokenizer.backend_tokenizer.to_str())


def describe_tokenizer(tokenizer: Any, special_tokens: str) -> dict[str, Any]:
    """What the manifest records of the tokenizer; ValueError where it has no end-of-sequence token."""
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer.name_or_path}: its tokenizer has no EOS token, which ends every document; set eos_token in its "
            "tokenizer_config.json"
        )
    ids = tokenizer.get_vocab().values()
    return {
        "fingerprint": tokenizer_fingerprint(tokenizer_json(tokenizer)),
        "eos_token_id": tokenizer.eos_token_id,
        "vocab_size": max(ids) + 1,
        "special_tokens": special_tokens,
    }
