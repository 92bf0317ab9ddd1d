"""Is a folder a model that the next stage can read? Asked before a post-trained model is recorded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipelines.terminal import quiet_libraries
from shards.fingerprint import parse_tokenizer_json
from shards.modelfolder import require_language_model
from shards.tokens import disagreement, ordinary_ids


def check_model(folder: Path, inputs: Mapping[str, Path]) -> None:
    """ValueError unless `folder` is a Hugging Face model that transformers loads whole, with finite weights.

    inputs: "model" is the one that it was made of, whose tokenizer it must have. Weights are read tensor by tensor.
    """
    start = inputs["model"]
    if not (folder / "config.json").is_file():
        has = ", ".join(sorted(path.name for path in folder.iterdir())[:5])
        raise ValueError(f"{folder}: has no config.json (it has: {has}), expected what save_pretrained writes")
    require_language_model(folder)  # no code, no pickles
    if reason := tokenizer_difference(start, folder):
        raise ValueError(
            f"{folder}: its tokenizer is not that of the model it was made of ({reason}); save the tokenizer of "
            "REMIT_MODEL beside the weights"
        )
    check_names(folder, start)
    check_finite(folder)


def tokenizer_difference(ours: Path, theirs: Path) -> str:
    """How the tokenizers of two folders differ, '' where they do not: the log-probs of other tokens are of no use."""
    from scorer.tokenizer import canonical

    files = [folder / "tokenizer.json" for folder in (ours, theirs)]
    for file in files:
        if not file.is_file():
            raise ValueError(f"{file}: missing, expected the tokenizer beside the weights")
    one, other = (canonical(parse_tokenizer_json(file.read_bytes(), str(file))) for file in files)
    return disagreement(one, other, ordinary_ids(one, other), {})


def check_names(folder: Path, start: Path) -> None:
    """ValueError unless the weights are those that config.json describes, by name and shape, and enough embeddings.

    What `start` lacks or has in excess as well is left alone: some files hold parts that the class does not load.
    """
    (model, report), (first, before) = load_on_meta(folder), load_on_meta(start)
    missing, mismatched, unexpected = (
        sorted(set(report[kind]) - set(before[kind])) for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
    )
    if missing:
        raise ValueError(f"{folder}: its weights have no {missing[0]}, which config.json asks for")
    for name, has, wants in mismatched:
        raise ValueError(f"{folder}: {name} has shape {tuple(has)}, expected {tuple(wants)} by its config.json")
    if unexpected:
        raise ValueError(
            f"{folder}: its weights hold {unexpected[0]} (of {len(unexpected)} such tensors), expected only what config.json "
            "describes; save the config.json that belongs to the weights"
        )
    rows, least = (loaded.get_input_embeddings().weight.shape[0] for loaded in (model, first))
    if rows < least:  # tokens of the corpus would have none; more, as padding, may be
        raise ValueError(
            f"{folder}: its embedding has {rows} rows, expected at least the {least} of the model that it was made of"
        )


def load_on_meta(folder: Path) -> tuple[Any, dict[str, Any]]:
    """The model without its weights, and what transformers has to say about their names and shapes."""
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, local_files_only=True,
            trust_remote_code=False,
        )  # fmt: skip
    except Exception as error:  # transformers and safetensors raise all kinds
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
        raise ValueError(f"{folder}: transformers cannot make a model of it ({line})") from None
    return loaded


def check_finite(folder: Path) -> None:
    """ValueError unless all weights are finite, and no file of weights is left unread."""
    import torch
    from safetensors import safe_open

    index, read = folder / "model.safetensors.index.json", {"model.safetensors"}
    if index.exists():
        read = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    for file in sorted(folder.glob("*.safetensors")):
        if (
            file.name not in read
        ):  # of model.safetensors and shards transformers takes the one, and other readers the others
            raise ValueError(
                f"{folder}: has {file.name}, expected no weights beside {min(read)}; write only one of them"
            )
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 - not a mapping
                tensor = tensors.get_tensor(name)
                if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                    raise ValueError(f"{file}: {name} has values that are not finite; the training has diverged")
