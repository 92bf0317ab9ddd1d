"""A record batch while it is scored: its prompts, what the engine said of them, its new columns.

In: a record batch and an engine's answers. Out: the columns of one reference.
T = tokens of the batch, K = most probable tokens of each, E = columns of entropies.
"""

import numpy as np
import pyarrow as pa

from scorer.engine import Answer
from scorer.engine_thread import EngineDied
from scorer.rowcheck import POSITIVE_TOLERANCE, fault_of_ids, fault_of_row, round_logprobs, round_nats
from shards.contract import check_documents
from shards.entropy import outside
from shards.rows import Rows
from shards.samples import fault_of_samples
from shards.schema import list_array, logprobs_column, sample_column, topk_columns
from shards.topk import fault_of_topk, topk_array


class ScoredRows:
    """A record batch and its log-probs so far.

    present: bool [T], True where a log-prob exists; spans: prompts as (first token, one past the last, row);
    logprobs: [T]; topk_ids, topk_logprobs: [T, K], None without top_k; entropies: [E, T]. faults: per bad row why; rows with tokens that
    are not in the reference's embedding, ids below num_embeddings, are bad from the beginning.
    """

    def __init__(
        self,
        rows: Rows,
        context: str,
        num_embeddings: int,
        top_k: int,
        entropies: dict[str, tuple[float, float]],
        topk_limit: tuple[str, float] | None = None,
        sample_k: int = 0,
    ) -> None:
        """entropies: columns of the reference's entropy, and the range of each column's values; empty for none. topk_limit: the
        one above whose value no most probable tokens are kept; None: they are kept everywhere."""
        check_documents(rows)
        self.rows, self.num_embeddings = rows, num_embeddings
        self.present, self.spans = rows.has_predecessor(context), rows.spans(context)
        self.logprobs = np.full(len(rows.ids), np.nan, np.float32)
        # memory that is touched only as the answers come in
        self.topk_ids = np.zeros((len(rows.ids), top_k), np.int32) if top_k else None
        self.topk_logprobs = np.zeros((len(rows.ids), top_k), np.float32) if top_k else None
        self.sample_ids = np.zeros((len(rows.ids), sample_k), np.int32) if sample_k else None
        self.entropy_columns, self.topk_limit = entropies, topk_limit
        self.entropies = np.zeros((len(entropies), len(rows.ids)), np.float32)
        faults = {row: fault_of_ids(rows.ids[rows.place(row)], num_embeddings) for row in range(len(rows))}
        self.faults = {row: fault for row, fault in faults.items() if fault}

    def put(self, start: int, end: int, answer: Answer) -> None:
        """Note what the engine said of the prompt of tokens start..end; nothing precedes its first."""
        self.logprobs[start + 1 : end] = answer.logprobs
        if self.topk_ids is not None and self.topk_logprobs is not None:
            if answer.topk_ids is None or answer.topk_logprobs is None:
                raise EngineDied("the engine was asked for the most probable tokens and gave none")
            self.topk_ids[start + 1 : end] = answer.topk_ids
            self.topk_logprobs[start + 1 : end] = answer.topk_logprobs
        if self.sample_ids is not None:
            if answer.sample_ids is None:
                raise EngineDied("the engine was asked for drawn tokens and gave none")
            self.sample_ids[start + 1 : end] = answer.sample_ids
        if self.entropy_columns:
            if answer.entropies is None:
                raise EngineDied("the engine was asked for entropies and gave none")
            self.entropies[:, start + 1 : end] = answer.entropies.T

    def fault_of(self, row: int) -> str | None:
        """Why what the engine gave for a row cannot be right; None if it can."""
        place = self.rows.place(row)
        present = self.present[place]
        logprobs = self.logprobs[place][present]
        fault = fault_of_row(logprobs)
        for (column, bounds), values in zip(self.entropy_columns.items(), self.entropies[:, place]):
            bad = outside(values[present], bounds)
            if bad.any() and not fault:
                fault = f"{column} is {values[present][bad][0]:g}, expected {bounds[0]:.4g}..{bounds[1]:.4g}"
        if self.sample_ids is not None and not fault:
            fault = fault_of_samples(self.sample_ids[place][present], self.num_embeddings)
            fault = fault and f"of the drawn tokens {fault}"
        if fault or self.topk_ids is None or self.topk_logprobs is None:
            return fault
        fault = fault_of_topk(
            self.rows.ids[place][present], logprobs, self.topk_ids[place][present], self.topk_logprobs[place][present],
            self.num_embeddings, largest=POSITIVE_TOLERANCE,
        )  # fmt: skip
        return fault and f"of the most probable tokens {fault}"

    def columns(self, name: str, step: float) -> dict[str, pa.Array]:
        """The columns of the reference called `name`, log-probs rounded to `step`, null where a row is bad.

        The most probable tokens are given away with them: they are large.
        """
        present = self.present.copy()
        for row in self.faults:
            present[self.rows.place(row)] = False
        if np.isnan(self.logprobs[present]).any():
            raise EngineDied("the engine left out tokens that have a predecessor")
        values = pa.array(round_logprobs(self.logprobs, step), mask=~present)
        columns = {logprobs_column(name): list_array(values, self.rows.lengths)}
        entropies, kept = {}, present
        for (column, (least, largest)), values in zip(self.entropy_columns.items(), self.entropies):
            # what is beyond by the last bits of a float32 sum
            clipped = np.where(present, np.clip(values, np.float32(least), np.float32(largest)), np.float32(0))
            rounded = round_nats(clipped, step)
            if self.topk_limit is not None and column == self.topk_limit[0]:
                # the stored value against the whole threshold, in float64, as readers compare them
                kept = present & (rounded.astype(np.float64) <= self.topk_limit[1])
            entropies[column] = list_array(pa.array(rounded, mask=~present), self.rows.lengths)
        if self.topk_ids is not None and self.topk_logprobs is not None:
            topk_ids, topk_logprobs = topk_columns(name)
            rounded = round_logprobs(self.topk_logprobs, step)
            self.topk_logprobs = None
            columns[topk_ids] = list_array(topk_array(self.topk_ids, kept), self.rows.lengths)
            columns[topk_logprobs] = list_array(topk_array(rounded, kept), self.rows.lengths)
            self.topk_ids = None
        if self.sample_ids is not None:
            columns[sample_column(name)] = list_array(topk_array(self.sample_ids, present), self.rows.lengths)
            self.sample_ids = None
        return columns | entropies
