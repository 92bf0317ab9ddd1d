"""remit pack: tokenise a corpus, append EOS, cut into rows of seq_len, write a shard folder.

In: corpus files. Out: a shard folder without log-probs. Two passes of Ray tasks: one task per corpus
file tokenises it into a staging file; then the plan is frozen, and one task per part copies its rows out
of the staging files. A rerun does what is missing. Staging stands beside the output folder until the
end, so that the output folder appears with its manifest or not at all.
"""

import hashlib
import json
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from scorer.cluster import cause, ray_cluster, ray_errors, require_ray
from scorer.config import PackConfig
from scorer.output import StopGuard, absolute, clean, leave, require_empty
from scorer.sources import Source, find_sources
from scorer.staging import stage_source, write_part_from_staging
from scorer.tokenizer import PackTokenizer, describe_tokenizer, load_tokenizer
from scorer.vocabulary import Vocabulary, hashes
from shards.crash import crash_point
from shards.folder import TOKEN_IDS, TOKENIZER, ShardFolder
from shards.lease import LEASE, Lease, LeaseLost
from shards.manifest import MANIFEST, CorpusFile, Manifest, PartPlan, first_difference, part_name
from shards.store import Store, open_store
from shards.tokens import added_tokens, other_beginning

REJECTED = "_rejected.jsonl"
NOTED_SHARE = 0.01  # of unknown tokens, of documents that do not come back
KEEP_STAGING_BYTES = 1 << 26
TEXT_BYTES_PER_STAGED_BYTE = 2.5  # plain text against its token ids in zstd; for the estimate of the disk's need
INFLATION = {".gz": 3.0, ".zst": 3.5, ".parquet": 2.5}


Progress = Callable[[str, int, int, int], None]
"""Called as progress(phase, done, total, tokens): bytes of the corpus files while it tokenises, tokens
while it writes parts."""


def pack(
    config: PackConfig,
    progress: Progress = lambda phase, done, total, tokens: None,
    should_stop: Callable[[], bool] = lambda: False,
    note: Callable[[str], None] = lambda line: None,
) -> ShardFolder:
    """Pack `config.corpus` into `config.out`; returns the complete folder.

    Raises ValueError with file, value and remedy for bad input; then the output folder does not exist. Raises
    Stopped where should_stop says so and what ran has ended or the grace period is over. note: told what takes long.
    """
    # Ray workers may have another working directory
    config = replace(config, out=absolute(config.out), tokenizer=str(Path(config.tokenizer).absolute()))
    sources = find_sources(config.corpus)
    tokenizer = load_tokenizer(config.tokenizer)
    description = describe_tokenizer(tokenizer, config.special_tokens, config.bos)
    for line in filter(None, [*tokenizer.notes, other_beginning(tokenizer.encoder, description["bos_token_id"])]):
        note(line)
    settings = {
        "seq_len": config.seq_len,
        "tokenizer": description,
        "text_field": config.text_field,
        "rows_per_batch": config.rows_per_batch,
        "on_bad_document": config.on_bad_document,
        # more than its fingerprint, which leaves normalisation and the splitting into words out
        "tokenizer_sha256": hashlib.sha256(tokenizer.encoder.to_str().encode()).hexdigest(),
        "unknown_id": tokenizer.unknown_id,
        "added_tokens": added_tokens(tokenizer.json),
    }
    out = open_store(config.out)
    parent, _, last = config.out.rstrip("/").rpartition("/")
    if parent.endswith(":/"):
        raise ValueError(f"{out.url}: is a whole bucket; name a folder in it")
    staging = open_store(f"{parent}/.{last}.staging")
    if out.size(MANIFEST) is not None:
        folder = ShardFolder(out)
        _refuse_other_plan(config, folder, sources, description, tokenizer)
        if not folder.missing_parts():
            if out.names(LEASE) or staging.names():  # of a driver that died when all was done
                lease = Lease(out).acquire(note)
                staging.remove()
                leave(out, lease)
            return folder
    require_empty(out)
    out.require_free(int(2 * _staged_estimate(sources)), "packing this corpus")
    lease = Lease(out).acquire(note)
    try:
        clean(out)
        staging.clean()
        stop = StopGuard(should_stop, config.grace_seconds)
        with ray_cluster(config.debug), ray_errors(stop.requested):
            raw = tokenizer.encoder.to_str()
            vocabulary = Vocabulary(description["vocab_size"])
            staged = _stage_all(config, sources, staging, raw, settings, out, lease, progress, stop, vocabulary)
            crash_point("staging.done")
            _say_what_changed(staged, note)
            files = tokenizer.files | {TOKEN_IDS: vocabulary.token_ids()}
            tokens = {"added_tokens": vocabulary.added_tokens(), "files": hashes(files)}
            manifest = _plan(config, staged, description | tokens)
            lease.check()
            if out.size(MANIFEST) is None:  # what is there may be half a tokenizer, of a run that died
                out.remove(TOKENIZER)
                for name, data in files.items():
                    out.replace(f"{TOKENIZER}/{name}", data)
            elif Manifest.read(out).checksum != manifest.checksum:
                raise ValueError(
                    f"{out.url}: holds another pack, with other documents or counts; was it begun with another "
                    "--text-field or --on-bad-document? choose another --out or delete it"
                )
            _save_rejected(staged, out)
            crash_point("output.begun")
            lease.check()
            manifest.write(out)
            crash_point("driver.planned")
            folder = ShardFolder(out)
            out.require_free(staging.used_bytes(), "writing the parts")
            _write_parts(folder, staging, staged, lease, progress, stop)
        crash_point("driver.finished")
        staging.remove()
    except LeaseLost:  # what stands there is another driver's now
        raise
    except BaseException:
        lease.check()  # LeaseLost: another driver is at work with what we would remove
        # after a failure, staging is kept for the rerun only where it saves time
        if staging.used_bytes() < KEEP_STAGING_BYTES:
            staging.remove()
        if out.size(MANIFEST) is None:
            out.delete(REJECTED)
            out.remove(TOKENIZER)
        raise
    finally:
        leave(out, lease)
    return folder


def _staged_estimate(sources: list[Source]) -> float:
    sizes = [((source.size() or 0), Path(source.location or "").suffix) for source in sources]
    return sum(size * INFLATION.get(suffix, 1.0) for size, suffix in sizes) / TEXT_BYTES_PER_STAGED_BYTE


def _say_what_changed(staged: list[dict], note: Callable[[str], None]) -> None:
    """Notes where more than 1 % of the sampled documents do not come back from their rows, or of the tokens are unknown."""
    files = [record["file"] for record in staged]
    sampled, changed, tokens, unknown = (
        sum(file[name] for file in files)
        for name in ("documents_sampled", "documents_changed", "tokens", "unknown_tokens")
    )
    if changed > NOTED_SHARE * sampled:
        path, (document, how) = next((r["file"]["path"], r["changed"]) for r in staged if r["changed"])
        note(
            f"{changed:,} of {sampled:,} sampled documents do not decode to what they were ({changed / sampled:.1%}), for "
            f"instance document {document} of {path}: {how}; the tokenizer changes or drops what it cannot spell"
        )
    if unknown > NOTED_SHARE * tokens:
        note(
            f"{unknown:,} of {tokens:,} tokens ({unknown / tokens:.1%}) are the unknown one: the tokenizer cannot spell "
            "this text"
        )


def _save_rejected(staged: list[dict], out: Store) -> None:
    """List the documents that were left out, with the reason of each, in _rejected.jsonl."""
    lines = [
        json.dumps({"source": index, "path": record["file"]["path"], "reason": reason}, ensure_ascii=False)
        for index, record in enumerate(staged)
        for reason in record["rejected"]
    ]
    if lines:
        out.replace(REJECTED, ("\n".join(lines) + "\n").encode())
    else:
        out.delete(REJECTED)


def _refuse_other_plan(
    config: PackConfig, folder: ShardFolder, sources: list[Source], description: dict, tokenizer: PackTokenizer
) -> None:
    """ValueError where `folder` was packed from something else than is asked for now."""
    manifest = folder.manifest
    packed = {name: value for name, value in manifest.tokenizer.items() if name in description}
    if "files" not in manifest.tokenizer:  # of an earlier release, which put no BOS
        description = {name: description[name] for name in [*packed, "bos_token_id"]}
        packed["bos_token_id"] = None
    else:  # what its fingerprint leaves out: normalisation, the splitting into words
        packed["tokenizer.json"] = manifest.tokenizer["files"].get("tokenizer.json")
        description = description | {"tokenizer.json": hashes(tokenizer.files)["tokenizer.json"]}
    corpus: list[dict] = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in manifest.corpus]
    asked = [{"path": source.name, "size": source.size(), "sha256": source.sha256()} for source in sources]
    layout = ("seq_len", "rows_per_part", "rows_per_batch")
    difference = first_difference(
        {name: getattr(config, name) for name in layout}
        | {"tokenizer": description, "corpus": asked, "references": []},
        {name: getattr(manifest, name) for name in layout}
        | {"tokenizer": packed, "corpus": corpus, "references": sorted(manifest.references)},
    )
    if difference:
        raise ValueError(f"{folder.path}: holds another pack: {difference}; choose another --out or delete it")


# --- first pass: one task per corpus file ---------------------------------------------------------------


def _stage_all(
    config: PackConfig,
    sources: list[Source],
    staging: Store,
    tokenizer_json: str,
    settings: dict,
    out: Store,
    lease: Lease,
    progress: Progress,
    stop: StopGuard,
    vocabulary: Vocabulary,
) -> list[dict]:
    """Tokenise every source that is not staged yet; returns their records in corpus order."""
    total_cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = min(config.num_workers or total_cpus, len(sources))
    cpus = max(1, total_cpus // workers)
    task: Any = ray.remote(stage_source).options(
        num_returns="streaming",
        num_cpus=cpus,
        max_retries=2,
    )
    records: list[dict] = [{}] * len(sources)
    waiting = list(enumerate(sources))
    running: dict[Any, int] = {}
    total = sum(source.size() or 0 for source in sources)
    done: dict[int, tuple[int, int]] = {}  # bytes and tokens per source
    try:
        while waiting or running:
            while waiting and len(running) < workers and not stop.requested():
                index, source = waiting.pop(0)
                arguments = (source, index, staging, tokenizer_json, settings, cpus, out, lease.fence)
                generator = task.remote(*arguments)
                running[generator] = index
            stop.check(len(running))
            require_ray()
            ready: Any = ray.wait(list(running), num_returns=1, fetch_local=False, timeout=1)[0]
            for generator in ready:
                update: Any = ray.get(next(generator))
                index = running[generator]
                done[index] = update["bytes"], update["tokens"]
                if "record" in update:
                    records[index] = update["record"]
                    vocabulary.add(records[index])
                    del running[generator]
            bytes_done, tokens = np.sum(list(done.values()), axis=0).tolist() if done else (0, 0)
            progress("tokenise", bytes_done, total, tokens)
    except BaseException as error:
        raise cause(error) from None  # what still runs ends by itself when the lease is given back
    return records


# --- the plan, and the second pass: one task per part ---------------------------------------------------


def _plan(config: PackConfig, staged: list[dict], tokenizer: dict) -> Manifest:
    """Cut the rows of all sources, end to end, into parts of rows_per_part."""
    files = tuple(CorpusFile(**record["file"]) for record in staged)
    if not any(file.rows for file in files):
        read = sum(file.documents_read for file in files)
        rejected = sum(file.documents_rejected for file in files)
        example = next((reason for record in staged for reason in record["rejected"]), "")
        raise ValueError(
            f"the corpus is empty: {len(files)} file(s), {read} documents read, none with text ({rejected} rejected"
            + (f", for instance {example}" if example else "")
            + "); check --corpus and --text-field"
        )
    # rows are full but for the last one of each file, so a part's tokens follow from its rows alone
    last_row = np.cumsum([file.rows for file in files]) - 1
    short_by = np.cumsum([file.rows * config.seq_len - file.tokens for file in files])
    num_rows = int(last_row[-1]) + 1
    parts: list[PartPlan] = []
    for first in range(0, num_rows, config.rows_per_part):
        rows = min(config.rows_per_part, num_rows - first)
        low, high = np.searchsorted(last_row, [first, first + rows])
        missing = short_by[high - 1] - (short_by[low - 1] if low else 0) if high > low else 0
        parts.append(PartPlan(part_name(len(parts)), rows, int(rows * config.seq_len - missing)))
    return Manifest(config.seq_len, config.rows_per_part, config.rows_per_batch, tokenizer, files, tuple(parts))


def _write_parts(
    folder: ShardFolder, staging: Store, staged: list[dict], lease: Lease, progress: Progress, stop: StopGuard
) -> None:
    ends = np.cumsum([record["file"]["rows"] for record in staged])
    firsts = np.cumsum([0] + [plan.rows for plan in folder.manifest.parts])
    task: Any = ray.remote(write_part_from_staging).options(max_retries=2)
    missing = set(folder.missing_parts())
    total = folder.manifest.tokens
    done = sum(plan.tokens for plan in folder.manifest.parts if plan.name not in missing)
    todo = deque((index, plan) for index, plan in enumerate(folder.manifest.parts) if plan.name in missing)
    running: dict[Any, PartPlan] = {}
    limit = 2 * int(ray.cluster_resources().get("CPU", 1))
    while todo or running:
        while todo and len(running) < limit and not stop.requested():
            index, plan = todo.popleft()
            slices, row = [], int(firsts[index])
            while row < firsts[index + 1]:
                source = int(np.searchsorted(ends, row, side="right"))
                first_of_source = int(ends[source - 1]) if source else 0
                last = min(int(ends[source]), int(firsts[index + 1]))
                slices.append((f"source-{source:05d}.arrow", row - first_of_source, last - row))
                row = last
            arguments = (str(folder.path), plan.name, staging, slices, folder.manifest.checksum, lease.fence)
            running[task.remote(*arguments)] = plan
            crash_point("driver.assigned")
        stop.check(len(running))
        require_ray()
        ready, _ = ray.wait(list(running), num_returns=1, timeout=1)
        for reference in ready:
            try:
                ray.get(reference)
            except Exception as error:
                raise cause(error) from None
            done += running.pop(reference).tokens
            crash_point("driver.committed")
            progress("write", done, total, done)
