"""Rows of a shard folder with the log-probs of two references, in the order of the corpus, for remit plan --weights.

N = predicted tokens of a row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from shards.folder import ShardFolder
from shards.manifest import Manifest
from shards.schema import has_predecessor, logprobs_column

MOST_PARTS = 64


@dataclass(frozen=True)
class ScoredRow:
    """tokens: length of the row. Of its predicted tokens: ids_N, int64; document_N, int64, the document piece of each;
    reference_N and base_N, float32, log p."""

    tokens: int
    ids_N: np.ndarray
    document_N: np.ndarray
    reference_N: np.ndarray
    base_N: np.ndarray


def choose_context(folder: ShardFolder, reference: str, base: str) -> str:
    """The context that both columns were scored in; ValueError where one is missing or the two cannot be compared."""
    contexts = {}
    for name in (reference, base):
        entry = folder.require_reference(name)
        contexts[name] = entry["context"]
        if entry.get("engine") == "fake":
            raise ValueError(
                f"{folder.path}: {logprobs_column(name)} comes from the fake engine, not from a model; score again "
                "without --engine fake"
            )
    if contexts[reference] != contexts[base]:
        raise ValueError(
            f"{folder.path}: {logprobs_column(reference)} was scored in {contexts[reference]} context, "
            f"{logprobs_column(base)} in {contexts[base]} context, expected the same; score one of them again"
        )
    return contexts[reference]


def choose_rows(manifest: Manifest, wanted: int, seed: int) -> np.ndarray:
    """`wanted` of the rows at random, ascending, int64; 0, or at least as many as there are: all of them.

    Of a large folder the rows of 64 random parts are drawn from, or of as many as it takes: every part that is touched
    is read and hashed whole.
    """
    everything = np.arange(manifest.rows)
    if wanted == 0 or wanted >= manifest.rows:
        return everything
    rng = np.random.default_rng(seed)
    num_parts = max(MOST_PARTS, -(-2 * wanted // manifest.rows_per_part))
    if num_parts < len(manifest.parts):
        parts = rng.choice(len(manifest.parts), num_parts, replace=False)
        everything = everything[np.isin(everything // manifest.rows_per_part, parts)]
    return np.sort(rng.choice(everything, min(wanted, len(everything)), replace=False, shuffle=False))


def read_batches(
    folder: ShardFolder, context: str, reference: str, base: str, chosen: np.ndarray
) -> Iterator[list[ScoredRow | None]]:
    """The chosen rows of one record batch after the other, in the order of the corpus; None for a quarantined row.

    Each part is opened, and so hashed, once. ValueError names the row that breaks a promise of the format.
    """
    manifest = folder.manifest
    vocabulary = manifest.tokenizer["vocab_size"]
    columns = ["input_ids", "doc_lengths", logprobs_column(reference), logprobs_column(base)]
    for index, plan in enumerate(manifest.parts):
        first = index * manifest.rows_per_part
        own = chosen[slice(*np.searchsorted(chosen, [first, first + plan.rows]))] - first
        if not len(own):
            continue
        reader, quarantined = folder.open_part(plan.name, columns), folder.record(plan.name).quarantined
        left_out = {*quarantined.get(reference, []), *quarantined.get(base, [])}
        where, size = folder.store.where(plan.name), manifest.rows_per_batch
        for number in np.unique(own // size).tolist():
            batch = reader.get_batch(number) if number < reader.num_record_batches else None
            expected = min(size, plan.rows - number * size)
            if batch is None or batch.num_rows != expected:
                raise ValueError(f"{where}: record batch {number} has not {expected} rows; write the folder again")
            rows = []
            for row in own[own // size == number].tolist():
                values = [batch.column(name)[row - number * size].values for name in columns]
                arrays = [value.to_numpy(zero_copy_only=False) for value in values]
                rows.append(None if row in left_out else _row(f"{where} row {row}", arrays, context, vocabulary))
            yield rows


def _row(where: str, arrays: list[np.ndarray], context: str, vocabulary: int) -> ScoredRow:
    """A row from ids, lengths of its document pieces, and both columns, in which null has become NaN."""
    ids, lengths, *columns = arrays
    if not 0 < len(ids) == lengths.sum():
        raise ValueError(f"{where}: doc_lengths sum to {lengths.sum()}, the row has {len(ids)} tokens")
    if ids.min() < 0 or ids.max() >= vocabulary:
        raise ValueError(f"{where}: token ids from {ids.min()} to {ids.max()}, expected 0..{vocabulary - 1}")
    predicted = has_predecessor(np.array([len(ids)]), lengths, context)
    for values in columns:
        present = values[predicted]
        if not np.all(np.isfinite(present) & (present <= 0)) or not np.all(np.isnan(values[~predicted])):
            raise ValueError(
                f"{where}: a log-prob is missing, not finite or positive; run remit verify, then score the part again"
            )
    document = np.repeat(np.arange(len(lengths)), lengths)
    return ScoredRow(len(ids), ids[predicted].astype(np.int64), document[predicted], *(c[predicted] for c in columns))
