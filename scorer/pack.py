"""remit pack: tokenise a corpus, append EOS, cut into rows of seq_len, write a shard folder.

In: corpus files. Out: a shard folder without log-probs. Two passes of Ray tasks: one task per corpus
file tokenises it into a staging file; then the plan is frozen, and one task per part copies its rows out
of the staging files. A rerun does what is missing. Staging stands beside the output folder until the
end, so that the output folder appears with its manifest or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray

from scorer.cluster import cause, ray_cluster
from scorer.config import PackConfig
from scorer.corpus import Source, find_sources
from scorer.staging import stage_source, write_part_from_staging
from scorer.tokenizer import describe_tokenizer, load_tokenizer
from shards.folder import TOKENIZER, ShardFolder
from shards.manifest import MANIFEST, CorpusFile, Manifest, PartPlan, first_difference, part_name
from shards.part import COMMITS, sha256_file, temporary_name

REJECTED = "_rejected.jsonl"
KEEP_STAGING_BYTES = 1 << 26


Progress = Callable[[str, int, int, int], None]
"""Called as progress(phase, done, total, tokens): bytes of the corpus files while it tokenises, tokens
while it writes parts."""


def pack(config: PackConfig, progress: Progress = lambda phase, done, total, tokens: None) -> ShardFolder:
    """Pack `config.corpus` into `config.out`; returns the complete folder.

    Raises ValueError with file, value and remedy for bad input; then the output folder does not exist.
    """
    # Ray workers may have another working directory
    config = replace(config, out=config.out.absolute(), tokenizer=str(Path(config.tokenizer).absolute()))
    sources = find_sources(config.corpus)
    tokenizer = load_tokenizer(config.tokenizer)
    description = describe_tokenizer(tokenizer, config.special_tokens)
    settings = {
        "seq_len": config.seq_len,
        "tokenizer": description,
        "text_field": config.text_field,
        "rows_per_batch": config.rows_per_batch,
        "on_bad_document": config.on_bad_document,
    }
    if (config.out / MANIFEST).exists():
        folder = ShardFolder(config.out)
        _refuse_other_plan(config, folder, sources, description)
        if not folder.missing_parts():
            return folder
    elif config.out.exists() and any(config.out.iterdir()):
        raise ValueError(f"{config.out}: is not empty and not a shard folder; choose another --out or empty it")

    staging = config.out.with_name(f".{config.out.name}.staging")
    staging.mkdir(parents=True, exist_ok=True)
    try:
        with ray_cluster(config.debug):
            staged = _stage_all(config, sources, staging, tokenizer.backend_tokenizer.to_str(), settings, progress)
            manifest = _plan(config, staged, description)
            config.out.mkdir(parents=True, exist_ok=True)
            (config.out / COMMITS).mkdir(exist_ok=True)
            if not (config.out / TOKENIZER).exists():
                _save_tokenizer(tokenizer, config.out)
            _save_rejected(staged, config.out)
            manifest.write(config.out)
            folder = ShardFolder(config.out)
            _write_parts(config, folder, staging, staged, progress)
    finally:
        # after a failure, staging is kept for the rerun only where it saves time
        if sum(file.stat().st_size for file in staging.iterdir()) < KEEP_STAGING_BYTES:
            shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(staging, ignore_errors=True)
    return folder


def _save_tokenizer(tokenizer: Any, out: Path) -> None:
    temporary = temporary_name(out / TOKENIZER)
    tokenizer.save_pretrained(temporary)
    os.rename(temporary, out / TOKENIZER)


def _save_rejected(staged: list[dict], out: Path) -> None:
    """List the documents that were left out, with the reason of each, in _rejected.jsonl."""
    lines = [
        json.dumps({"source": index, "path": record["file"]["path"], "reason": reason}, ensure_ascii=False)
        for index, record in enumerate(staged)
        for reason in record["rejected"]
    ]
    if lines:
        (out / REJECTED).write_text("\n".join(lines) + "\n", encoding="utf-8")


def _refuse_other_plan(config: PackConfig, folder: ShardFolder, sources: list[Source], tokenizer: dict) -> None:
    """ValueError where `folder` was packed from something else than is asked for now."""
    manifest = folder.manifest
    corpus: list[dict] = [{"path": file.path, "size": file.size, "sha256": file.sha256} for file in manifest.corpus]
    asked: list[dict] = [
        {"path": source.name, "size": None, "sha256": None}
        if source.path is None
        else {"path": source.name, "size": source.path.stat().st_size, "sha256": sha256_file(source.path)}
        for source in sources
    ]
    layout = ("seq_len", "rows_per_part", "rows_per_batch")
    difference = first_difference(
        {name: getattr(config, name) for name in layout} | {"tokenizer": tokenizer, "corpus": asked, "references": []},
        {name: getattr(manifest, name) for name in layout}
        | {"tokenizer": manifest.tokenizer, "corpus": corpus, "references": sorted(manifest.references)},
    )
    if difference:
        raise ValueError(f"{folder.path}: holds another pack: {difference}; choose another --out or delete it")


# --- first pass: one task per corpus file ---------------------------------------------------------------


def _stage_all(
    config: PackConfig,
    sources: list[Source],
    staging: Path,
    tokenizer_json: str,
    settings: dict,
    progress: Progress,
) -> list[dict]:
    """Tokenise every source that is not staged yet; returns their records in corpus order."""
    total_cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = min(config.num_workers or total_cpus, len(sources))
    cpus = max(1, total_cpus // workers)
    task: Any = ray.remote(stage_source).options(
        num_returns="streaming",
        num_cpus=cpus,
        max_retries=2,
        runtime_env={"env_vars": {"RAYON_NUM_THREADS": str(cpus)}},
    )
    records: list[dict] = [{}] * len(sources)
    waiting = list(enumerate(sources))
    running: dict[Any, int] = {}
    total = sum(source.path.stat().st_size for source in sources if source.path)
    done: dict[int, tuple[int, int]] = {}  # bytes and tokens per source
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                index, source = waiting.pop(0)
                generator = task.remote(source, index, staging, tokenizer_json, settings)
                running[generator] = index
            ready: Any = ray.wait(list(running), num_returns=1, fetch_local=False)[0]
            for generator in ready:
                update: Any = ray.get(next(generator))
                index = running[generator]
                done[index] = update["bytes"], update["tokens"]
                if "record" in update:
                    records[index] = update["record"]
                    del running[generator]
            bytes_done, tokens = np.sum(list(done.values()), axis=0).tolist() if done else (0, 0)
            progress("tokenise", bytes_done, total, tokens)
    except BaseException as error:
        for generator in running:
            ray.cancel(generator, force=False)
        raise cause(error) from None
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
    config: PackConfig, folder: ShardFolder, staging: Path, staged: list[dict], progress: Progress
) -> None:
    ends = np.cumsum([record["file"]["rows"] for record in staged])
    firsts = np.cumsum([0] + [plan.rows for plan in folder.manifest.parts])
    task: Any = ray.remote(write_part_from_staging)
    missing = set(folder.missing_parts())
    total = folder.manifest.tokens
    done = sum(plan.tokens for plan in folder.manifest.parts if plan.name not in missing)
    todo = [(index, plan) for index, plan in enumerate(folder.manifest.parts) if plan.name in missing]
    running: dict[Any, PartPlan] = {}
    limit = 2 * int(ray.cluster_resources().get("CPU", 1))
    while todo or running:
        while todo and len(running) < limit:
            index, plan = todo.pop(0)
            slices, row = [], int(firsts[index])
            while row < firsts[index + 1]:
                source = int(np.searchsorted(ends, row, side="right"))
                first_of_source = int(ends[source - 1]) if source else 0
                stop = min(int(ends[source]), int(firsts[index + 1]))
                slices.append((f"source-{source:05d}.arrow", row - first_of_source, stop - row))
                row = stop
            running[task.remote(folder.path, plan.name, staging, slices, config.rows_per_batch)] = plan
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            try:
                ray.get(reference)
            except Exception as error:
                raise cause(error) from None
            done += running.pop(reference).tokens
            progress("write", done, total, done)
