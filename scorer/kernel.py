"""What of this project runs inside vLLM's workers, which load `LogprobKernel` by name (vLLM's worker_extension_cls).

vLLM has two model runners: V1, which CPUs have, and V2, which GPUs have from 0.25 on. Each makes the log-probs of a
prompt's tokens with other code of its own; here `token_scores` (scorer/logits.py) takes its place in both.

T = tokens, V = vocabulary, W = numbers that are kept of each token.
"""

import os
import sys
from typing import Any

from scorer.cpu_head import use_cpu_head
from scorer.logits import Kept, entropies, token_scores

FLOAT16_IN_FLOAT32 = "REMIT_FLOAT16_IN_FLOAT32"  # set for CPU engines in float16: see multiply_float16_in_float32


def multiply_float16_in_float32() -> bool:
    """Have a CPU engine's linear layers multiply float16 in float32, and round their results; False where nothing changes.

    That is what units for float16 do. A CPU that has none takes thirty times as long in oneDNN's own way.
    """
    import torch
    from vllm import _custom_ops

    ops: Any = _custom_ops

    if _has_float16_units() or not (hasattr(ops, "create_onednn_mm") and hasattr(ops, "onednn_mm")):
        return False
    if ops.onednn_mm.__module__ == __name__:
        return True  # done already
    create, multiply = ops.create_onednn_mm, ops.onednn_mm

    def create_float32(weight: Any, *rest: Any, **named: Any) -> Any:
        return create(weight.float() if weight.dtype == torch.float16 else weight, *rest, **named)

    def multiply_float32(handler: Any, states: Any, bias: Any) -> Any:
        if states.dtype != torch.float16:
            return multiply(handler, states, bias)
        return multiply(handler, states.float(), None if bias is None else bias.float()).half()

    ops.create_onednn_mm, ops.onednn_mm = create_float32, multiply_float32
    return True


def _has_float16_units() -> bool:
    """Whether this CPU multiplies float16 by itself, as Linux names its features (x86, Arm)."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as file:
            features = {word for line in file if line.startswith(("flags", "Features")) for word in line.split()}
    except OSError:
        return True  # leave all as it is
    return bool(features & {"avx512_fp16", "amx_fp16", "fphp", "asimdhp"})


def _zero(cache: Any) -> None:
    if hasattr(cache, "zero_"):
        cache.zero_()
    elif isinstance(cache, list | tuple):
        for entry in cache:
            _zero(entry)
    elif isinstance(cache, dict):
        _zero(list(cache.values()))


class LogprobKernel:
    """Mixed into vLLM's worker."""

    model_runner: Any

    def zero_kv_cache(self) -> None:
        """Forget all keys and values.

        A block of the cache keeps what its last prompt left there. Attention masks those places, but 0 times NaN is
        NaN: one prompt with a NaN would spoil the next one that gets its blocks.
        """
        _zero(getattr(self.model_runner, "kv_caches", []))

    def head_dtypes(self) -> list[str]:
        """Dtypes that the model's products with its output embedding have."""
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        model = self.model_runner.get_model()
        found = {getattr(part, "head_dtype", None) for part in model.modules() if isinstance(part, LogitsProcessor)}
        default = self.model_runner.model_config.dtype
        return [str(dtype or default).removeprefix("torch.") for dtype in found]

    def use_cpu_head(self) -> None:
        """Take the project's own product with the output embedding (scorer/cpu_head.py)."""
        use_cpu_head()

    def keep_scores(self, kept: Kept, block_entries: int) -> str | None:
        """Have the runner keep of each token of a prompt what `kept` says, with kept.width - 1 as its prompt_logprobs.

        Which of vLLM's runners it is: "V1" or "V2"; "none" where this vLLM has other functions by now, None where this
        worker computes no logits (a stage of a pipeline that is not its last).
        """
        runner = self.model_runner
        if not getattr(runner, "is_last_pp_rank", True):
            return None
        worker = getattr(runner, "prompt_logprobs_worker", None)
        if worker is not None:
            return "V2" if replace_in_v2(sys.modules[type(worker).__module__], kept, block_entries) else "none"
        return "V1" if replace_in_v1(getattr(runner, "sampler", None), kept, block_entries) else "none"


def replace_in_v1(sampler: Any, kept: Kept, block_entries: int) -> bool:
    """Put `token_scores` in the place of two functions of V1's sampler; False where it has not got them."""
    if not all(hasattr(sampler, name) for name in ("compute_logprobs", "gather_logprobs")):
        return False
    compute, gather = sampler.compute_logprobs, sampler.gather_logprobs

    def gather_scores(logits_TV: Any, num_logprobs: int, token_ids_T: Any, *rest: Any, **named: Any) -> Any:
        if num_logprobs != kept.width - 1 or rest or named:
            return gather(compute(logits_TV), num_logprobs, token_ids_T, *rest, **named)
        return _as_tensors(*token_scores(logits_TV, token_ids_T, kept, block_entries))

    sampler.compute_logprobs = lambda logits_TV, *rest, **named: logits_TV
    sampler.gather_logprobs = gather_scores
    return True


def replace_in_v2(module: Any, kept: Kept, block_entries: int) -> bool:
    """Put `token_scores` in the place of the function that V2 calls for each chunk of a prompt's logits, in the module of
    its prompt log-probs; False where it has not got it.

    V2's own ranks every token, and leaves open which of equal tokens are among the most probable. Without these its kernel
    for log-probs is called, which reads the logits twice and writes one number a token.
    """
    import torch

    original, own_logprobs = (
        getattr(module, "compute_topk_scores", None),
        getattr(module, "compute_token_logprobs", None),
    )
    if original is None or own_logprobs is None:
        return False

    def chunk_scores(logits_TV: Any, num_logprobs: int, token_ids_T: Any, *rest: Any, **named: Any) -> Any:
        if num_logprobs != kept.width - 1 or rest or any(named.values()):
            return original(logits_TV, num_logprobs, token_ids_T, *rest, **named)
        if kept.top_k or kept.sample_k:
            plain = Kept(kept.top_k, (), kept.sample_k)
            ids_TW, values_TW = token_scores(logits_TV, token_ids_T, plain, block_entries)
        else:
            ids_TW, values_TW = token_ids_T[:, None].int(), own_logprobs(logits_TV, token_ids_T[:, None])
        if kept.temperatures:
            entropies_TE = _entropies_of_logits(logits_TV, kept.temperatures)
            ids_TW = torch.nn.functional.pad(ids_TW, (0, kept.num_entropies))
            values_TW = torch.cat([values_TW, entropies_TE], dim=-1)
        return _as_tensors(ids_TW, values_TW)

    module.compute_topk_scores = chunk_scores
    return True


def keep_arrays() -> None:
    """Have vLLM, in this process, hand on the tensors of a prompt's log-probs as they come from the workers.

    Its own way makes Python numbers of them, in the thread that steps the engine: 0.2 microseconds and 30 bytes each.
    """
    from vllm.v1.engine.logprobs import LogprobsProcessor

    def keep(self: Any, tensors: Any) -> None:
        self.prompt_logprobs = tensors

    if not hasattr(LogprobsProcessor, "_update_prompt_logprobs"):
        raise ValueError(
            "this vLLM collects the log-probs of a prompt in another place than 0.32; install release 0.32"
        )
    LogprobsProcessor._update_prompt_logprobs = keep  # type: ignore[assignment, method-assign]


def _entropies_of_logits(logits_TV: Any, temperatures: tuple[float, ...]) -> Any:
    import torch

    if logits_TV.is_cuda:
        from scorer.gpu_entropies import gpu_entropies

        return gpu_entropies(logits_TV, temperatures)
    return entropies(logits_TV.log_softmax(-1, dtype=torch.float32), temperatures)


def _as_tensors(ids_TW: Any, values_TW: Any) -> Any:
    """As vLLM hands them on; no rank is computed."""
    import torch
    from vllm.v1.outputs import LogprobsTensors

    return LogprobsTensors(ids_TW, values_TW, torch.zeros(len(ids_TW), dtype=torch.int64, device=ids_TW.device))


if os.environ.get(FLOAT16_IN_FLOAT32):  # a worker process loads this module before its model, and has no later chance
    multiply_float16_in_float32()
