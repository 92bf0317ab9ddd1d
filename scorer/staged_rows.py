"""The rows of one corpus file, written to its staging file as documents come, and what is counted on the way."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from scorer.best_fit import BestFitCutter, encode_lengths
from scorer.cutter import RowCutter
from scorer.vocabulary import pack_bits
from shards.packing import Window
from shards.schema import PREDICT, list_lengths


class StagedRows:
    """Cuts documents into rows and counts these.

    index: of the file in the corpus. bos: with which the pieces of rows begin, None for none. masked: whether documents say
    what is to be predicted. vocabulary: one more than the largest id.
    """

    def __init__(self, settings: dict, index: int, bos: int | None, masked: bool, vocabulary: int) -> None:
        packing = settings.get("packing")
        of_rows = (settings["seq_len"], settings["rows_per_batch"], index, bos, masked)
        self.cutter = BestFitCutter(*of_rows, Window.of(packing)) if packing else RowCutter(*of_rows)
        self._keeps_lengths = bool(packing)  # else they follow from a row's number
        self._masked = masked
        self._occurrences_V = np.zeros(vocabulary, dtype=np.int64)
        self.clear()

    def clear(self) -> None:
        """Count from nothing."""
        self.rows = self.tokens = self.predicted_tokens = self.cutter.bos_tokens = 0
        self._occurrences_V[:] = 0
        self._lengths: list[np.ndarray] = []

    def write(self, writer: pa.ipc.RecordBatchFileWriter, ready: Iterator[pa.RecordBatch]) -> None:
        """Write record batches that the cutter gave."""
        for batch in ready:
            writer.write_batch(batch)
            self.rows += batch.num_rows
            if self._keeps_lengths:
                self._lengths.append(list_lengths(batch.column("input_ids")))
            ids = batch.column("input_ids").flatten().to_numpy()
            self.tokens += len(ids)
            self.predicted_tokens += batch.column(PREDICT).flatten().true_count if self._masked else len(ids)
            self._occurrences_V += np.bincount(ids, minlength=len(self._occurrences_V))

    def times(self, token: int) -> int:
        """How often a token occurs."""
        return int(self._occurrences_V[token])

    def occurring(self) -> str:
        """Which tokens occur, as bits."""
        return pack_bits(self._occurrences_V > 0)

    def lengths(self) -> str | None:
        """Of the rows, encoded; None where all but the last have seq_len tokens."""
        return encode_lengths(self._lengths) if self._keeps_lengths else None
