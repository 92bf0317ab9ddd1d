"""Recount and rehash a shard folder offline.

In: a folder. Out: a report that names every part that is not what the manifest and its commit record
say, and every row that breaks an invariant of the format. Where rows were selected, their neighbours are not those of
the corpus: nothing is expected of how a document goes on from one row to the next, nor of how many there are.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa

from shards.folder import ShardFolder
from shards.manifest import CorpusFile, PartPlan
from shards.part import METADATA_KEY
from shards.quarantine import failure_reason, read_quarantined_rows, rows_name
from shards.schema import has_predecessor, list_lengths, logprobs_column, topk_columns
from shards.topk import fault_of_topk, topk_values
from shards.verify_tokenizer import VocabularyCount, tokenizer_problems


@dataclass
class Report:
    """Counts over the verified parts, and one line per problem."""

    parts: int = 0
    bad_parts: list[str] = field(default_factory=list)
    rows: int = 0
    tokens: int = 0
    documents: int | None = None
    """Documents that have a token in some row."""
    logprobs: dict[str, int] = field(default_factory=dict)
    quarantined: dict[str, int] = field(default_factory=dict)
    """Rows per reference that have no log-probs; rows = scored + quarantined."""
    problems: list[str] = field(default_factory=list)


@dataclass
class _SourceCount:
    """What was seen of one corpus file so far, in row order."""

    rows: int = 0
    tokens: int = 0
    documents: int = 0
    bos_tokens: int = 0
    last_document: int = -1
    last_token: int = -1
    short_row: bool = False


def verify_folder(folder: ShardFolder, on_part: Callable[[PartPlan], object] = lambda plan: None) -> Report:
    """Check every part of `folder`; on_part is called after each one, for a progress bar."""
    names = folder.manifest.references
    report = Report(logprobs=dict.fromkeys(names, 0), quarantined=dict.fromkeys(names, 0))
    counts = [_SourceCount() for _ in folder.manifest.corpus]
    vocabulary = VocabularyCount(folder)
    report.problems += tokenizer_problems(folder)
    for plan in folder.manifest.parts:
        try:
            _verify_part(folder, plan, counts, vocabulary, report)
        except (ValueError, pa.ArrowException) as error:
            report.problems.append(f"{error}{failure_reason(folder.store, plan.name)}")
            report.bad_parts.append(plan.name)
            for count in counts:  # what follows a bad part must not be judged by what precedes it
                count.last_document, count.last_token, count.short_row = -1, -1, False
        on_part(plan)
    planned = {plan.name for plan in folder.manifest.parts}
    for name in folder.store.names():
        if name.endswith(".arrow") and not name.startswith(".") and name not in planned:
            report.problems.append(f"{folder.store.where(name)}: is not in the manifest; delete it")
            report.bad_parts.append(name)
    if not report.problems:  # a missing part would make every count differ
        for file, count in zip(folder.manifest.corpus, counts):
            report.problems += _compare_counts(folder, file, count)
        report.problems += vocabulary.problems()
    # with a part missing, a document that reaches over it would count twice
    report.documents = None if report.bad_parts else sum(count.documents for count in counts)
    return report


def _compare_counts(folder: ShardFolder, file: CorpusFile, count: _SourceCount) -> list[str]:
    selected = bool(folder.manifest.selections)
    expected = {"rows": file.rows, "tokens": file.tokens}
    if file.bos_tokens is not None:
        expected["bos_tokens"] = file.bos_tokens
    if not selected:
        expected["documents"] = file.documents_packed
    found = {name: getattr(count, name) for name in ("rows", "tokens", "documents", "bos_tokens")}
    problems = [
        f"{folder.path}: corpus file {file.path}: {found[key]} {key} found, the manifest says {expected[key]}"
        for key in expected
        if found[key] != expected[key]
    ]
    if file.documents_read != file.documents_packed + file.documents_empty + file.documents_rejected:
        problems.append(f"{folder.path}: corpus file {file.path}: documents read is not packed + empty + rejected")
    if not selected and count.rows and count.last_token != folder.manifest.tokenizer["eos_token_id"]:
        problems.append(f"{folder.path}: corpus file {file.path}: its last document does not end in EOS")
    return problems


def _verify_part(
    folder: ShardFolder, plan: PartPlan, counts: list[_SourceCount], vocabulary: VocabularyCount, report: Report
) -> None:
    reader = folder.open_part(plan.name)
    if json.loads(reader.schema.metadata[METADATA_KEY]) != json.loads(json.dumps(folder.part_metadata(plan.name))):
        raise ValueError(f"{folder.store.where(plan.name)}: its schema metadata is not the provenance of the manifest")
    quarantined = folder.record(plan.name).quarantined
    listed = {(entry["reference"], entry["row"]) for entry in read_quarantined_rows(folder.store, plan.name)}
    if listed != {(name, row) for name, rows in quarantined.items() for row in rows}:
        raise ValueError(
            f"{folder.store.where(rows_name(plan.name))}: its rows are not those that the commit record lists"
        )
    rows = tokens = 0
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        where = f"{folder.store.where(plan.name)}: record batch {index}"
        batch.validate(full=True)
        here = {
            name: np.isin(np.arange(rows, rows + batch.num_rows), quarantined.get(name, []))
            for name in folder.manifest.references
        }
        _verify_batch(folder, batch, here, counts, report, where)
        ids = batch.column("input_ids").flatten().to_numpy()
        vocabulary.add(ids)
        rows += batch.num_rows
        tokens += len(ids)
    if (rows, tokens) != (plan.rows, plan.tokens):
        raise ValueError(
            f"{folder.store.where(plan.name)}: {rows} rows and {tokens} tokens found, "
            f"the manifest plans {plan.rows} and {plan.tokens}"
        )
    report.parts += 1
    report.rows += rows
    report.tokens += tokens


def _verify_batch(
    folder: ShardFolder,
    batch: pa.RecordBatch,
    quarantined: dict[str, np.ndarray],
    counts: list[_SourceCount],
    report: Report,
    where: str,
) -> None:
    """quarantined: per reference bool [rows], True where the row must have no log-prob at all."""
    manifest = folder.manifest

    def expect(condition: object, what: str) -> None:
        if not condition:
            raise ValueError(f"{where}: {what}")

    for column in batch.columns:
        expect(column.null_count == 0, "a whole row is null")
    row_lengths = list_lengths(batch.column("input_ids"))
    pieces_per_row = list_lengths(batch.column("doc_lengths"))
    ids = batch.column("input_ids").flatten().to_numpy()
    piece_lengths = batch.column("doc_lengths").flatten().to_numpy()
    doc_ids = batch.column("doc_ids").flatten().to_numpy()
    source = batch.column("source").to_numpy()

    expect(
        np.all((row_lengths >= 1) & (row_lengths <= manifest.seq_len)),
        f"a row is not 1..{manifest.seq_len} long",
    )
    vocab_size = manifest.tokenizer["vocab_size"]
    expect(np.all((ids >= 0) & (ids < vocab_size)), f"a token id is not in 0..{vocab_size - 1}")
    expect(
        np.array_equal(list_lengths(batch.column("doc_ids")), pieces_per_row),
        "doc_ids and doc_lengths differ",
    )
    expect(np.all(piece_lengths >= 1), "a document piece is empty")
    expect(np.all(pieces_per_row >= 1), "a row has no document piece")
    row_of_piece = np.repeat(np.arange(batch.num_rows), pieces_per_row)
    summed = np.bincount(row_of_piece, weights=piece_lengths, minlength=batch.num_rows)
    expect(np.array_equal(summed, row_lengths), "doc_lengths do not sum to the row's length")
    expect(np.all((source >= 0) & (source < len(counts))), "source is not the index of a corpus file")

    for name, reference in manifest.references.items():
        logprobs = batch.column(logprobs_column(name))
        expect(
            np.array_equal(list_lengths(logprobs), row_lengths),
            f"{name}_logprobs and input_ids differ in length",
        )
        flat = logprobs.flatten()
        present = flat.is_valid().to_numpy(zero_copy_only=False)
        expected = has_predecessor(row_lengths, piece_lengths, reference["context"])
        expected &= ~np.repeat(quarantined[name], row_lengths)
        expect(
            np.array_equal(present, expected),
            f"{name}_logprobs is null elsewhere than where nothing precedes",
        )
        values = flat.drop_null().to_numpy().astype(np.float64)
        expect(
            np.all(np.isfinite(values) & (values <= 0)),
            f"{name}_logprobs has a value that is not finite and <= 0",
        )
        step = reference["logprob_step"]
        expect(not step or np.all(values / step % 1 == 0), f"{name}_logprobs is not a multiple of {step}")
        if reference.get("top_k"):
            _verify_topk(batch, name, reference, row_lengths, present, ids[present], values, expect)
        report.logprobs[name] += len(values)
        report.quarantined[name] += int(quarantined[name].sum())

    bos = manifest.tokenizer.get("bos_token_id")
    if bos is not None:
        expect(np.all(ids[np.cumsum(piece_lengths) - piece_lengths] == bos), "a document piece does not begin with BOS")
    row_ends = np.cumsum(row_lengths)
    piece_ends = np.cumsum(pieces_per_row)
    for row in range(batch.num_rows):
        count = counts[source[row]]
        expect(not count.short_row, "a row follows the short last row of its corpus file")
        documents = doc_ids[piece_ends[row] - pieces_per_row[row] : piece_ends[row]]
        continues = count.last_document == documents[0]
        expect(
            np.all(np.diff(documents) > 0) and documents[0] >= count.last_document,
            "documents are out of order",
        )
        row_ids = ids[row_ends[row] - row_lengths[row] : row_ends[row]]
        lengths = piece_lengths[piece_ends[row] - pieces_per_row[row] : piece_ends[row]]
        eos = manifest.tokenizer["eos_token_id"]
        expect(np.all(row_ids[np.cumsum(lengths)[:-1] - 1] == eos), "a document does not end in EOS")
        expect(manifest.selections or continues or count.last_token in (-1, eos), "a document does not end in EOS")
        count.rows += 1
        count.tokens += len(row_ids)
        count.documents += len(documents) - continues
        count.bos_tokens += 0 if bos is None else len(documents)
        count.last_document, count.last_token = int(documents[-1]), int(row_ids[-1])
        count.short_row = len(row_ids) < manifest.seq_len


def _verify_topk(
    batch: pa.RecordBatch,
    name: str,
    reference: dict[str, Any],
    row_lengths: np.ndarray,
    present: np.ndarray,
    tokens_N: np.ndarray,
    logprobs_N: np.ndarray,
    expect: Callable[[object, str], None],
) -> None:
    """present: bool [tokens], where the main column has its N log-probs, those of tokens_N."""
    entries = []
    for column in topk_columns(name):
        lists = batch.column(column)
        expect(
            np.array_equal(list_lengths(lists), row_lengths),
            f"{column} and input_ids differ in length",
        )
        flat = lists.flatten()
        expect(
            np.array_equal(flat.is_valid().to_numpy(zero_copy_only=False), present),
            f"{column} is null elsewhere than {name}_logprobs",
        )
        entries.append(topk_values(flat))
    step = reference["logprob_step"]
    topk_ids, topk_logprobs = entries
    fault = fault_of_topk(tokens_N, logprobs_N, topk_ids, topk_logprobs, reference.get("vocab_size"), step)
    expect(not fault, f"{name}_topk_ids, {name}_topk_logprobs: {fault}")
    expect(not step or np.all(topk_logprobs / step % 1 == 0), f"{name}_topk_logprobs is not a multiple of {step}")
