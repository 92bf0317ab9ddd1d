"""Is a folder a model that the next stage can read? Asked before a post-trained model is recorded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shards.fingerprint import (
    parse_tokenizer_json,
    refuse_code_and_pickles,
    tokenizer_difference,
    tokenizer_fingerprint,
)


def check_model(folder: Path, inputs: Mapping[str, Path]) -> None:
    """ValueError unless `folder` is a Hugging Face model that transformers loads, with finite weights.

    inputs: "model" is the one that it was made of, whose tokenizer it must have.
    """
    if not (folder / "config.json").is_file():
        has = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise ValueError(f"{folder}: has no config.json (it has: {has}), expected what save_pretrained writes")
    refuse_code_and_pickles(folder)
    check_tokenizer(folder, inputs["model"])
    check_weights(folder)


def check_tokenizer(folder: Path, start: Path) -> None:
    """ValueError unless both folders have one tokenizer: the log-probs of other tokens are of no use."""
    ours, theirs = (_tokenizer(place) for place in (start, folder))
    if tokenizer_fingerprint(ours) != tokenizer_fingerprint(theirs):
        raise ValueError(
            f"{folder}: its tokenizer is not that of the model it was made of ({tokenizer_difference(ours, theirs)}); save "
            "the tokenizer of REMIT_MODEL beside the weights, without added tokens"
        )


def _tokenizer(folder: Path) -> dict[str, Any]:
    file = folder / "tokenizer.json"
    try:
        return parse_tokenizer_json(file.read_bytes(), str(file))
    except FileNotFoundError:
        raise ValueError(f"{file}: missing, expected the tokenizer beside the weights") from None


def check_weights(folder: Path) -> None:
    """ValueError unless the weights are whole, finite, and those that config.json describes."""
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
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    for name, tensor in model.state_dict().items():
        if name not in shapes:
            if name in tied:
                continue
            raise ValueError(f"{folder}: its weights have no {name}, which config.json asks for")
        if shapes[name] != tuple(tensor.shape):
            raise ValueError(
                f"{folder}: {name} has shape {shapes[name]}, expected {tuple(tensor.shape)} by its config.json"
            )


def _weight_files(folder: Path) -> list[Path]:
    """The files that the index names, or all; ValueError where one is missing."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return sorted(folder.glob("*.safetensors"))
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index}: damaged ({_line(error)})") from None
    for name in names:
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name}: missing, {index.name} names it")
    return [folder / name for name in names]


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
