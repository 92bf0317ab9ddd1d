"""Put whole documents into rows: remit pack --packing best-fit, by the rule of shards/packing.py.

In: tokenised documents in order. Out: record batches of rows. In memory are one window and the rows of one batch.
"""

import base64
import zlib
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa

from scorer.cutter import predicted, with_bos
from scorer.documents import TokenDocument
from shards.packing import Window, best_fit
from shards.schema import list_array, row_schema

Piece = tuple[int, np.ndarray, np.ndarray | None]
"""Of a document: its number, ids int32 [T], and which of them are to be predicted, bool [T], or None without that column."""


class BestFitCutter:
    """As scorer/cutter.py's RowCutter, with rows that begin with a document, and documents that are cut only where they
    are longer than a row. rows may be short."""

    def __init__(
        self,
        seq_len: int,
        rows_per_batch: int,
        source: int,
        bos: int | None = None,
        predict: bool = False,
        window: Window | None = None,
    ) -> None:
        self.seq_len, self.rows_per_batch, self.source, self.bos = seq_len, rows_per_batch, source, bos
        self.schema = row_schema(predict=predict)
        self.bos_tokens = 0
        self._has_predict, self._window = predict, window or Window()
        self._waiting: list[Piece] = []  # of the open window
        self._tokens = 0  # of these
        self._rows: list[list[Piece]] = []  # less than a batch

    def add(self, doc_id: int, document: TokenDocument) -> Iterator[pa.RecordBatch]:
        """Append one document, which has a token at least; yields the batches that it fills."""
        if self.bos is not None:  # each piece begins with one, so it has a token less of its own
            own = len(document.ids) - document.has_bos
            starts = list(range(0, max(own, 1), self.seq_len - 1))
            self.bos_tokens += len(starts)
            document = with_bos(document, self.bos, starts)
        predict = predicted(document) if self._has_predict else None
        for start in range(0, len(document.ids), self.seq_len):
            here = slice(start, start + self.seq_len)
            piece = doc_id, document.ids[here], None if predict is None else predict[here]
            if len(piece[1]) == self.seq_len:
                self._rows.append([piece])
            else:
                self._waiting.append(piece)
                self._tokens += len(piece[1])
        if self._window.is_full(len(self._waiting), self._tokens):
            self._close()
        while len(self._rows) >= self.rows_per_batch:
            yield self._batch(self.rows_per_batch)

    def add_many(self, doc_ids: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Append documents as `add` does, all to be predicted and without BOS, one after the other in ids, int32: ordinals
        and lengths, int64 [D] each."""
        ends = np.cumsum(lengths)
        for doc_id, end, length in zip(doc_ids.tolist(), ends.tolist(), lengths.tolist()):
            yield from self.add(doc_id, TokenDocument(ids[end - length : end]))

    def finish(self) -> Iterator[pa.RecordBatch]:
        """The rest: full batches and the last one."""
        self._close()
        while self._rows:
            yield self._batch(self.rows_per_batch)

    def _close(self) -> None:
        """Make rows of the pieces of the window."""
        rows = best_fit([len(ids) for _, ids, _ in self._waiting], self.seq_len)
        self._rows += [[self._waiting[place] for place in row] for row in rows]
        self._waiting, self._tokens = [], 0

    def _batch(self, num_rows: int) -> pa.RecordBatch:
        """The first rows, `num_rows` or as many as there are."""
        rows, self._rows = self._rows[:num_rows], self._rows[num_rows:]
        pieces = [piece for row in rows for piece in row]
        lengths = np.array([len(ids) for _, ids, _ in pieces])
        pieces_R = np.array([len(row) for row in rows])
        lengths_R = np.add.reduceat(lengths, np.cumsum(pieces_R) - pieces_R)
        columns = [
            list_array(pa.array(np.concatenate([ids for _, ids, _ in pieces])), lengths_R),
            list_array(pa.array(lengths.astype(np.int32)), pieces_R),
            list_array(pa.array(np.array([doc_id for doc_id, _, _ in pieces], dtype=np.int64)), pieces_R),
            pa.array(np.full(len(rows), self.source, dtype=np.int32)),
        ]
        if self._has_predict:
            columns.append(list_array(pa.array(np.concatenate([predict for _, _, predict in pieces])), lengths_R))
        return pa.record_batch(columns, schema=self.schema)


def encode_lengths(lengths: Sequence[np.ndarray]) -> str:
    """The tokens of each row of a source as text for its record."""
    flat = np.concatenate([np.zeros(0, np.int64), *lengths]).astype("<i4")
    return base64.b64encode(zlib.compress(flat.tobytes())).decode()


def decode_lengths(text: str) -> np.ndarray:
    """The inverse, int64 [rows]."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype="<i4").astype(np.int64)
