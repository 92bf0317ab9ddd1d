"""Content fingerprints of tokenizers and weights, so that nothing is mixed in silence.

Names and paths do not enter: a tokenizer or a model is what its content is.
"""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from shards.part import sha256_file

RUN = "run.json"
"""In the folder of a training or post-training: what it was made of."""


def vocabulary(tokenizer_json: dict[str, Any]) -> tuple[dict[str, int], list[list[Any]], list[list[Any]]]:
    """Token-to-id map, merges and special tokens of a parsed tokenizer.json."""
    model = tokenizer_json["model"]
    entries = model["vocab"]
    if isinstance(entries, list):  # Unigram stores [token, score] in the order of the ids
        ids = {token: index for index, (token, _) in enumerate(entries)}
    else:
        ids = dict(entries)
    added = tokenizer_json.get("added_tokens") or []
    ids.update({token["content"]: token["id"] for token in added})
    # older files write a merge as "a b", newer ones as ["a", "b"]
    merges = [merge.split(" ", 1) if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
    special = sorted([token["id"], token["content"]] for token in added if token.get("special"))
    return ids, merges, special


def parse_tokenizer_json(data: bytes, where: str) -> dict[str, Any]:
    """Parsed content of a tokenizer.json; ValueError where it is damaged."""
    try:
        value = json.loads(data)
        vocabulary(value)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{where}: damaged ({error}); copy it from the tokenizer that packed the rows") from None
    return value


def tokenizer_fingerprint(tokenizer_json: dict[str, Any]) -> str:
    """sha256 over the token-to-id map, the merges and the special tokens of a parsed tokenizer.json."""
    ids, merges, special = vocabulary(tokenizer_json)
    canonical = json.dumps([sorted(ids.items()), merges, special], ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def weights_fingerprint(model_folder: Path) -> str:
    """sha256 over the names and contents of the *.safetensors files of a model folder.

    Raises ValueError where the folder holds no such file: pickled weights are not loaded.
    """
    files = sorted(model_folder.glob("*.safetensors"))
    if not files:
        raise ValueError(
            f"{model_folder}: has no *.safetensors weights; give a folder that save_pretrained wrote "
            "(pickled weights are not loaded; convert them with transformers first)"
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name} {sha256_file(file)}\n".encode())
    return digest.hexdigest()


def model_origin(model_folder: Path) -> tuple[str, str | None]:
    """Hub id and commit of a folder in the hub's cache, which is laid out as models--ORG--NAME/snapshots/COMMIT.

    Of any other None as the commit, and the folder's name; of a model that remit trained, the name of its run.
    """
    folder = model_folder.resolve()
    kind, _, hub_id = folder.parent.parent.name.partition("--")
    if kind == "models" and hub_id and folder.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", folder.name):
        return hub_id.replace("--", "/", 1), folder.name
    if folder.name == "model" and (folder.parent / RUN).exists():
        return folder.parent.name, None
    if folder.name == "model-average" and (folder.parent / RUN).exists():
        return f"{folder.parent.name}-average", None
    if folder.parent.name == "exports" and (folder.parents[1] / RUN).exists():
        return f"{folder.parents[1].name}-{folder.name}", None
    return folder.name, None


def config_fingerprint(model_folder: Path) -> str:
    """sha256 over the parsed config.json of a model folder, without what says who wrote it, and when."""
    value = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    settings = {key: entry for key, entry in value.items() if key not in ("transformers_version", "_name_or_path")}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def refuse_code_and_pickles(model_folder: Path) -> None:
    """ValueError where a model folder carries code, asks for some, or has its weights only as pickles."""
    scripts = sorted(model_folder.glob("*.py"))
    if scripts:
        raise ValueError(
            f"{scripts[0]}: Python code in a model folder, which remit never runs; models need an architecture that "
            "transformers has, in a folder without *.py files"
        )
    for name in ("config.json", "tokenizer_config.json", "generation_config.json"):
        try:
            value = json.loads((model_folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except ValueError as error:
            raise ValueError(f"{model_folder / name}: not valid JSON ({error})") from None
        if isinstance(value, dict) and value.get("auto_map"):
            raise ValueError(
                f"{model_folder / name}: has auto_map, which loads Python code from the hub; remit never does: models "
                "need an architecture that transformers has; remove auto_map if yours is one"
            )
    if not any(model_folder.glob("*.safetensors")):
        weights_fingerprint(model_folder)  # raises, and says what is missing
