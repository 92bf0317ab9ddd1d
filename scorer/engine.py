"""A vLLM engine that returns the log-prob of every prompt token.

In: token ids. Out: float32 log-probs, one fewer than the tokens of each prompt: nothing precedes the first. With
top_k also the ids and log-probs of the top_k tokens that the model holds most probable at each of these places, and with
temperatures the entropy of its whole distribution there.
Import this only in a process of its own: vLLM's Transformers backend patches the transformers classes.
"""

import math
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from scorer.kernel import FLOAT16_IN_FLOAT32, keep_arrays, multiply_float16_in_float32
from scorer.logits import Kept
from scorer.once_per_node import user_folder
from scorer.overrides import engine_config

# The logits of a prompt's chunk, [tokens of the chunk, vocabulary], are not seen by vLLM's own memory profiling:
# their size is bounded here, by a share of the device's memory.
LOGITS_SHARE = {"cpu": 1 / 16, "cuda": 1 / 16}
LOGITS_MAX_BYTES = {"cpu": 1 << 30, "cuda": 8 << 30}
MAX_BATCHED_TOKENS = 8192
HEAD_DTYPE = "float32"  # of the logits: rounded to bfloat16 they alone would be off by 0.03 nat
# Of logits turned into log-probs at once: a CPU's stay in a core's cache, and in memory that the process has already
BLOCK_ENTRIES = {"cpu": 1 << 16, "cuda": 1 << 25}


@dataclass(frozen=True)
class EngineConfig:
    """What an engine needs to know. dtype is resolved (float32, bfloat16, float16), never auto.

    weights_sha256, config_sha256: fingerprints of the model that the run began with; version, distribution: of the vLLM that
    it began with. kind: vllm, or fake (scorer/fake.py).
    text_alone: the model is a multimodal wrapper, of which the language model alone is read. arguments: further ones of vLLM's.
    temperatures: at which the entropy is asked for, 1 first; none: it is not.
    """

    model: Path
    dtype: str
    seq_len: int
    vocab_size: int
    weights_sha256: str
    config_sha256: str
    tensor_parallel_size: int = 1
    device: str = "cpu"
    max_num_batched_tokens: int | None = None
    kind: str = "vllm"
    top_k: int = 0
    version: str = ""
    distribution: str = ""
    text_alone: bool = False
    temperatures: tuple[float, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    sample_k: int = 0

    @property
    def kept(self) -> Kept:
        """What is kept of each distribution beside the log-prob of the row's own token."""
        return Kept(self.top_k, self.temperatures, self.sample_k)

    @property
    def world_size(self) -> int:
        """GPUs, or groups of CPU cores, of one engine."""
        return self.tensor_parallel_size * self.arguments.get("pipeline_parallel_size", 1)


class Answer(NamedTuple):
    """What an engine says of a prompt's tokens from the second on, N = tokens - 1, K = top_k, E = entropies.

    logprobs: float32 [N]. topk_ids, topk_logprobs: int32 and float32 [N, K], each line by descending log-prob and
    ascending id where two are equal; None without top_k. entropies: float32 [N, E], the columns of `logits.entropies`; None
    without temperatures. sample_ids: int32 [N, S], ascending in each line; None without sample_k.
    """

    logprobs: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None
    entropies: np.ndarray | None = None
    sample_ids: np.ndarray | None = None


class Engine(Protocol):
    """What the scoring loop asks of an engine; one thread makes it and calls it."""

    description: dict[str, Any]

    def add(self, key: str, prompt: np.ndarray) -> None:
        """Queue a prompt, int [tokens], at least two."""

    def step(self) -> list[tuple[str, Answer]]:
        """Work for a while; the prompts that are finished with what the engine says of them."""

    def forget(self) -> None:
        """Clear what finished prompts have left behind; only called when none is in work."""


def batched_tokens(config: EngineConfig, memory_bytes: int) -> int:
    """Tokens per engine step, so that a step's logits fit into a share of the device's memory.

    Held at once are a chunk's logits in HEAD_DTYPE, twice where the model scales or gathers them, and a block of their
    log-probs; of each token the ids and values that are kept, on their way to the host.
    """
    if config.max_num_batched_tokens is not None:
        return config.max_num_batched_tokens
    budget = min(LOGITS_MAX_BYTES[config.device], memory_bytes * LOGITS_SHARE[config.device])
    bytes_per_token = 2 * config.vocab_size * 4 + 16 * (config.kept.width - 1)
    fit = max(1, int(budget / bytes_per_token))
    return max(256, min(MAX_BATCHED_TOKENS, 2 ** int(math.log2(fit))))


def device_memory(device: str) -> int:
    """Bytes of memory that an engine can count on, before it starts."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_properties(0).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def device_name(device: str) -> str:
    """What the device is called, for the log: cards of one cluster may differ."""
    if device == "cuda":
        import torch

        return torch.cuda.get_device_name(0)
    return device


def environment(config: EngineConfig, model_config: dict, cores: list[int], tokens: int) -> dict[str, str]:
    """Environment variables of an engine's process; they must be set before vLLM is imported.

    model_config: the parsed config.json; cores: the CPU cores that are this engine's alone; tokens: per step.
    """
    values = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the actor is the engine's own process already
        "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",  # for rows of exactly max_position_embeddings tokens, see VllmEngine
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONSAFEPATH": "1",  # what vLLM starts with python -m looks for no modules where the user stands
        "HF_HUB_OFFLINE": "1",  # the model is a local folder by now
        "VLLM_HOST_IP": "127.0.0.1",  # an engine lives on one node: what its workers listen on stays there
        "GLOO_SOCKET_IFNAME": "lo",
        "NCCL_SOCKET_IFNAME": "lo",
        "VLLM_CACHE_ROOT": os.environ.get("VLLM_CACHE_ROOT") or compiled_code(),
    }
    if config.device == "cuda":
        values["VLLM_USE_FLASHINFER_SAMPLER"] = "0"  # nothing is sampled, and it may be built or downloaded at start
        if config.dtype == "float32":
            # without these, products of the attention (Triton) and dense ones may round their inputs to 10 bits
            values |= {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}
    if config.device == "cpu":
        ranks = np.array_split(cores, config.world_size)
        values["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(",".join(map(str, rank)) for rank in ranks)
        values["OMP_NUM_THREADS"] = str(len(ranks[0]))
        values["VLLM_CPU_KVCACHE_SPACE"] = str(_kv_cache_gib(config, model_config, tokens))
        if config.dtype == "float16":
            values[FLOAT16_IN_FLOAT32] = "1"
        if "kv_lora_rank" in model_config:
            values["VLLM_MLA_DISABLE"] = "1"  # the CPU kernels of multi-head latent attention lack most head sizes
    return values


def compiled_code() -> str:
    """Where vLLM keeps compiled code between engines and runs: its own place, or the temporary folder where nobody can
    write there, as in a container without a home."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "vllm"
    try:
        home.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return str(user_folder("remit-vllm"))
    return str(home if os.access(home, os.W_OK) else user_folder("remit-vllm"))


def _kv_cache_gib(config: EngineConfig, model_config: dict, tokens: int) -> int:
    """Enough for two engine steps or two rows, with an upper bound for the bytes of a token."""
    heads = model_config.get("num_attention_heads") or 32
    head_dim = model_config.get("head_dim") or (model_config.get("hidden_size") or 4096) // heads
    layers = model_config.get("num_hidden_layers") or 32
    bytes_per_token = 2 * layers * heads * max(head_dim, 64) * 4
    return max(1, math.ceil(bytes_per_token * 2 * max(config.seq_len + 1, tokens) / 2**30))


def head_dtype(config: EngineConfig) -> str | None:
    """In what vLLM multiplies states and output embedding to logits; None where all is HEAD_DTYPE already."""
    return None if config.dtype == HEAD_DTYPE else HEAD_DTYPE


class VllmEngine:
    """A running vLLM engine for one model."""

    def __init__(self, config: EngineConfig, tokens: int) -> None:
        import vllm

        if os.environ.get(FLOAT16_IN_FLOAT32):
            multiply_float16_in_float32()
        keep_arrays()
        kept = config.kept
        self._params = vllm.SamplingParams(
            prompt_logprobs=kept.width - 1, max_tokens=1, temperature=0, detokenize=False
        )
        # vLLM wants room for one generated token after the prompt. That position is sampled but never computed,
        # so a row as long as the model's limit is fine although max_model_len lies one above it.
        defaults: dict[str, Any] = {
            "gpu_memory_utilization": 0.8,
            "enforce_eager": config.device == "cpu",  # compiling takes 10-20 s there and gains 3 %
        }
        if config.device == "cuda":  # graphs are captured for small steps, which scoring never makes
            defaults["compilation_config"] = {"cudagraph_mode": "NONE"}
        llm: Any = vllm.LLM(
            model=str(config.model),
            dtype=config.dtype,  # type: ignore[arg-type]
            max_model_len=config.seq_len + 1,
            max_num_batched_tokens=tokens,
            tensor_parallel_size=config.tensor_parallel_size,
            skip_tokenizer_init=True,
            enable_prefix_caching=False,  # with it, prompt log-probs depend on the order of the requests
            trust_remote_code=False,
            load_format="safetensors",
            seed=0,
            max_logprobs=max(20, kept.width),  # vLLM's own bound is 20
            distributed_executor_backend="mp" if config.world_size > 1 else None,
            hf_overrides=partial(engine_config, seq_len=config.seq_len, head_dtype=head_dtype(config)),
            worker_extension_cls=f"scorer.{'textkernel.TextKernel' if config.text_alone else 'kernel.LogprobKernel'}",
            **(defaults | config.arguments),
        )
        self._llm = llm  # keeps the engine alive
        self._engine = llm.llm_engine
        self.forget = lambda: llm.collective_rpc("zero_kv_cache")
        heads = {dtype for worker in llm.collective_rpc("head_dtypes") for dtype in worker}
        if heads - {HEAD_DTYPE}:
            raise ValueError(
                f"this vLLM gives logits in {', '.join(sorted(heads))}, expected {HEAD_DTYPE}; install release 0.32, or "
                "score with --dtype float32"
            )
        if config.device == "cpu":
            llm.collective_rpc("use_cpu_head")
        runners = llm.collective_rpc("keep_scores", args=(kept, BLOCK_ENTRIES[config.device]))
        runner = common_runner(runners, kept, vllm.__version__)
        self.description = {"engine": "vllm", "max_num_batched_tokens": tokens, "head_dtype": HEAD_DTYPE}
        self.description |= {"logprob_kernel": runner, "device_name": device_name(config.device)}
        self._asked: dict[str, np.ndarray] = {}
        self._kept = kept

    def add(self, key: str, prompt: np.ndarray) -> None:
        self._asked[key] = prompt
        self._engine.add_request(key, {"prompt_token_ids": prompt.tolist()}, self._params)

    def step(self) -> list[tuple[str, Answer]]:
        """Raises ValueError where the engine answers for other tokens than asked."""
        finished = []
        for output in self._engine.step():
            if not output.finished:
                continue
            prompt = self._asked.pop(output.request_id)
            finished.append((output.request_id, self._answer(output.request_id, prompt, output.prompt_logprobs)))
        return finished

    def _answer(self, key: str, prompt: np.ndarray, tensors: Any) -> Answer:
        """tensors: ids and values, [tokens - 1, W], the columns of `token_scores`."""
        shape, (best, drawn, last) = (len(prompt) - 1, self._kept.width), self._kept.places
        if not hasattr(tensors, "logprob_token_ids") or tuple(tensors.logprobs.shape) != shape:
            raise ValueError(f"the engine did not answer for each token of prompt {key}")
        ids_NW, values_NW = tensors.logprob_token_ids.numpy(), tensors.logprobs.numpy()
        if not np.array_equal(ids_NW[:, 0], prompt[1:]):
            raise ValueError(f"the engine answered for other tokens than those of prompt {key}")
        # copies: a GPU's answers come in pinned memory, of which there is little
        answer = Answer(values_NW[:, 0].copy())
        if self._kept.top_k:
            answer = answer._replace(topk_ids=ids_NW[:, best].astype(np.int32), topk_logprobs=values_NW[:, best].copy())
        if self._kept.sample_k:
            answer = answer._replace(sample_ids=ids_NW[:, drawn].astype(np.int32))
        return answer._replace(entropies=values_NW[:, last].copy()) if self._kept.temperatures else answer


def common_runner(runners: list[str | None], kept: Kept, version: str) -> str:
    """What all workers say of `LogprobKernel.keep_scores`; ValueError where that cannot give what is to be kept.

    With "none" vLLM's own functions are at work. They have no entropies, and of equal tokens at the last place of the most
    probable ones they take any.
    """
    found = {runner for runner in runners if runner is not None}
    runner = found.pop() if len(found) == 1 else "none"
    if runner == "none" and kept.width > 1:
        raise ValueError(
            f"vLLM {version} computes log-probs by other functions than those of release 0.32, so --top-k, --sample-k and --entropy are not to "
            "be had with it; install release 0.32 or 0.33, or score without them"
        )
    return runner
