"""Recount and rehash a shard folder offline.

In: a folder. Out: a report that names every part that is not what the manifest and its commit record
say, and every row that breaks an invariant of the format. How rows follow one another is in shards/follow.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from shards.contract import check, fail, refuse_pieces
from shards.folder import ShardFolder
from shards.follow import Followed, follow
from shards.manifest import CorpusFile, PartPlan
from shards.quarantine import failure_reason, require_same_rows
from shards.rows import Rows
from shards.side_table import table_problems
from shards.verify_tokenizer import VocabularyCount, tokenizer_problems

NAMES = {"predicted_tokens": "tokens to predict", "without_eos": "documents without EOS"}
"""What messages call some of the counts."""


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


def verify_folder(folder: ShardFolder, on_part: Callable[[PartPlan], object] = lambda plan: None) -> Report:
    """Check every part of `folder`; on_part is called after each one, for a progress bar."""
    names = folder.manifest.references
    report = Report(logprobs=dict.fromkeys(names, 0), quarantined=dict.fromkeys(names, 0))
    counts = [follow(folder.manifest, file) for file in folder.manifest.corpus]
    vocabulary = VocabularyCount(folder)
    report.problems += tokenizer_problems(folder) + table_problems(folder)
    for plan in folder.manifest.parts:
        try:
            _verify_part(folder, plan, counts, vocabulary, report)
        except (ValueError, pa.ArrowException) as error:
            report.problems.append(f"{error}{failure_reason(folder.store, plan.name)}")
            report.bad_parts.append(plan.name)
            for count in counts:
                count.forget()
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


def _compare_counts(folder: ShardFolder, file: CorpusFile, count: Followed) -> list[str]:
    selected, problems = bool(folder.manifest.selections), []
    try:
        count.finish()
    except ValueError as error:
        problems.append(f"{folder.path}: corpus file {file.path}: {error}")
    expected = {"rows": file.rows, "tokens": file.tokens}
    if file.bos_tokens is not None:
        expected["bos_tokens"] = file.bos_tokens
    if file.predicted_tokens is not None:
        expected["predicted_tokens"] = file.predicted_tokens
    if not selected:
        expected["documents"] = file.documents_packed
        expected |= {} if file.without_eos is None else {"without_eos": file.without_eos}
    found = {name: getattr(count, name) for name in expected}
    problems += [
        f"{folder.path}: corpus file {file.path}: {found[key]} {NAMES.get(key, key)} found, the manifest says {expected[key]}"
        for key in expected
        if found[key] != expected[key]
    ]
    if file.documents_read != file.documents_packed + file.documents_empty + file.documents_rejected:
        problems.append(f"{folder.path}: corpus file {file.path}: documents read is not packed + empty + rejected")
    return problems


def _verify_part(
    folder: ShardFolder, plan: PartPlan, counts: list[Followed], vocabulary: VocabularyCount, report: Report
) -> None:
    part = folder.open_whole_rows(plan.name)
    require_same_rows(folder.store, plan.name, part.quarantined)
    tokens = 0
    for number in range(len(part)):
        rows = check(part.batch(number))
        for name in folder.manifest.references:
            scored = rows.scored(name)
            report.logprobs[name] += int(np.count_nonzero(rows.predicted(name)))
            report.quarantined[name] += int(np.count_nonzero(~scored))
        _follow_documents(rows, counts)
        vocabulary.add(rows.ids)
        tokens += len(rows.ids)
    if tokens != plan.tokens:
        raise ValueError(f"{folder.store.where(plan.name)}: {tokens} tokens found, the manifest plans {plan.tokens}")
    report.parts += 1
    report.rows += plan.rows
    report.tokens += tokens


def _follow_documents(rows: Rows, counts: list[Followed]) -> None:
    """Count rows and documents of each corpus file; ValueError where a row does not go on where the one before ended."""
    bos = rows.part.manifest.tokenizer.get("bos_token_id")
    first_D = np.cumsum(rows.doc_lengths) - rows.doc_lengths
    if bos is not None:
        refuse_pieces(rows, rows.ids[first_D] != bos, "a document piece does not begin with BOS")
    for row in range(len(rows)):
        count, pieces = counts[rows.source[row]], rows.piece_place(row)
        documents = rows.doc_ids[pieces]
        try:
            count.add(rows.ids[rows.place(row)], documents, rows.doc_lengths[pieces])
        except ValueError as error:
            fail(rows, row, str(error))
        count.bos_tokens += 0 if bos is None else len(documents)
        count.predicted_tokens += int(np.count_nonzero(rows.predict[rows.place(row)]))
