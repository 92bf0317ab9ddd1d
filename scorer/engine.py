"""A vLLM engine that returns the log-prob of every prompt token.

In: token ids. Out: float32 log-probs, one fewer than the tokens of each prompt: nothing precedes the first.
Import this only in a process of its own: vLLM's Transformers backend patches the transformers classes.
"""

import math
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

# An engine's prompt log-probs hold [scheduled tokens, vocabulary] logits in 16 or 32 bit plus float32 log-probs,
# which vLLM's own memory profiling does not see: their size is bounded here instead.
LOGITS_BUDGET_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
MAX_BATCHED_TOKENS = 8192
POSITIVE_TOLERANCE = 1e-4  # log-softmax rounding may give a positive log-prob this small for a certain token


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to know. dtype is resolved (float32, bfloat16, float16), never auto."""

    model: Path
    dtype: str
    seq_len: int
    vocab_size: int
    tensor_parallel_size: int = 1
    device: str = "cpu"
    max_num_batched_tokens: int | None = None


def batched_tokens(config: EngineConfig) -> int:
    """Tokens per engine step, so that their logits stay within the budget of the device."""
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    fit = LOGITS_BUDGET_BYTES[config.device] // (8 * config.vocab_size)
    return max(256, min(MAX_BATCHED_TOKENS, 2 ** int(math.log2(max(fit, 1)))))


def environment(config: EngineConfig, model_config: dict, cores: list[int]) -> dict[str, str]:
    """Environment variables of an engine's process; they must be set before vLLM is imported.

    model_config: the parsed config.json; cores: the CPU cores that are this engine's alone.
    """
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the actor is the engine's own process already
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for rows of exactly max_position_embeddings tokens, see Engine
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
    }
    if config.device == "cpu":
        ranks = np.array_split(cores, config.tensor_parallel_size)
        values["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, rank)) for rank in ranks)
        values["OMP_NUM_THREADS"] = str(len(ranks[0]))
        values["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_cache_gib(config, model_config))
        if "kv_lora_rank" in model_config:
            values["VLLM_MLA_DISABLE"] = "1"  # the CPU kernels of multi-head latent attention lack most head sizes
    return values


def _kv_cache_gib(config: EngineConfig, model_config: dict) -> int:
    """Enough for two engine steps or two rows, with an upper bound for the bytes of a token."""
    heads = model_config.get("num_attention_heads") or 32
    head_dim = model_config.get("head_dim") or (model_config.get("hidden_size") or 4096) // heads
    layers = model_config.get("num_hidden_layers") or 32
    bytes_per_token = 2 * layers * heads * max(head_dim, 64) * 4
    tokens = 2 * max(config.seq_len + 1, batched_tokens(config))
    return max(1, math.ceil(bytes_per_token * tokens / 2**30))


class Engine:
    """A running vLLM engine for one model."""

    def __init__(self, config: EngineConfig) -> None:
        import vllm

        self.version = vllm.__version__
        self._params = vllm.SamplingParams(
            prompt_logprobs=0, flat_logprobs=True, max_tokens=1, temperature=0, detokenize=False
        )
        # vLLM wants room for one generated token after the prompt. That position is sampled but never computed,
        # so a row as long as the model's limit is fine although max_model_len lies one above it.
        llm: Any = vllm.LLM(
            model=str(config.model),
            dtype=config.dtype,  # type: ignore[arg-type]
            max_model_len=config.seq_len + 1,
            max_num_batched_tokens=batched_tokens(config),
            tensor_parallel_size=config.tensor_parallel_size,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # with it, prompt log-probs depend on the order of the requests
            trust_remote_code=False,
            load_format="safetensors",
            seed=0,
            gpu_memory_utilization=0.8,
            enforce_eager=config.device == "cpu",  # compiling takes 10-20 s there and gains 3 %
            distributed_executor_backend="mp" if config.tensor_parallel_size > 1 else None,
        )
        self._engine = llm.llm_engine
        self._llm = llm

    def logprobs(self, prompts: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Score prompts, int [tokens] of at least two tokens each.

        Yields (index of the prompt, float32 [tokens - 1]) as they finish. Raises ValueError where the engine
        answers for other tokens than asked, or with a number that is no log-prob.
        """
        asked: dict[str, np.ndarray] = {}
        for index, prompt in enumerate(prompts):
            asked[str(index)] = prompt
            self._engine.add_request(str(index), {"prompt_token_ids": prompt.tolist()}, self._params)
        while asked:
            for output in self._engine.step():
                if not output.finished:
                    continue
                prompt = asked.pop(output.request_id)
                flat = output.prompt_logprobs  # positions of rank 0 only: the prompt's own tokens, from the second on
                if not np.array_equal(np.fromiter(flat.token_ids, np.int64), prompt[1:]):
                    raise ValueError(f"the engine answered for other tokens than those of prompt {output.request_id}")
                yield int(output.request_id), check_logprobs(np.fromiter(flat.logprobs, np.float32))


def check_logprobs(logprobs: np.ndarray) -> np.ndarray:
    """The same values, at most 0; ValueError for what no log-prob can be."""
    if not np.all(np.isfinite(logprobs)) or np.any(logprobs > POSITIVE_TOLERANCE):
        bad = logprobs[~(np.isfinite(logprobs) & (logprobs <= POSITIVE_TOLERANCE))]
        raise ValueError(
            f"the engine returned {bad[0]} as a log-prob ({len(bad)} of {len(logprobs)} values), expected a finite "
            "number of at most 0; check the model's weights, or try --dtype float32"
        )
    return np.minimum(logprobs, 0)


def round_logprobs(logprobs: np.ndarray, step: float) -> np.ndarray:
    """Round to the nearest multiple of `step` (0: leave exact); -0.0 becomes 0.0."""
    if not step:
        return logprobs + np.float32(0)
    return (np.rint(logprobs.astype(np.float64) / step) * step + 0.0).astype(np.float32)
