"""Cut a stream of tokenised documents into rows of seq_len tokens.

Documents are laid end to end; a row may begin and end inside one. Only the last row of a source is short. With a BOS each
document piece of a row begins with one: that of a document's beginning, and that of a row that begins inside a document.
A document that begins at the last place of a row leaves its BOS there, alone.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from scorer.documents import TokenDocument
from shards.schema import list_array, row_schema


class RowCutter:
    """Collects documents and gives record batches of exactly `rows_per_batch` full rows.

    Batch borders depend on the tokens alone, not on how the documents arrived, so that the same corpus
    gives the same bytes. bos: id with which each piece begins, beside the document's own tokens; None for none.
    predict: whether the batches have the column of what is to be predicted.
    """

    def __init__(
        self, seq_len: int, rows_per_batch: int, source: int, bos: int | None = None, predict: bool = False
    ) -> None:
        self.seq_len, self.rows_per_batch, self.source, self.bos = seq_len, rows_per_batch, source, bos
        self.schema = row_schema(predict=predict)
        self.bos_tokens = 0
        self._ids: list[np.ndarray] = []  # int32, tokens not cut yet
        self._predict: list[np.ndarray] | None = [] if predict else None  # bool, of these tokens
        self._lengths: list[int] = []  # of the document pieces among them
        self._doc_ids: list[int] = []
        self._pending = 0

    def add(self, doc_id: int, document: TokenDocument) -> Iterator[pa.RecordBatch]:
        """Append one document, which has a token at least; yields the batches that it fills."""
        if self.bos is not None:
            room = self.seq_len - self._pending % self.seq_len - 1  # of this row for the first piece, after its BOS
            own = len(document.ids) - document.has_bos
            starts = [0, *range(room, own, self.seq_len - 1)]
            self.bos_tokens += len(starts)
            document = with_bos(document, self.bos, starts)
        ids = document.ids
        if self._predict is not None:
            self._predict.append(predicted(document))
        self._ids.append(ids)
        self._lengths.append(len(ids))
        self._doc_ids.append(doc_id)
        self._pending += len(ids)
        while self._pending >= self.seq_len * self.rows_per_batch:
            yield self._cut(self.rows_per_batch * self.seq_len)

    def add_many(self, doc_ids: np.ndarray, ids: np.ndarray, lengths: np.ndarray) -> Iterator[pa.RecordBatch]:
        """Append documents as `add` does, all to be predicted and without BOS, one after the other in ids, int32: ordinals
        and lengths, int64 [D] each."""
        if not len(doc_ids):
            return
        if self.bos is not None:
            ids, lengths = self._many_with_bos(ids, lengths, self.bos)
        if self._predict is not None:
            self._predict.append(np.ones(len(ids), dtype=bool))
        self._ids.append(ids)
        self._lengths += lengths.tolist()
        self._doc_ids += doc_ids.tolist()
        self._pending += len(ids)
        while self._pending >= self.seq_len * self.rows_per_batch:
            yield self._cut(self.rows_per_batch * self.seq_len)

    def _many_with_bos(self, ids: np.ndarray, lengths: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of documents with a BOS in front of each of their pieces, and their lengths then."""
        seq_len, place, start = self.seq_len, self._pending % self.seq_len, 0
        starts: list[int] = []
        counts: list[int] = []
        for length in lengths.tolist():
            room = seq_len - place - 1  # of this row for the first piece, after its BOS
            pieces = 1 + max(0, -(-(length - room) // (seq_len - 1)))
            starts.append(start)
            if pieces > 1:
                starts.extend(range(start + room, start + length, seq_len - 1))
            counts.append(pieces)
            place, start = (place + length + pieces) % seq_len, start + length
        self.bos_tokens += len(starts)
        return np.insert(ids, starts, bos), lengths + np.array(counts)

    def finish(self) -> Iterator[pa.RecordBatch]:
        """The rest: full rows and the short last one."""
        if self._pending:
            yield self._cut(self._pending)

    def _cut(self, num_tokens: int) -> pa.RecordBatch:
        """Batch of the first `num_tokens` pending tokens."""
        flat = np.concatenate(self._ids)
        lengths = np.array(self._lengths, dtype=np.int64)
        doc_ids = np.array(self._doc_ids, dtype=np.int64)
        doc_ends = np.cumsum(lengths)
        row_starts = np.arange(0, num_tokens, self.seq_len)
        # a piece begins where a document or a row begins
        piece_starts = np.union1d(row_starts, (doc_ends - lengths)[doc_ends - lengths < num_tokens])
        piece_ends = np.append(piece_starts[1:], num_tokens)
        document = np.searchsorted(doc_ends, piece_starts, side="right")
        pieces_per_row = np.bincount(piece_starts // self.seq_len, minlength=len(row_starts))
        row_lengths = np.minimum(self.seq_len, num_tokens - row_starts)

        left = np.searchsorted(doc_ends, num_tokens, side="right")  # first document that is not used up
        rest = flat[num_tokens:]
        self._ids = [rest.copy()] if len(rest) else []
        self._lengths = [int(length) for length in lengths[left:]]
        self._doc_ids = [int(doc_id) for doc_id in doc_ids[left:]]
        if self._lengths:
            self._lengths[0] = int(doc_ends[left] - num_tokens)
        self._pending -= num_tokens
        columns = [
            list_array(pa.array(flat[:num_tokens]), row_lengths),
            list_array(pa.array((piece_ends - piece_starts).astype(np.int32)), pieces_per_row),
            list_array(pa.array(doc_ids[document]), pieces_per_row),
            pa.array(np.full(len(row_starts), self.source, dtype=np.int32)),
        ]
        if self._predict is not None:
            predict = np.concatenate(self._predict)
            self._predict = [predict[num_tokens:].copy()] if len(rest) else []
            columns.append(list_array(pa.array(predict[:num_tokens]), row_lengths))
        return pa.record_batch(columns, schema=self.schema)


def predicted(document: TokenDocument) -> np.ndarray:
    """Which tokens of a document are to be predicted, bool [T]."""
    return np.ones(len(document.ids), dtype=bool) if document.predict is None else document.predict


def with_bos(document: TokenDocument, bos: int, starts: list[int]) -> TokenDocument:
    """The tokens of a document with a BOS in front of each of its pieces, which begin at `starts` of those it has beside
    a BOS of its own. What is put there is not to be predicted, unless all of the document is: then it stays so."""
    own = document.ids[document.has_bos :]
    predict = document.predict
    if predict is not None:
        put = bool(predict.all())
        first = bool(predict[0]) if document.has_bos else put
        predict = np.insert(predict[document.has_bos :], starts, [first, *[put] * (len(starts) - 1)])
    return TokenDocument(np.insert(own, starts, bos), predict, has_bos=True)
