"""Turn a --model or --tokenizer option into a local folder: a path as it is, a hub id through the hub's cache."""

from dataclasses import dataclass
from pathlib import Path

PATTERNS = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


@dataclass(frozen=True)
class LocalModel:
    """path: folder on this machine; name: hub id or folder name; revision: commit of the hub, else None."""

    path: Path
    name: str
    revision: str | None


def resolve_model(option: str, model: str, weights: bool = True) -> LocalModel:
    """Folder for `model`; ValueError where it is neither a folder nor an id that the hub answers for.

    option: its name on the command line, for the message. weights: False fetches only config and tokenizer.
    Python files and pickled weights are never fetched.
    """
    path = Path(model)
    if path.is_dir():
        return LocalModel(path, path.resolve().name, None)
    if path.suffix.lower() == ".gguf" and path.exists():
        raise ValueError(
            f"{option} {model}: a GGUF file, which is not read, expected a Hugging Face model folder; load it in transformers "
            "(gguf_file=) and write the folder with save_pretrained, or give the one that it was made from"
        )
    if path.exists():
        raise ValueError(f"{option} {model}: is a file, expected a Hugging Face model folder or a hub id")
    if model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise ValueError(f"{option} {model}: no such folder; expected a Hugging Face model folder or a hub id")
    from huggingface_hub import snapshot_download

    patterns = [pattern for pattern in PATTERNS if weights or pattern != "*.safetensors"]
    try:
        local = Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise ValueError(
            f"{option} {model}: neither a folder nor a model that the Hugging Face hub answers for ({reason})"
        ) from None
    return LocalModel(local, model, local.name)
