"""What --base and --reference of remit plan name: a folder, a model of the hub, or a shape that needs neither."""

from pathlib import Path
from typing import Any

from pipelines.models import resolve_model

PRESETS: dict[str, dict[str, Any]] = {
    "olmo2-1b": {
        "model_type": "olmo2", "vocab_size": 100_352, "hidden_size": 2048, "intermediate_size": 8192,
        "num_hidden_layers": 16, "num_attention_heads": 16, "max_position_embeddings": 4096,
    },
    "olmo2-7b": {
        "model_type": "olmo2", "vocab_size": 100_352, "hidden_size": 4096, "intermediate_size": 11_008,
        "num_hidden_layers": 32, "num_attention_heads": 32, "max_position_embeddings": 4096,
    },
    "llama3-8b": {
        "model_type": "llama", "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131_072,
    },
}  # fmt: skip


def find_model(option: str, model: str) -> tuple[Path | dict[str, Any], str]:
    """Folder, or settings of a preset, and the model's name; ValueError as of resolve_model. Light to import."""
    if model in PRESETS and not Path(model).exists():
        return PRESETS[model], model
    try:
        found = resolve_model(option, model, weights=False)
    except ValueError as error:
        raise ValueError(f"{error}; or one of {', '.join(PRESETS)}") from None
    return found.path, found.name


def read_config(option: str, folder: Path | dict[str, Any]) -> Any:
    """transformers' config of a folder, or of the settings of a preset.

    ValueError where a folder has none that transformers can build without remote code.
    """
    from transformers import AutoConfig

    from trainer.model_shape import first_line

    if isinstance(folder, dict):
        return AutoConfig.for_model(**folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{option} {folder}: has no config.json, expected a Hugging Face model folder, NAME or NAME@REVISION of the hub, "
            f"or one of {', '.join(PRESETS)}"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        raise ValueError(f"{option} {folder}: its config.json cannot be used ({first_line(error)})") from None
