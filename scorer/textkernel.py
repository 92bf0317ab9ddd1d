"""What a worker process of vLLM loads by name (worker_extension_cls) to read the language model of a wrapper alone.

Importing it changes vLLM's loader in this process, so import it nowhere else.
"""

from typing import Any

from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from scorer.kernel import LogprobKernel
from scorer.textonly import WRAPPER, text_tensors

_read = DefaultModelLoader.get_all_weights


def _get_all_weights(self: Any, model_config: Any, model: Any) -> Any:
    tensors = _read(self, model_config, model)
    return text_tensors(tensors) if hasattr(model_config.hf_config, WRAPPER) else tensors


DefaultModelLoader.get_all_weights = _get_all_weights  # type: ignore[method-assign]


class TextKernel(LogprobKernel):
    """The kernel of every engine."""
