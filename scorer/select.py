"""remit select: difference sampling of MiniPLM (arXiv 2410.17215), from log-probs that are stored already.

In: a complete shard folder with the log-probs of a teacher and of a small reference. Out: a shard folder with the
share of its rows that the teacher predicts best compared with the small reference, in corpus order, all columns kept.
Two passes, each over one part after the other in threads: the first reads the two columns and keeps a float64 per row,
the second reads the rows that stay and writes them. The same command again writes the parts that are missing.
"""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

from scorer.config import SelectConfig
from scorer.ranking import CorpusRows, best_rows, part_scores, plan_selection
from scorer.stopping import Stopped
from shards.contract import check
from shards.crash import crash_point
from shards.folder import ShardFolder
from shards.lease import Lease
from shards.manifest import MANIFEST, Manifest
from shards.output_folder import SHARD_FOLDERS, as_begun, begin_shards, instead_of, refuse_other, require_empty, writing
from shards.part import write_part
from shards.quarantine import read_quarantined_rows, write_quarantined_rows
from shards.record import CommitRecord
from shards.store import Store, open_store

Progress = Callable[[str, int, int], None]
"""Called as progress("rank" or "write", tokens done, tokens in all)."""
ShouldStop = Callable[[], bool]
Result = TypeVar("Result")
OPTIONS = ("teacher", "small", "keep_ratio")
"""Fields of a selection that options decide."""
MAX_WORKERS = 8  # unless more are asked for: each holds a decompressed part


@dataclass(frozen=True)
class KeptRows:
    """Rows of an input part that stay. first, end: their places among all kept rows; quarantined: entries of the side
    file, each row counted from the first of these rows."""

    first: int
    end: int
    table: pa.Table
    quarantined: list[dict[str, Any]]


def select(
    config: SelectConfig,
    progress: Progress = lambda phase, done, total: None,
    should_stop: ShouldStop = lambda: False,
    note: Callable[[str], None] = lambda line: None,
) -> ShardFolder:
    """Select rows of `config.shards` into `config.out`; returns the complete folder.

    Raises ValueError with value, expectation and remedy before anything is written for input that does not fit
    together, RuntimeError where another driver writes to the folder, Stopped where should_stop said so: what is being
    written then is finished, nothing else is begun. note: told what takes long.
    """
    shards, out = ShardFolder(config.shards), open_store(config.out)
    shards.require_complete()
    shards.require_one_context(config.teacher, config.small)
    require_empty(out, MANIFEST, "a shard folder")
    asked = {
        "method": "miniplm",
        "teacher": config.teacher,
        "small": config.small,
        "keep_ratio": config.keep_ratio,
        "source_manifest_sha256": shards.manifest.checksum,
    }
    refuse_other_selection(out, shards.manifest, asked)
    with writing(out, note, SHARD_FOLDERS) as lease:
        refuse_other_selection(out, shards.manifest, asked)  # another driver may have had the lease since we looked
        if out.size(MANIFEST) is None or ShardFolder(out).missing_parts():
            workers = config.num_workers or min(MAX_WORKERS, len(os.sched_getaffinity(0)))
            corpus = CorpusRows(shards.manifest)
            scores = score_rows(shards, corpus, config, workers, progress, should_stop)
            places, lowest = best_rows(scores, config.keep_ratio)
            counts = {
                "rows_read": len(scores),
                "rows_unscored": int(np.count_nonzero(np.isnan(scores))),
                "rows_kept": len(places),
                "lowest_score_kept": lowest,
            }
            manifest = as_begun(out, plan_selection(shards.manifest, corpus, places, asked | counts))
            del scores
            refuse_other_plan(out, manifest)
            folder = begin_shards(shards, out, manifest, lease)
            crash_point("driver.planned")
            folder.require_sizes()
            write_parts(shards, folder, places, lease, workers, progress, should_stop)
        else:
            ShardFolder(out).require_sizes()
        crash_point("driver.finished")
    return ShardFolder(out)


def refuse_other_selection(out: Store, source: Manifest, asked: dict[str, Any]) -> None:
    """ValueError where `out` was begun with other settings, or from another folder, than `asked` now."""
    if out.size(MANIFEST) is None:
        return
    there = list(Manifest.read(out).selections)
    if there:
        there[-1] = {key: there[-1].get(key) for key in asked}
    options = {f"selections[{len(there) - 1}].{name}": f"--{name.replace('_', '-')}" for name in OPTIONS}
    ours, theirs = {"selections": [*source.selections, asked]}, {"selections": there}
    refuse_other(out.url, "selection", ours, theirs, instead_of(ShardFolder(out)), options)


def refuse_other_plan(out: Store, manifest: Manifest) -> None:
    """ValueError where `out` holds something else than `manifest` plans."""
    if out.size(MANIFEST) is not None:
        there = ShardFolder(out)
        refuse_other(out.url, "selection", manifest.provenance(), there.manifest.provenance(), instead_of(there))


@contextmanager
def threads(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads for parts. At the end, whatever its cause, none runs any more and nothing else begins."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="select")
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def in_order(
    pool: ThreadPoolExecutor, function: Callable[[int], Result], parts: Iterable[int], ahead: int
) -> Iterator[Result]:
    """Results in the order of the parts; at most `ahead` of them are in work or wait to be taken."""
    waiting: deque[Future[Result]] = deque()
    for part in parts:
        waiting.append(pool.submit(function, part))
        if len(waiting) >= ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def score_rows(
    shards: ShardFolder,
    corpus: CorpusRows,
    config: SelectConfig,
    workers: int,
    progress: Progress,
    should_stop: ShouldStop,
) -> np.ndarray:
    """First pass: score of every row in corpus order, float64 [N], NaN where it has none."""
    manifest = shards.manifest
    scores = np.empty(manifest.rows)
    done = first = 0
    progress("rank", done, manifest.tokens)
    with threads(workers) as pool:
        score = partial(part_scores, shards, corpus, config.teacher, config.small)
        for plan, values in zip(manifest.parts, in_order(pool, score, range(len(manifest.parts)), workers + 1)):
            scores[first : first + plan.rows] = values
            first, done = first + plan.rows, done + plan.tokens
            progress("rank", done, manifest.tokens)
            if should_stop():
                raise Stopped("stopped by a signal")
    return scores


def write_parts(
    shards: ShardFolder,
    folder: ShardFolder,
    places: np.ndarray,
    lease: Lease,
    workers: int,
    progress: Progress,
    should_stop: ShouldStop,
) -> None:
    """Second pass: write the parts that `folder` still lacks. places: kept rows, int64 [K] in corpus order.

    Each input part is opened once, because the parts that need it follow each other. In memory are the parts that
    the threads read ahead or write, and the rows of the part to write next.
    """
    size, plans, unwritten = folder.manifest.rows_per_part, folder.manifest.parts, set(folder.missing_parts())
    missing = [index for index, plan in enumerate(plans) if plan.name in unwritten]
    share = sum(plans[index].rows for index in missing) / shards.manifest.rows
    folder.store.require_free(int(shards.store.used_bytes() * share), "the selection")
    needed = sorted({int(part) for index in missing for part in np.unique(places[index * size :][:size] // size)})
    total = folder.manifest.tokens
    done = total - sum(plans[index].tokens for index in missing)
    progress("write", done, total)
    held: deque[KeptRows] = deque()
    writing: deque[Future[CommitRecord]] = deque()

    def finish_one() -> None:
        nonlocal done
        done += writing.popleft().result().tokens
        crash_point("driver.committed")
        progress("write", done, total)

    with threads(workers) as pool:
        half = workers // 2 + 1  # a part is read in about the time that another is written
        reads = in_order(pool, partial(read_kept, shards, places), needed, half)
        for index in missing:
            if should_stop():
                break
            first, end = index * size, index * size + plans[index].rows
            while held and held[0].end <= first:
                held.popleft()
            while not held or held[-1].end < end:
                held.append(next(reads))
            crash_point("driver.assigned")
            writing.append(pool.submit(write_selected, folder, index, list(held), lease))
            while len(writing) > half:
                finish_one()
        while writing:
            finish_one()
    if done < total:
        raise Stopped("stopped by a signal")


def read_kept(shards: ShardFolder, places: np.ndarray, part: int) -> KeptRows:
    """The rows of input part `part` that are among `places`, int64 [K]."""
    manifest, name = shards.manifest, shards.manifest.parts[part].name
    first_row = part * manifest.rows_per_part
    first, end = np.searchsorted(places, [first_row, first_row + manifest.parts[part].rows]).tolist()
    rows = places[first:end] - first_row
    reader = shards.open_rows(name)
    batches = []
    for index in range(len(reader)):
        begin = index * manifest.rows_per_batch
        here = rows[slice(*np.searchsorted(rows, [begin, begin + manifest.rows_per_batch]))] - begin
        if len(here):
            batches.append(check(reader.batch(index)).batch.take(pa.array(here)))
    table = pa.Table.from_batches(batches).replace_schema_metadata(None)
    listed = {(reference, row) for reference, rows_of_it in reader.quarantined.items() for row in rows_of_it}
    entries = read_quarantined_rows(shards.store, name) if listed else []
    if listed != {(entry["reference"], entry["row"]) for entry in entries}:
        raise ValueError(f"{shards.store.where(name)}: its quarantined rows are not those it lists; run remit verify")
    place_of = {int(row): place for place, row in enumerate(rows)} if entries else {}
    kept = [entry | {"row": place_of[entry["row"]]} for entry in entries if entry["row"] in place_of]
    return KeptRows(first, end, table, kept)


def write_selected(folder: ShardFolder, index: int, pieces: list[KeptRows], lease: Lease) -> CommitRecord:
    """Write part `index` of the selection from the kept rows of consecutive input parts, and commit it."""
    manifest, plan = folder.manifest, folder.manifest.parts[index]
    first = index * manifest.rows_per_part
    end = first + plan.rows
    tables, side = [], []
    for piece in pieces:
        start, stop = max(first, piece.first), min(end, piece.end)
        tables.append(piece.table.slice(start - piece.first, stop - start))
        for entry in piece.quarantined:
            if start <= piece.first + entry["row"] < stop:
                side.append(entry | {"row": piece.first + entry["row"] - first})
    table = pa.concat_tables(tables)
    starts = range(0, plan.rows, manifest.rows_per_batch)
    batches = []
    for start in starts:
        (batch,) = table.slice(start, manifest.rows_per_batch).combine_chunks().to_batches()
        batches.append(batch)
    quarantined: dict[str, list[int]] = {}
    for entry in sorted(side, key=lambda entry: entry["row"]):
        quarantined.setdefault(entry["reference"], []).append(entry["row"])
    lease.check()
    write_quarantined_rows(folder.store, plan.name, side)
    metadata = manifest.part_metadata(index)
    return write_part(folder.store, plan.name, folder.schema, metadata, batches, quarantined, lease.check)
