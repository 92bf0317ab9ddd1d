"""What a model folder is, from its files alone: config.json and the headers of its safetensors, no weights read.

In: a folder. Out: nothing, or a ValueError with the file, what was found, what is expected and what to do, before
anything is started or loaded.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shards.fingerprint import refuse_code_and_pickles

MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library itself
QUANTISED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
QUANTISED_KEYS = ("quantization_config", "compression_config", "quantization")
# Weights of these types are not numbers to train: integers, and floats of 8 bits and less. Masks of old models are U8,
# too, and are called bias.
SMALL_TYPES = re.compile(r"[IU][248]|F(4|6_|8_).*")
PACKED_TYPES = re.compile(r"[IU](16|32)")
# What libraries call packed weights and their scales
QUANTISED_NAMES = re.compile(
    r"(^|[._])(qweight|qzeros|g_idx|weight_packed|weight_scale(_inv|_2)?|weight_zero_point|input_scale|SCB|absmax|"
    r"quant_map|quant_state.*|codebooks?|W_q|_data|gate_up_proj_blocks|down_proj_blocks)$"
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
ADAPTER_NAMES = re.compile(
    r"(^|\.)(lora_(A|B|magnitude_vector|embedding_[AB])|ia3_l|hada_w1_a|lokr_w1|prompt_embeddings)\b"
)
OTHER_HEADS = ("score.", "classifier.", "reward_head.", "regression_head.", "qa_outputs.", "classification_head.")
LANGUAGE_HEADS = ("CausalLM", "LMHead", "ForConditionalGeneration")


def read_config(folder: Path) -> dict[str, Any]:
    """Parsed config.json of a model folder; ValueError where there is none that can be read."""
    file = folder / "config.json"
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: has no config.json; give a Hugging Face model folder") from None
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file}: is a {type(value).__name__}, expected a JSON object")
    return value


def require_language_model(folder: Path) -> None:
    """ValueError unless a folder holds the whole weights of a language model: to score with, to evaluate, to train.

    Refused by name: adapters, encoders, models with an encoder beside the decoder, heads that predict no tokens, and
    what refuse_code_and_pickles refuses.
    """
    if any(folder.glob("*.py")):
        refuse_code_and_pickles(folder)  # before anything else of it is read
    refuse_adapter(folder)
    config = read_config(folder)
    if any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"{next(folder.glob('*.gguf'))}: a GGUF file, which is not read; load it in transformers (gguf_file=) and write "
            "the folder with save_pretrained, or give the folder that it was made from"
        )
    refuse_code_and_pickles(folder)
    refuse_other_heads(folder, config)


def require_base(folder: Path) -> None:
    """ValueError unless a folder is a language model whose weights can train."""
    require_language_model(folder)
    method = quantisation(folder)
    if method:
        raise ValueError(
            f"{folder}: its weights are quantised ({method}), which cannot train here; give the folder of 16 or 32 bit that "
            "it was made from, or write one (in transformers: model.dequantize(), then save_pretrained)"
        )


def refuse_adapter(folder: Path) -> None:
    """ValueError where a folder holds an adapter, in the place of a model's weights or beside them."""
    remedy = (
        "merge it into its model (in peft: merge_and_unload(), then save_pretrained) and give that folder, without the "
        "adapter's files"
    )
    for name in ADAPTER_FILES:
        if (folder / name).exists():
            raise ValueError(f"{folder / name}: an adapter (LoRA or the like), expected whole weights; {remedy}")
    for file, name, _ in tensors(folder):
        if ADAPTER_NAMES.search(name):
            raise ValueError(f"{file}: {name} is of an adapter (LoRA or the like), expected whole weights; {remedy}")


def refuse_other_heads(folder: Path, config: dict[str, Any]) -> None:
    """ValueError where config.json or the tensors are those of something else than a causal language model."""
    file = folder / "config.json"
    names = [str(name) for name in config.get("architectures") or []]
    expected = "expected a causal language model (architectures with ForCausalLM)"
    if config.get("is_encoder_decoder"):
        raise ValueError(
            f"{file}: {_of(names, config)} has an encoder beside its decoder (is_encoder_decoder), {expected}; "
            "give a model that reads its text from left to right alone"
        )
    for name in names:
        if not any(head in name for head in LANGUAGE_HEADS):
            raise ValueError(
                f"{file}: architectures has {name}, {expected}: it has no head that predicts the next token, and would get "
                "a random one; give the language model that it was made from"
            )
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        if part.get("is_causal") is False or part.get("use_bidirectional_attention") in (True, "all"):
            raise ValueError(
                f"{file}: {_of(names, config)} attends in both directions (is_causal or use_bidirectional_attention), "
                f"{expected}; an embedding model predicts no next token"
            )
    found = [(file, name) for file, name, _ in tensors(folder)]
    if not any("lm_head" in name or "embed_out" in name or name == "output.weight" for _, name in found):
        for weights, name in found:
            if name.startswith(OTHER_HEADS):
                raise ValueError(
                    f"{weights}: {name} is of a head that predicts no tokens (a reward model or classifier), and there is no "
                    "lm_head; give the language model that it was made from"
                )


def _of(names: list[str], config: dict[str, Any]) -> str:
    return names[0] if names else f"model_type {config.get('model_type')}"


def quantisation(folder: Path) -> str | None:
    """How the weights of a folder are quantised, in a few words with the place that says so; None: they are not."""
    config = read_config(folder)
    for path, value in _settings(config):
        if path.rsplit(".", 1)[-1] in QUANTISED_KEYS and isinstance(value, dict) and value:
            return f"{_method(value)}, {path} of config.json"
    for name in QUANTISED_FILES:
        if (folder / name).exists():
            return name
    for file, name, dtype in tensors(folder):
        if QUANTISED_NAMES.search(name) or _is_small(name, dtype):
            return f"{name} of type {dtype} in {file.name}"
    return None


def _is_small(name: str, dtype: str) -> bool:
    if SMALL_TYPES.fullmatch(dtype):
        return not name.endswith("bias")
    return bool(PACKED_TYPES.fullmatch(dtype)) and name.endswith("weight")


def _method(value: dict[str, Any]) -> str:
    method = str(value.get("quant_method") or value.get("quant_algo") or value.get("format") or "method not named")
    bits = value.get("bits") or value.get("w_bit")
    if method == "bitsandbytes" or value.get("load_in_4bit") or value.get("load_in_8bit"):
        method, bits = "bitsandbytes", 8 if value.get("load_in_8bit") else 4
    return f"{method}, {bits} bit" if bits else method


def _settings(config: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    """Every setting of a parsed config.json with its dotted path, those of nested configs too."""
    for key, value in config.items():
        yield f"{above}{key}", value
        if isinstance(value, dict):
            yield from _settings(value, f"{above}{key}.")


def tensors(folder: Path) -> Iterator[tuple[Path, str, str]]:
    """File, name and dtype, as safetensors spells it, of every tensor in a folder; ValueError for a damaged header."""
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with open(file, "rb") as data:
                length = int.from_bytes(data.read(8), "little")
                if length > MAX_HEADER_BYTES:
                    raise ValueError(f"a header of {length} bytes")
                header = json.loads(data.read(length))
            yield from ((file, name, str(entry["dtype"])) for name, entry in header.items() if name != "__metadata__")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{file}: not a safetensors file, or damaged ({error}); copy it again") from None


def max_positions(config: dict[str, Any]) -> int | None:
    """Tokens of the longest sequence that a model takes, by its parsed config.json; None: no bound is known.

    YaRN reaches factor times the original length, also where max_position_embeddings was left as it was.
    """
    text = config.get("text_config")
    if "max_position_embeddings" not in config and isinstance(text, dict):
        return max_positions(text)
    bound = config.get("max_position_embeddings")
    if not isinstance(bound, int):
        return None
    for rope in rope_settings(config):
        factor = rope.get("factor")
        original = rope.get("original_max_position_embeddings") or bound
        if "yarn" in str(rope.get("rope_type") or rope.get("type")) and factor:
            bound = max(bound, int(factor * original))
    return bound


def rope_settings(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The scalings of rotary positions in a parsed config.json: one, or one for each type of layer."""
    value = config.get("rope_parameters") or config.get("rope_scaling")
    if not isinstance(value, dict):
        return []
    nested = [entry for entry in value.values() if isinstance(entry, dict)]
    return nested or [value]


def require_one_scaling(config: dict[str, Any], seq_len: int, model: str) -> None:
    """ValueError where rows of seq_len tokens would get other positions by their neighbours' lengths.

    LongRoPE has factors for short and for long sequences. transformers chooses by the longest one of a batch, vLLM by the
    room that it was given, so that only rows up to the original length get the same ones everywhere.
    """
    for rope in rope_settings(config):
        original = config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings")
        kind = str(rope.get("rope_type") or rope.get("type"))
        if kind in ("longrope", "su") and isinstance(original, int) and seq_len > original:
            raise ValueError(
                f"{model}: rows of {seq_len} tokens, expected at most {original}, the original_max_position_embeddings of "
                "its longrope: beyond it positions would depend on the longest row or document of a batch; pack again with "
                f"--seq-len {original} or less"
            )
