"""The vLLM engines that sample rollouts, each in a Ray actor of its own: vLLM changes the transformers classes of its process.

In: prompts as token ids. Out: sampled tokens with their log-probs. New weights go into the running engines.
Light to import: vLLM enters with the actor, after the environment that it reads is set.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from scorer.cores import claim_cores
from scorer.engine import EngineConfig, device_memory, environment
from scorer.scratch import own_temporary_folder

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
KV_SHARE = 4
"""A CPU engine's cache of keys and values takes at most this part of the memory."""


@dataclass(frozen=True)
class RolloutEngine:
    """What an engine needs to know. dtype is resolved; longest: prompt and completion, in tokens; num_sequences: at once;
    memory: share of a GPU's."""

    model: Path
    tokenizer: Path
    dtype: str
    longest: int
    num_sequences: int
    device: str
    cores: int
    tensor_parallel_size: int
    memory: float


@dataclass(frozen=True)
class Sampling:
    """How a prompt is continued. count: completions of it; stop: a text after which one ends, which it includes."""

    count: int
    max_tokens: int
    temperature: float
    stop: str | None = None


@dataclass(frozen=True)
class Sampled:
    """One completion. logprobs: of its tokens, at the temperature."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]


class RolloutActor:
    """A running engine."""

    def __init__(self, config: RolloutEngine) -> None:
        for name in LAUNCHER:  # of torchrun, which vLLM would take for its own
            os.environ.pop(name, None)
        model_config = json.loads((config.model / "config.json").read_text(encoding="utf-8"))
        model_config = model_config.get("text_config") or model_config
        as_scorer = EngineConfig(
            model=config.model, dtype=config.dtype, seq_len=config.longest, vocab_size=0, weights_sha256="",
            config_sha256="", tensor_parallel_size=config.tensor_parallel_size, device=config.device,
        )  # fmt: skip
        tokens = config.longest * config.num_sequences
        os.environ.update(environment(as_scorer, model_config, claim_cores(config.cores), tokens))
        if config.device == "cpu":
            most = max(1, device_memory("cpu") // KV_SHARE >> 30)
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(min(most, int(os.environ["VLLM_CPU_KVCACHE_SPACE"])))
        own_temporary_folder()
        import vllm

        self._vllm: Any = vllm
        self._llm: Any = vllm.LLM(
            model=str(config.model),
            tokenizer=str(config.tokenizer),
            dtype=config.dtype,  # type: ignore[arg-type]
            max_model_len=config.longest,
            max_num_seqs=config.num_sequences,
            tensor_parallel_size=config.tensor_parallel_size,
            distributed_executor_backend="mp" if config.tensor_parallel_size > 1 else None,
            enforce_eager=config.device == "cpu",
            gpu_memory_utilization=config.memory if config.device == "cuda" else 0.8,
            enable_prefix_caching=True,  # the second half of a rollout begins with the first
            logprobs_mode="processed_logprobs",  # at the temperature, as TRL compares them
            trust_remote_code=False,
            load_format="safetensors",
            seed=0,
            worker_extension_cls="pipelines.rmt.worker.RolloutWorker",
            disable_log_stats=True,
        )

    def ready(self) -> str:
        """vLLM's version, once the engine runs."""
        version: str = self._vllm.__version__
        return version

    def load(self, weights: dict[str, Any]) -> None:
        """Take new weights."""
        self._llm.collective_rpc("take_weights", args=(weights,))
        self._llm.reset_prefix_cache()  # what it holds was computed with the old ones

    def sample(self, prompts: list[list[int]], samplings: list[Sampling], seed: int) -> list[list[Sampled]]:
        """Completions of each prompt."""
        self._llm.collective_rpc("seed_sampling", args=(seed,))
        parameters = [
            self._vllm.SamplingParams(
                n=sampling.count,
                max_tokens=sampling.max_tokens,
                temperature=sampling.temperature,
                logprobs=0,
                stop=sampling.stop,
                include_stop_str_in_output=True,
                skip_special_tokens=False,  # the closing tag may be one
                detokenize=sampling.stop is not None,
            )
            for sampling in samplings
        ]
        requests = [{"prompt_token_ids": prompt} for prompt in prompts]
        outputs = self._llm.generate(requests, parameters, use_tqdm=False)
        return [[_sampled(completion) for completion in output.outputs] for output in outputs]


def _sampled(completion: Any) -> Sampled:
    ids = tuple(completion.token_ids)
    return Sampled(ids, tuple(places[index].logprob for places, index in zip(completion.logprobs, ids, strict=True)))


class Engines:
    """The engines of a run, for one process. Ray must be there, and stay: its errors come through as they are."""

    def __init__(self, config: RolloutEngine, count: int, timeout_seconds: float) -> None:
        import ray

        self._ray: Any = ray
        self._timeout = timeout_seconds
        resources = {"num_gpus": config.tensor_parallel_size} if config.device == "cuda" else {"num_cpus": config.cores}
        make = ray.remote(RolloutActor).options(**resources, max_restarts=0)
        self._actors: list[Any] = [make.remote(config) for _ in range(count)]

    def start(self) -> str:
        """vLLM's version, once all engines run; RuntimeError where one does not come up."""
        return self._all([actor.ready.remote() for actor in self._actors])[0]

    def load(self, weights: dict[str, Any]) -> None:
        """Give all engines new weights: float32 tensors on the CPU, by their names in the model's files."""
        once = self._ray.put({name: tensor.numpy() for name, tensor in weights.items()})
        self._all([actor.load.remote(once) for actor in self._actors])

    def sample(self, prompts: list[list[int]], samplings: list[Sampling], seed: int) -> list[list[Sampled]]:
        """Completions of each prompt. What is sampled follows from the weights, the seed and the number of engines."""
        size = -(-len(prompts) // len(self._actors)) if prompts else 1
        calls = [
            actor.sample.remote(prompts[first : first + size], samplings[first : first + size], 1024 * seed + number)
            for number, (actor, first) in enumerate(zip(self._actors, range(0, len(prompts), size), strict=False))
        ]
        return [completions for share in self._all(calls) for completions in share]

    def _all(self, calls: Sequence[Any]) -> list[Any]:
        try:
            found: list[Any] = self._ray.get(list(calls), timeout=self._timeout)
        except self._ray.exceptions.GetTimeoutError:
            raise RuntimeError(
                f"the engines have not answered for {self._timeout:g} s; the same command again goes on, --timeout-seconds has "
                "them waited for longer"
            ) from None
        except self._ray.exceptions.RayTaskError as error:
            lines = [line.strip() for line in str(error.cause).splitlines() if line.strip()]
            said = [line for line in lines if not line.startswith("For further information visit")]
            raise RuntimeError(f"the engine fails: {said[-1] if said else type(error.cause).__name__}") from error
        return found


Sampler = Callable[[list[list[int]], list[Sampling], int], list[list[Sampled]]]
"""What `Engines.sample` is."""


def greedy(sampling: Sampling) -> Sampling:
    """The most probable continuation, once."""
    return replace(sampling, count=1, temperature=0.0)
