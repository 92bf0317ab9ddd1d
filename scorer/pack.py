"""remit pack: tokenise a corpus, append EOS, cut into rows of seq_len, write a shard folder.

In: corpus files. Out: a shard folder without log-probs. Two passes of Ray tasks: one task per corpus
file tokenises it into a staging file; then the plan is frozen, and one task per part copies its rows out
of the staging files. A rerun does what is missing. Staging stands beside the output folder until the
end, so that the output folder appears with its manifest or not at all.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import ray

from scorer.cluster import cause, ray_cluster
from scorer.corpus import BadDocument, Source, find_sources, read_documents
from scorer.rows import RowCutter
from scorer.tokenizer import describe_tokenizer, load_encoder, load_tokenizer
from shards.folder import TOKENIZER, ShardFolder
from shards.manifest import MANIFEST, CorpusFile, Manifest, PartPlan, first_difference, part_name
from shards.part import COMMITS, publish_json, sha256_file, temporary_name, write_part
from shards.schema import row_schema

TOKENS_PER_BATCH = 1 << 18  # of an Arrow record batch: what a reader decompresses at once
REJECTED = "_rejected.jsonl"


@dataclass(frozen=True)
class PackConfig:
    """Tokenise a corpus and cut it into rows of seq_len tokens."""

    corpus: list[str]
    """Files, globs or folders (.jsonl, .jsonl.gz, .jsonl.zst, .parquet), or a Hugging Face dataset as
    NAME[:CONFIG[:SPLIT]]."""
    tokenizer: str
    """Folder of the model's fast tokenizer, or its hub id."""
    out: Path
    """Shard folder to write."""
    seq_len: int = 4096
    """Tokens per row."""
    text_field: str = "text"
    """Field or column that holds the text."""
    tokens_per_shard: int = 1 << 22
    """Tokens per part; a part is what is lost at most when a scoring engine dies."""
    num_workers: int | None = None
    """Corpus files tokenised at once; default: one per CPU of the Ray cluster."""
    special_tokens: Literal["parse", "text"] = "parse"
    """Text that spells a special token, like <|endoftext|>: parse it to its id as transformers does, or
    encode it as ordinary text."""
    on_bad_document: Literal["stop", "reject"] = "stop"
    """A document that is not valid JSON, lacks the field or is not Unicode: stop, or leave it out and count it."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks and what the workers print."""

    def __post_init__(self) -> None:
        if self.seq_len < 2:
            raise ValueError(
                f"--seq-len is {self.seq_len}, expected at least 2: one-token rows have nothing to predict"
            )
        if self.tokens_per_shard < self.seq_len:
            raise ValueError(
                f"--tokens-per-shard is {self.tokens_per_shard}, expected at least --seq-len ({self.seq_len})"
            )
        if self.num_workers is not None and self.num_workers < 1:
            raise ValueError(f"--num-workers is {self.num_workers}, expected at least 1")
        if not self.corpus:
            raise ValueError("--corpus is empty, expected at least one file, folder or dataset name")

    @property
    def rows_per_part(self) -> int:
        return self.tokens_per_shard // self.seq_len

    @property
    def rows_per_batch(self) -> int:
        return max(1, min(self.rows_per_part, TOKENS_PER_BATCH // self.seq_len))


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
            staged = _stage_all(config, sources, staging, settings, progress)
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
        if not any(staging.glob("*.json")):  # nothing finished that a rerun could use
            shutil.rmtree(staging)
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
    config: PackConfig, sources: list[Source], staging: Path, settings: dict, progress: Progress
) -> list[dict]:
    """Tokenise every source that is not staged yet; returns their records in corpus order."""
    total_cpus = int(ray.cluster_resources().get("CPU", 1))
    workers = min(config.num_workers or total_cpus, len(sources))
    cpus = max(1, total_cpus // workers)
    task = ray.remote(_stage_source).options(
        num_cpus=cpus, max_retries=2, runtime_env={"env_vars": {"RAYON_NUM_THREADS": str(cpus)}}
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
                generator = task.options(num_returns="streaming").remote(
                    source, index, staging, config.tokenizer, settings, config.special_tokens
                )
                running[generator] = index
            ready, _ = ray.wait(list(running), num_returns=1, fetch_local=False)
            for generator in ready:
                update = ray.get(next(generator))
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


def _stage_source(
    source: Source, index: int, staging: Path, tokenizer: str, settings: dict, special_tokens: str
) -> Iterator[dict]:
    """Ray task: tokenise one source into staging/source-00000.arrow; yields its progress, at last its record."""
    final = staging / f"source-{index:05d}.arrow"
    record_path = final.with_suffix(".json")
    size = source.path.stat().st_size if source.path else None
    sha256 = sha256_file(source.path) if source.path else None
    key = {"path": source.name, "size": size, "sha256": sha256}
    if record_path.exists():
        record = json.loads(record_path.read_text())
        if record["key"] == key and record["settings"] == settings and sha256_file(final) == record["staged_sha256"]:
            yield {"bytes": size or 0, "tokens": record["file"]["tokens"], "record": record}
            return
        record_path.unlink()
    final.unlink(missing_ok=True)

    encoder, eos = load_encoder(tokenizer, special_tokens)
    cutter = RowCutter(settings["seq_len"], settings["rows_per_batch"], index)
    counts = dict.fromkeys(("read", "packed", "empty", "rejected"), 0)
    rejected: list[str] = []
    rows = tokens = 0
    temporary = temporary_name(final)
    try:
        with pa.ipc.new_file(temporary, row_schema(), options=pa.ipc.IpcWriteOptions(compression="zstd")) as writer:

            def write(batches: Iterator[pa.RecordBatch]) -> None:
                nonlocal rows, tokens
                for batch in batches:
                    writer.write_batch(batch)
                    rows += batch.num_rows
                    tokens += len(batch.column("input_ids").flatten())

            for documents, position in read_documents(source, settings["text_field"]):
                good: list[tuple[int, str]] = []
                for offset, document in enumerate(documents):
                    if not isinstance(document, BadDocument):
                        good.append((counts["read"] + offset, document))
                    elif settings["on_bad_document"] == "stop":
                        raise document
                    else:
                        counts["rejected"] += 1
                        rejected.append(str(document))
                counts["read"] += len(documents)
                encodings = encoder.encode_batch_fast([text for _, text in good], add_special_tokens=False)
                for (doc_id, _), encoding in zip(good, encodings):
                    ids = encoding.ids
                    if not ids:
                        counts["empty"] += 1
                        continue
                    counts["packed"] += 1
                    write(cutter.add(doc_id, np.array([*ids, eos], dtype=np.int32)))
                yield {"bytes": position, "tokens": tokens}
            write(cutter.finish())
        if source.path and (source.path.stat().st_size != size or sha256_file(source.path) != sha256):
            raise ValueError(f"{source.path}: changed while it was read; run again when nothing writes to it")
        record = {
            "key": key,
            "settings": settings,
            "staged_sha256": sha256_file(temporary),
            "file": asdict(
                CorpusFile(
                    **key,
                    **{f"documents_{kind}": count for kind, count in counts.items()},
                    rows=rows,
                    tokens=tokens,
                )
            ),
            "rejected": rejected,
        }
        os.rename(temporary, final)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    publish_json(record, record_path)
    yield {"bytes": size or 0, "tokens": tokens, "record": record}


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
    parts = []
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
    task = ray.remote(_write_part_from_staging)
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


def _write_part_from_staging(
    out: Path, part: str, staging: Path, slices: list[tuple[str, int, int]], rows_per_batch: int
) -> None:
    """Ray task: copy the rows of one part (file, first row, number of rows) out of the staging files."""
    tables = []
    for name, first, count in slices:
        reader = pa.ipc.open_file(pa.memory_map(str(staging / name)))
        # every staged batch but the last has rows_per_batch rows
        low, high = first // rows_per_batch, (first + count - 1) // rows_per_batch
        table = pa.Table.from_batches([reader.get_batch(index) for index in range(low, high + 1)])
        tables.append(table.slice(first - low * rows_per_batch, count))
    table = pa.concat_tables(tables).combine_chunks()
    batches = table.to_batches(max_chunksize=rows_per_batch)
    write_part(out, part, row_schema(), Manifest.read(out).provenance(), batches)
