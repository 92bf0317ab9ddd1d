"""Is a folder a model that the next stage can read? Asked before a post-trained model is recorded."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.fingerprint import (
    parse_tokenizer_json,
)
from shards.modelfolder import require_language_model
from shards.tokens import disagreement, ordinary_ids


def check_model(folder: Path, inputs: Mapping[str, Path]) -> None:
    """ValueError unless `folder` is a Hugging Face model that transformers loads, with finite weights.

    inputs: "model" is the one that it was made of, whose tokenizer it must have.
    """
    if not (folder / "config.json").is_file():
        has = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise ValueError(f"{folder}: has no config.json (it has: {has}), expected what save_pretrained writes")
    require_language_model(folder)
    check_tokenizer(folder, inputs["model"])
    check_weights(folder, inputs["model"])
    check_vocabulary(folder, inputs["model"])


def check_vocabulary(folder: Path, start: Path) -> None:
    """ValueError where the embedding has lost rows: tokens of the corpus would have none. More, as padding, may be."""
    from transformers import AutoConfig

    ours, theirs = (
        AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True).get_text_config().vocab_size
        for place in (folder, start)
    )
    if ours < theirs:
        raise ValueError(
            f"{folder}: its embedding has {ours} rows, expected at least the {theirs} of the model that it was made of"
        )


def check_tokenizer(folder: Path, start: Path) -> None:
    """ValueError unless both folders have one tokenizer: the log-probs of other tokens are of no use."""
    from scorer.tokenizer import canonical

    ours, theirs = (canonical(_tokenizer(place)) for place in (start, folder))
    reason = disagreement(ours, theirs, ordinary_ids(ours, theirs), {})
    if reason:
        raise ValueError(
            f"{folder}: its tokenizer is not that of the model it was made of ({reason}); save the tokenizer of "
            "REMIT_MODEL beside the weights"
        )


def _tokenizer(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    try:
        return parse_tokenizer_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise ValueError(f"{file}: missing, expected the tokenizer beside the weights") from None


def check_weights(folder: Path, start: Path) -> None:
    """ValueError unless the weights are whole, finite, and those of `start` by name and shape, or what config.json
    describes."""
    import torch
    from safetensors import SafetensorError, safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # transformers raises all kinds
        raise ValueError(f"{folder / 'config.json'}: transformers cannot make a model of it ({_line(error)})") from None
    shapes: dict[str, tuple[int, ...]] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                        raise ValueError(f"{file}: {name} has values that are not finite; the training has diverged")
                    shapes[name] = tuple(tensor.shape)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({_line(error)}); it is damaged or cut off") from None
    # names on disk need not be those in memory, and some are of parts that the class does not load
    if shapes != _shapes(start) or _describes(folder) != _describes(start):
        _compare(folder, model, shapes)


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shape of each tensor in the weight files of `folder`, by name; of what can be read."""
    from safetensors import SafetensorError

    from trainer.layout import read_stored

    try:
        return {name: stored.shape for name, stored in read_stored(folder).items()}
    except (ValueError, OSError, SafetensorError):
        return {}


def _describes(folder: Path) -> dict[str, Any]:
    """config.json, but for what says nothing of the shapes of the weights."""
    value: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    others = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "tie_word_embeddings")
    return {key: entry for key, entry in value.items() if key not in others}


def _compare(folder: Path, model: Any, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless the tensors in the files, by `shapes`, are those of `model`, which config.json has made."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in expected.items():
        if name not in shapes:
            if name in tied:
                continue
            raise ValueError(f"{folder}: its weights have no {name}, which config.json asks for")
        if shapes[name] != shape:
            raise ValueError(f"{folder}: {name} has shape {shapes[name]}, expected {shape} by its config.json")
    # transformers would drop these without a word, and go on with a part of the model
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or []
    unknown = sorted(
        name
        for name in shapes.keys() - expected.keys() - tied
        if not any(re.search(pattern, name) for pattern in ignored)
    )
    if unknown:
        raise ValueError(
            f"{folder}: its weights hold {unknown[0]}{_and_more(unknown)}, expected only what config.json describes; save "
            "the config.json that belongs to the weights"
        )


def _weight_files(folder: Path) -> list[Path]:
    """The files that transformers loads; ValueError where one is missing, or where others stand beside them."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: damaged ({_line(error)})") from None
    for name in names:
        if not (folder / name).is_file():
            by = f"{index.name} names it" if index.is_file() else f"expected it, or shards with {index.name}"
            raise ValueError(f"{folder / name}: missing, {by}")
    # model.safetensors of the start beside shards of the result: transformers loads the one, the index names the other
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in names)
    if others:
        beside = f"those that {index.name} names" if index.is_file() else names[0]
        raise ValueError(
            f"{folder}: has {', '.join(others[:5])}, expected no weights beside {beside}; write only one of them"
        )
    return [folder / name for name in names]


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more tensors" if len(names) > 1 else ""


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
