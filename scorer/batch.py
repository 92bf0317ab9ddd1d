"""A record batch while it is scored: its prompts, what the engine said of them, its new columns.

In: a record batch and an engine's answers. Out: the columns of one reference.
"""

from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa

from scorer.engine import Answer
from scorer.loop import EngineDied
from scorer.rowcheck import POSITIVE_TOLERANCE, fault_of_ids, fault_of_row, round_logprobs
from shards.schema import has_predecessor, list_array, list_lengths, logprobs_column, topk_columns
from shards.topk import fault_of_topk, topk_array


@dataclass
class Rows:
    """A record batch and its log-probs so far.

    present: bool [tokens], True where a log-prob exists; ids, logprobs: [tokens]; topk_ids, topk_logprobs:
    [tokens, K], None without top_k. spans: prompts as (first token, one past the last, row). faults: per bad row why.
    """

    batch: pa.RecordBatch
    first_row: int
    num_embeddings: int
    row_ends: np.ndarray
    row_lengths: np.ndarray
    present: np.ndarray
    ids: np.ndarray
    spans: list[tuple[int, int, int]]
    logprobs: np.ndarray
    topk_ids: np.ndarray | None = None
    topk_logprobs: np.ndarray | None = None
    faults: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, batch: pa.RecordBatch, first_row: int, context: str, num_embeddings: int, top_k: int) -> "Rows":
        """The rows of a batch whose first is row `first_row` of its part, without log-probs yet.

        Rows with tokens that are not in the reference's embedding, ids below num_embeddings, are bad already.
        """
        row_lengths = list_lengths(batch.column("input_ids"))
        ids = batch.column("input_ids").flatten().to_numpy()
        pieces = batch.column("doc_lengths").flatten().to_numpy().astype(np.int64)
        lengths = row_lengths if context == "packed" else pieces
        ends, row_ends = np.cumsum(lengths), np.cumsum(row_lengths)
        row_of = np.searchsorted(row_ends, ends)
        spans = [(int(end - length), int(end), int(row)) for end, length, row in zip(ends, lengths, row_of)]
        rows = cls(
            batch, first_row, num_embeddings, row_ends, row_lengths, has_predecessor(row_lengths, pieces, context), ids,
            [span for span in spans if span[1] - span[0] > 1], np.full(len(ids), np.nan, np.float32),
        )  # fmt: skip
        if top_k:  # memory that is touched only as the answers come in
            rows.topk_ids = np.zeros((len(ids), top_k), np.int32)
            rows.topk_logprobs = np.zeros((len(ids), top_k), np.float32)
        for row in range(batch.num_rows):
            fault = fault_of_ids(ids[rows.place(row)], num_embeddings)
            if fault:
                rows.faults[row] = fault
        return rows

    def place(self, row: int) -> slice:
        """Where the tokens of a row stand in the batch."""
        end = int(self.row_ends[row])
        return slice(end - int(self.row_lengths[row]), end)

    def put(self, start: int, end: int, answer: Answer) -> None:
        """Note what the engine said of the prompt of tokens start..end; nothing precedes its first."""
        self.logprobs[start + 1 : end] = answer.logprobs
        if self.topk_ids is not None and self.topk_logprobs is not None:
            if answer.topk_ids is None or answer.topk_logprobs is None:
                raise EngineDied("the engine was asked for the most probable tokens and gave none")
            self.topk_ids[start + 1 : end] = answer.topk_ids
            self.topk_logprobs[start + 1 : end] = answer.topk_logprobs

    def fault_of(self, row: int) -> str | None:
        """Why what the engine gave for a row cannot be right; None if it can."""
        place = self.place(row)
        present = self.present[place]
        logprobs = self.logprobs[place][present]
        fault = fault_of_row(logprobs)
        if fault or self.topk_ids is None or self.topk_logprobs is None:
            return fault
        fault = fault_of_topk(
            self.ids[place][present], logprobs, self.topk_ids[place][present], self.topk_logprobs[place][present],
            self.num_embeddings, largest=POSITIVE_TOLERANCE,
        )  # fmt: skip
        return fault and f"of the most probable tokens {fault}"

    def columns(self, name: str, step: float) -> dict[str, pa.Array]:
        """The columns of the reference called `name`, log-probs rounded to `step`, null where a row is bad.

        The most probable tokens are given away with them: they are large.
        """
        present = self.present.copy()
        for row in self.faults:
            present[self.place(row)] = False
        if np.isnan(self.logprobs[present]).any():
            raise EngineDied("the engine left out tokens that have a predecessor")
        values = pa.array(round_logprobs(self.logprobs, step), mask=~present)
        columns = {logprobs_column(name): list_array(values, self.row_lengths)}
        if self.topk_ids is not None and self.topk_logprobs is not None:
            topk_ids, topk_logprobs = topk_columns(name)
            rounded = round_logprobs(self.topk_logprobs, step)
            self.topk_logprobs = None
            columns[topk_ids] = list_array(topk_array(self.topk_ids, present), self.row_lengths)
            columns[topk_logprobs] = list_array(topk_array(rounded, present), self.row_lengths)
            self.topk_ids = None
        return columns
