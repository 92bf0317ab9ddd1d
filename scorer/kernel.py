"""Log-probs of a prompt's tokens without the [tokens, vocabulary] passes that vLLM's own path makes.

vLLM computes a float32 log-softmax of all logits of a chunk, then ranks each token against the whole vocabulary.
Of both, one number a token is needed. Here the logits go through the log-softmax in blocks that stay in a core's
cache, and no rank is computed. Worker processes load this class by name (vLLM's worker_extension_cls).
"""

from typing import Any


def token_logprobs(logits_TV: Any, token_ids_T: Any, block_entries: int) -> Any:
    """log softmax(logits)[token], float32 [T, 1]: T tokens, V vocabulary, at most block_entries logits at a time."""
    import torch

    tokens, vocabulary = logits_TV.shape
    rows = max(1, block_entries // vocabulary)
    logprobs_T1 = torch.empty(tokens, 1, dtype=torch.float32, device=logits_TV.device)
    for start in range(0, tokens, rows):
        block = logits_TV[start : start + rows].log_softmax(dim=-1, dtype=torch.float32)
        logprobs_T1[start : start + rows] = block.gather(-1, token_ids_T[start : start + rows, None])
    return logprobs_T1


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

    def use_remit_kernel(self, block_entries: int) -> bool:
        """Put `token_logprobs` in the place of the sampler's two functions; False where vLLM has others by now."""
        import torch
        from vllm.v1.outputs import LogprobsTensors

        sampler: Any = getattr(self.model_runner, "sampler", None)
        if not all(hasattr(sampler, name) for name in ("compute_logprobs", "gather_logprobs")):
            return False
        original = sampler.gather_logprobs, sampler.compute_logprobs

        def gather(logits_TV: Any, num_logprobs: int, token_ids_T: Any, *rest: Any, **named: Any) -> Any:
            if num_logprobs or rest or named:
                return original[0](original[1](logits_TV), num_logprobs, token_ids_T, *rest, **named)
            logprobs_T1 = token_logprobs(logits_TV, token_ids_T, block_entries)
            ranks_T = torch.zeros(len(token_ids_T), dtype=torch.int64, device=logits_TV.device)
            return LogprobsTensors(token_ids_T[:, None].to(torch.int32), logprobs_T1, ranks_T)

        sampler.compute_logprobs = lambda logits_TV, *rest, **named: logits_TV
        sampler.gather_logprobs = gather
        return True
