"""The product of states and output embedding to float32 logits, on a CPU.

vLLM casts the whole embedding to float32 at each step, multiplies in float32, and has the logits in memory that is new each
time. Here a block of the embedding is cast at a time, the logits come to one place in memory, and bfloat16 is multiplied as
bfloat16 with float32 sums where the CPU can: numbers of 8 bits have products that float32 holds exactly, so nothing is lost.

T = tokens, H = hidden size, V = vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

BLOCK_ENTRIES = 1 << 20  # of the embedding that are float32 at once: they stay in a core's cache


class CpuHead:
    """Logits float32 [T, V] of states [T, H], valid until the next call: what reads them has done so by then."""

    def __init__(self) -> None:
        self._memory: Any = None

    def __call__(self, states_TH: Any, weight_VH: Any, bias_V: Any = None) -> Any:
        import torch

        (tokens, hidden), vocabulary = states_TH.shape, len(weight_VH)
        if self._memory is None or len(self._memory) < tokens * vocabulary:
            self._memory = torch.empty(tokens * vocabulary, dtype=torch.float32)
        logits_TV = self._memory[: tokens * vocabulary].view(tokens, vocabulary)
        wide_TH, rows = states_TH.float(), max(1, BLOCK_ENTRIES // hidden)
        with _products(weight_VH.dtype):
            for start in range(0, vocabulary, rows):
                place = slice(start, start + rows)
                torch.mm(wide_TH, weight_VH[place].float().t(), out=logits_TV[:, place])
        return logits_TV if bias_V is None else logits_TV.add_(bias_V.float())


@contextmanager
def _products(dtype: Any) -> Iterator[None]:
    """In the block, float32 operands are multiplied as bfloat16 where they come from it."""
    import torch

    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    try:
        if dtype == torch.bfloat16:
            settings.fp32_precision = "bf16"
        yield
    finally:
        settings.fp32_precision = before


def use_cpu_head() -> None:
    """Have vLLM's models in this process multiply by `CpuHead` where logits are float32 and weights are not."""
    import torch
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.logits_processor import LogitsProcessor
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    own: Any = LogitsProcessor._apply_head
    head = CpuHead()

    def apply_head(self: Any, lm_head: Any, hidden_states: Any, embedding_bias: Any) -> Any:
        plain = isinstance(lm_head.quant_method, UnquantizedEmbeddingMethod | UnquantizedLinearMethod)
        narrow = hidden_states.dtype in (torch.bfloat16, torch.float16) and hidden_states.dtype == lm_head.weight.dtype
        if not (plain and narrow and hidden_states.ndim == 2 and self.head_dtype == torch.float32):
            return own(self, lm_head, hidden_states, embedding_bias)
        return head(hidden_states, lm_head.weight, embedding_bias)

    LogitsProcessor._apply_head = apply_head  # type: ignore[method-assign]
