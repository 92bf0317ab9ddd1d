"""remit score: add a column with a reference's log-prob of every token.

In: a complete shard folder. Out: a new one with the same rows and one column more. Ray actors, each with an
engine, take a part, score it and commit it. The same command again does the parts that are missing.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from scorer.below_entropy import kept_entry
from scorer.canary import Forwards
from scorer.cluster import ray_cluster, ray_errors
from scorer.config import ScoreConfig
from scorer.driver import Drive, PartsFailed, Progress
from scorer.engine import EngineConfig
from scorer.engine_args import parse_engine_args, require_known, require_stages_run
from scorer.estimate import estimate
from scorer.forwards import ForwardTask, find_prompts
from scorer.guess import require_better_than_a_guess
from scorer.once_per_node import node_weights_fingerprint
from scorer.placement import KEYS, engine_bundle, size_options, wait_for_nodes
from scorer.precision import nearer_dtype, settled_dtype
from scorer.reference import (
    Reference,
    check_reference,
    provenance,
    require_head_size,
    require_quantised_readable,
    require_vllm,
    require_vocabulary,
)
from scorer.second_opinion import SecondOpinion
from shards.crash import crash_point
from shards.fingerprint import config_fingerprint
from shards.folder import ShardFolder
from shards.manifest import MANIFEST, Manifest
from shards.output_folder import SHARD_FOLDERS, as_begun, begin_shards, instead_of, refuse_other, require_empty, writing
from shards.quarantine import clear_failures
from shards.store import Store, absolute, open_store

__all__ = ["PartsFailed", "score"]

OPTIONS = (
    *("dtype", "context", "logprob_step", "top_k", "entropy", "entropy_temperature", "top_k_below_entropy", "sample_k"),
    *("tensor_parallel_size", "engine", "engine_args"),
)
"""Fields of a reference that options decide."""
NOT_RECORDED_BEFORE = ("engine_distribution", "device", "head_dtype", "tokenizer_differences")


def score(
    config: ScoreConfig,
    reference: Reference,
    progress: Progress = lambda state: None,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda line: None,
) -> ShardFolder:
    """Annotate `config.shards` with the log-probs of `reference`; returns the complete folder.

    Raises ValueError with value, expectation and remedy before anything is written for input that does not
    fit together, RuntimeError where engines do not start, PartsFailed where parts failed three times while the
    others went on, Stopped where should_stop said so. note: told what takes long or was chosen.
    """
    config = replace(config, shards=absolute(config.shards), out=absolute(config.out))
    shards = ShardFolder(config.shards)
    shards.require_complete()
    if config.name in shards.manifest.references:
        raise ValueError(
            f"{config.shards}: has log-probs of a reference named {config.name!r} already; choose another --name"
        )
    model_config, tokenizer_differences = check_reference(shards, reference, note)
    require_vocabulary(config, model_config["vocab_size"])
    # found missing now, and not once Ray runs
    distribution, version = require_vllm() if config.engine == "vllm" else ("", "")
    if config.engine == "vllm" and config.canary:
        require_quantised_readable(reference.path, "; --no-canary scores without a second opinion")
    engine_args = parse_engine_args(config.engine_args)
    require_known(engine_args)
    device = device_of(distribution, version)
    require_stages_run(engine_args, device)
    out = open_store(config.out)
    require_empty(out, MANIFEST, "a shard folder")
    dtype = settled_dtype(config, reference.path, model_config, recorded_dtype(out, config.name), note)
    if config.engine == "vllm":
        require_head_size(model_config, reference.path, device)
    with ray_cluster(config.debug, note):
        engine = EngineConfig(
            model=reference.path.absolute(),
            dtype=dtype or "bfloat16",
            seq_len=shards.manifest.seq_len,
            vocab_size=model_config["vocab_size"],
            weights_sha256=node_weights_fingerprint(reference.path),
            config_sha256=config_fingerprint(reference.path),
            tensor_parallel_size=config.tensor_parallel_size,
            device=device,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kind=config.engine,
            top_k=config.top_k,
            version=version,
            distribution=distribution,
            text_alone=model_config["text_alone"],
            temperatures=config.temperatures,
            arguments=engine_args,
            sample_k=config.sample_k,
        )
        source = as_begun(out, shards.manifest)
        recorded = {} if out.size(MANIFEST) is None else Manifest.read(out).references.get(config.name, {})
        kept = kept_entry(config, recorded)
        manifest = with_reference(source, config, reference, engine, tokenizer_differences, kept)
        names = manifest.schema.names
        if len(set(names)) < len(names):  # rl with --top-k beside a reference called rl_topk
            raise ValueError(f"{config.shards}: --name {config.name} would give two columns one name; choose another")
        refuse_other_scoring(out, manifest, config.name)
        # after all that needs no node, so that what is wrong with the command is not told hours later
        wait_for_nodes(KEYS[device], should_stop, note, config.devices_per_engine, size_options(config))
        bundle = engine_bundle(config, device)
        forwards = None
        if dtype is None:  # of a new folder: one that was begun has it recorded
            engine, forwards = choose_dtype(config, shards, engine, should_stop, note)
        opinion = SecondOpinion(config, shards, engine, note, forwards)
        if config.below_entropy is not None and "top_k_below_entropy" not in kept:
            kept = estimate(config, shards, engine, model_config, bundle, opinion, should_stop, note)
        manifest = with_reference(source, config, reference, engine, tokenizer_differences, kept)
        with writing(out, note, SHARD_FOLDERS) as lease:
            refuse_other_scoring(out, manifest, config.name)  # another driver may have had the lease since we looked
            folder = begin_shards(shards, out, manifest, lease)
            crash_point("driver.planned")
            folder.require_sizes()
            clear_failures(out)
            if folder.missing_parts():
                drive = Drive(config, shards, folder, engine, model_config, bundle, lease, progress, note, opinion)
                drive.drive(should_stop)
            crash_point("driver.finished")
    return folder


def device_of(distribution: str, version: str) -> str:
    """What the installed build of vLLM runs on, whatever the nodes have that are there already: cuda or cpu."""
    return "cuda" if distribution == "vllm" and "cpu" not in version else "cpu"


def with_reference(
    manifest: Manifest,
    config: ScoreConfig,
    reference: Reference,
    engine: EngineConfig,
    tokenizer_differences: list[str],
    kept: dict[str, Any],
) -> Manifest:
    """The plan of the annotated folder."""
    entry = {config.name: provenance(config, reference, engine, tokenizer_differences, kept)}
    return replace(manifest, references=manifest.references | entry)


def recorded_dtype(out: Store, name: str) -> str | None:
    """What the run that began `out` scores the reference in; the same command again does not choose anew."""
    return None if out.size(MANIFEST) is None else Manifest.read(out).references.get(name, {}).get("dtype")


def choose_dtype(
    config: ScoreConfig,
    shards: ShardFolder,
    engine: EngineConfig,
    should_stop: Callable[[], bool],
    note: Callable[[str], None],
) -> tuple[EngineConfig, Forwards | None]:
    """The engine in the dtype that is nearer to float32 on a few prompts, and what transformers said of these."""
    parts = [plan.name for plan in shards.manifest.parts]
    prompts = find_prompts(shards, parts, config.context, engine.vocab_size)
    if not prompts:
        return engine, None
    with ray_errors(should_stop):
        forwards = ForwardTask(engine, prompts, ("bfloat16", "float16"), note).wait(should_stop)
    require_better_than_a_guess(forwards, engine.vocab_size, engine.model)
    return replace(engine, dtype=nearer_dtype(forwards, note)), forwards


def refuse_other_scoring(out: Store, manifest: Manifest, name: str) -> None:
    """ValueError where `out` holds something else than `manifest` plans, with the log-probs of `name` as the new column.

    A complete folder of an earlier release, which did not record all that is recorded now, is what it says it is; an
    incomplete one is refused, since its parts came from an engine with other logits.
    """
    if out.size(MANIFEST) is None:
        return
    there = ShardFolder(out)
    ours, theirs = manifest.provenance(), there.manifest.provenance()
    others = sorted({*theirs["references"]} - {*ours["references"]})
    if name not in theirs["references"] and others:
        raise ValueError(
            f"{out.url}: was scored with --name {' and '.join(others)}, --name {name} asked for now; to add a column, score that "
            f"folder (--shards {out.url}) into another --out"
        )
    then, now = theirs["references"], ours["references"][name]
    if (
        then.get(name, {}).get("weights_sha256") == now["weights_sha256"]
    ):  # the weights decide, whatever their folder is called
        ours["references"] = ours["references"] | {name: now | {"model": then[name]["model"]}}
    for one in (ours, theirs):  # a tokenizer may have been put beside the weights since
        references = one["references"].items()
        one["references"] = {each: {k: v for k, v in entry.items() if k != "tokenizer"} for each, entry in references}
    if not there.missing_parts():
        ours["references"] = {
            each: {k: v for k, v in entry.items() if k in then.get(each, entry) or k not in NOT_RECORDED_BEFORE}
            for each, entry in ours["references"].items()
        }
    options = {f"references.{name}.{field}": "--" + field.replace("_", "-") for field in OPTIONS}
    below = ("top_k_quantile", "top_k_quantile.quantile", "top_k_quantile.margin")
    options |= {f"references.{name}.{field}": "--top-k-below-entropy" for field in below}
    arguments = {*then.get(name, {}).get("engine_args", {}), *now.get("engine_args", {})}
    options |= {f"references.{name}.engine_args.{key}": f"--engine-args {key}" for key in arguments}
    refuse_other(out.url, "scoring", ours, theirs, instead_of(there), options)
