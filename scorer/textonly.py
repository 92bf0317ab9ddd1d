"""The language model inside a multimodal wrapper, for an engine that reads text alone.

In: the config of a wrapper such as Gemma3ForConditionalGeneration, and its tensors. Out: the config of the causal
language model in it, and that model's tensors under the names that its own class gives them. vLLM then needs neither
image processors nor the libraries that these want, and holds no vision weights.
scorer/textkernel.py has vLLM read a folder so.
"""

from collections.abc import Iterable, Iterator
from typing import Any

WRAPPER = "remit_wrapper"  # attribute of a config that `text_config_of` has made: the class of the wrapper
# Where wrappers keep the body of their language model, in files of transformers 4 and 5, and its head
BODIES = ("model.language_model.model.", "language_model.model.", "model.language_model.", "model.text_model.")
HEADS = ("model.language_model.lm_head.", "language_model.lm_head.", "lm_head.")


def is_wrapper(config: Any) -> bool:
    """Whether a transformers config holds that of a language model in it, beside those of other inputs."""
    return config.get_text_config(decoder=True) is not config


def text_architecture(config: Any) -> str | None:
    """Name of the causal language model that transformers has for the text config of a wrapper; None: it has none."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get_text_config(decoder=True).model_type)
    return name if name is None or "ForConditionalGeneration" not in name else None


def text_config_of(config: Any) -> Any:
    """The config of the language model in a wrapper, with what the wrapper alone says of dtype, tying and quantisation."""
    text = config.get_text_config(decoder=True)
    text.architectures = [text_architecture(config)]
    setattr(text, WRAPPER, (config.architectures or [type(config).__name__])[0])
    for name in ("dtype", "tie_word_embeddings", "quantization_config"):
        value = config.to_dict().get(name)
        if value is not None:
            setattr(text, name, getattr(config, name))
    return text


def text_tensors(tensors: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Tensors of the language model among those of a wrapper, by the names of its own class."""
    for name, tensor in tensors:
        head = next((prefix for prefix in HEADS if name.startswith(prefix)), None)
        body = next((prefix for prefix in BODIES if name.startswith(prefix)), None)
        if head is not None:  # first: what a body begins with, a head may begin with too
            yield f"lm_head.{name.removeprefix(head)}", tensor
        elif body is not None:
            yield f"model.{name.removeprefix(body)}", tensor
