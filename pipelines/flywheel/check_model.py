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
    check_tokenizer(folder, start)
    check_finite(folder)
    rows = check_names(folder, start)
    lost = embedding_rows(start)
    if rows < lost:  # tokens of the corpus would have none; more, as padding, may be
        raise ValueError(
            f"{folder}: its embedding has {rows} rows, expected at least the {lost} of the model that it was made of"
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


def check_names(folder: Path, start: Path) -> int:
    """ValueError unless the weights are those that config.json describes, by name and shape; returns the embedding's rows.

    What `start` lacks or has in excess as well is left alone: some files hold parts that the class does not load.
    """
    model, report = load_on_meta(folder)
    if any(report.values()):
        _, before = load_on_meta(start)
        report = {kind: sorted(set(found) - set(before[kind])) for kind, found in report.items()}
    for name in report["missing_keys"]:
        raise ValueError(f"{folder}: its weights have no {name}, which config.json asks for")
    for name, has, wants in report["mismatched_keys"]:
        raise ValueError(f"{folder}: {name} has shape {tuple(has)}, expected {tuple(wants)} by its config.json")
    for name in report["unexpected_keys"]:
        more = len(report["unexpected_keys"]) - 1
        raise ValueError(
            f"{folder}: its weights hold {name}{f' and {more} more tensors' if more else ''}, expected only what config.json "
            "describes; save the config.json that belongs to the weights"
        )
    return model.get_input_embeddings().weight.shape[0]


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
        raise ValueError(f"{folder}: transformers cannot make a model of it ({_line(error)})") from None
    return loaded


def embedding_rows(folder: Path) -> int:
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    return config.get_text_config().vocab_size


def check_finite(folder: Path) -> None:
    """ValueError unless all weights are finite, and no file of weights is left unread."""
    import torch
    from safetensors import SafetensorError, safe_open

    index = folder / "model.safetensors.index.json"
    read = {"model.safetensors"}
    if index.exists():
        try:
            read = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{index}: damaged ({_line(error)})") from None
    others = sorted(file.name for file in folder.glob("*.safetensors") if file.name not in read)
    if others:  # of model.safetensors and shards transformers takes the one, and other readers the others
        raise ValueError(
            f"{folder}: has {', '.join(others[:5])}, expected no weights beside {min(read, default=index.name)}; write only one of them"
        )
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a mapping
                    tensor = tensors.get_tensor(name)
                    if tensor.is_floating_point() and not torch.isfinite(tensor.float()).all():
                        raise ValueError(f"{file}: {name} has values that are not finite; the training has diverged")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({_line(error)}); it is damaged or cut off") from None


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
