"""Log-probs of a prompt's tokens without the [tokens, vocabulary] passes that vLLM's own path makes.

vLLM computes a float32 log-softmax of all logits of a chunk, then ranks each token against the whole vocabulary.
Of both, one number a token is needed, or 1 + K of them. Here the logits go through the log-softmax in blocks that
stay in a core's cache, and no rank is computed. Worker processes load this class by name (vLLM's
worker_extension_cls).

T = tokens, V = vocabulary, K = most probable tokens that are asked for, 0 or more.
"""

import os
from typing import Any

FLOAT16_IN_FLOAT32 = "REMIT_FLOAT16_IN_FLOAT32"  # set for CPU engines in float16: see multiply_float16_in_float32


def token_logprobs(logits_TV: Any, token_ids_T: Any, top_k: int, block_entries: int) -> tuple[Any, Any]:
    """Ids, int32, and log softmax(logits)[ids], float32, both [T, 1 + K]: the token itself, then the K best.

    At most block_entries logits at a time are turned into log-probs.
    """
    import torch

    tokens, vocabulary = logits_TV.shape
    rows = max(1, block_entries // vocabulary)
    ids_TW = torch.empty(tokens, 1 + top_k, dtype=torch.int32, device=logits_TV.device)
    logprobs_TW = torch.empty(tokens, 1 + top_k, dtype=torch.float32, device=logits_TV.device)
    ids_TW[:, 0] = token_ids_T
    for start in range(0, tokens, rows):
        place = slice(start, start + rows)
        block_TV = logits_TV[place].log_softmax(dim=-1, dtype=torch.float32)
        logprobs_TW[place, :1] = block_TV.gather(-1, token_ids_T[place, None])
        if top_k:
            ids_TW[place, 1:], logprobs_TW[place, 1:] = most_probable(block_TV, top_k)
    return ids_TW, logprobs_TW


def most_probable(logprobs_TV: Any, top_k: int) -> tuple[Any, Any]:
    """Ids, int64, and log-probs, float32, both [T, K], by descending log-prob, the lower id first where two are equal.

    16-bit logits have many equal values. torch.topk leaves open which of those at the K-th place it takes, and that
    differs between devices and releases; here the lowest ids are taken.
    """
    import torch

    values_TK, ids_TK = logprobs_TV.topk(top_k, dim=-1)
    last_T1 = values_TK[:, -1:]
    equal_TV = logprobs_TV == last_T1
    above_T = (values_TK > last_T1).sum(-1)  # the places of an entry that are not open
    row, token = equal_TV.nonzero(as_tuple=True)  # rows ascending, and ids in each
    counts_T = equal_TV.sum(-1)
    first_T = counts_T.cumsum(0) - counts_T
    place = above_T[row] + torch.arange(len(row), device=row.device) - first_T[row]
    taken = place < top_k
    ids_TK[row[taken], place[taken]] = token[taken]
    ids_TK = ids_TK.sort(dim=-1).values
    ordered = logprobs_TV.gather(-1, ids_TK).sort(dim=-1, descending=True, stable=True)
    return ids_TK.gather(-1, ordered.indices), ordered.values


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

    def use_remit_kernel(self, block_entries: int) -> bool:
        """Put `token_logprobs` in the place of the sampler's two functions; False where vLLM has others by now."""
        import torch
        from vllm.v1.outputs import LogprobsTensors

        sampler: Any = getattr(self.model_runner, "sampler", None)
        if not all(hasattr(sampler, name) for name in ("compute_logprobs", "gather_logprobs")):
            return False
        original = sampler.gather_logprobs, sampler.compute_logprobs

        def gather(logits_TV: Any, num_logprobs: int, token_ids_T: Any, *rest: Any, **named: Any) -> Any:
            if num_logprobs < 0 or rest or named:
                return original[0](original[1](logits_TV), num_logprobs, token_ids_T, *rest, **named)
            ids_TW, logprobs_TW = token_logprobs(logits_TV, token_ids_T, num_logprobs, block_entries)
            ranks_T = torch.zeros(len(token_ids_T), dtype=torch.int64, device=logits_TV.device)
            return LogprobsTensors(ids_TW, logprobs_TW, ranks_T)

        sampler.compute_logprobs = lambda logits_TV, *rest, **named: logits_TV
        sampler.gather_logprobs = gather
        return True


if os.environ.get(FLOAT16_IN_FLOAT32):  # a worker process loads this module before its model, and has no later chance
    multiply_float16_in_float32()
