"""remit score: add a column with a reference's log-prob of every token.

In: a complete shard folder. Out: a new one with the same rows and one column more. Ray actors, each with an
engine, take a part, score it and commit it. The same command again does the parts that are missing.
"""

from collections.abc import Callable
from dataclasses import replace

import ray

from scorer.cluster import ray_cluster
from scorer.config import ScoreConfig
from scorer.drive import Drive, PartsFailed, Progress
from scorer.engine import EngineConfig
from scorer.output import absolute, begin_output, clean, leave, require_empty
from scorer.placement import engine_bundle
from scorer.reference import (
    Reference,
    check_reference,
    engine_version,
    provenance,
    require_vocabulary,
    resolve_dtype,
)
from shards.crash import crash_point
from shards.fingerprint import config_fingerprint, weights_fingerprint
from shards.folder import ShardFolder
from shards.lease import Lease
from shards.manifest import MANIFEST, Manifest, first_difference
from shards.quarantine import clear_failures
from shards.store import Store, open_store

__all__ = ["PartsFailed", "score"]


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
    if config.engine == "vllm":
        engine_version()  # found missing now, and not once Ray runs
    out = open_store(config.out)
    if out.size(MANIFEST) is None:
        require_empty(out)
    with ray_cluster(config.debug):
        device = "cuda" if ray.cluster_resources().get("GPU") and config.engine == "vllm" else "cpu"
        engine = EngineConfig(
            model=reference.path.absolute(),
            dtype=resolve_dtype(config.dtype, model_config, device),
            seq_len=shards.manifest.seq_len,
            vocab_size=model_config["vocab_size"],
            weights_sha256=weights_fingerprint(reference.path),
            config_sha256=config_fingerprint(reference.path),
            tensor_parallel_size=config.tensor_parallel_size,
            device=device,
            max_num_batched_tokens=config.max_num_batched_tokens,
            kind=config.engine,
            top_k=config.top_k,
        )
        manifest = replace(
            shards.manifest,
            references=shards.manifest.references
            | {config.name: provenance(config, reference, engine, tokenizer_differences)},
        )
        names = manifest.schema.names
        if len(set(names)) < len(names):  # rl with --top-k beside a reference called rl_topk
            raise ValueError(f"{config.shards}: --name {config.name} would give two columns one name; choose another")
        refuse_other_scoring(out, manifest)
        bundle = engine_bundle(config, device)
        lease = Lease(out).acquire(note)
        try:
            refuse_other_scoring(out, manifest)  # another driver may have had the lease since we looked
            clean(out)
            folder = begin_output(shards, out, manifest)
            crash_point("driver.planned")
            clear_failures(out)
            if folder.missing_parts():
                Drive(config, shards, folder, engine, model_config, bundle, lease, progress, note).drive(should_stop)
            crash_point("driver.finished")
        finally:
            leave(out, lease)
    return folder


def refuse_other_scoring(out: Store, manifest: Manifest) -> None:
    """ValueError where `out` holds something else than `manifest` plans."""
    if out.size(MANIFEST) is not None:
        difference = first_difference(manifest.provenance(), Manifest.read(out).provenance())
        if difference:
            raise ValueError(f"{out.url}: holds another scoring: {difference}; choose another --out or delete it")
