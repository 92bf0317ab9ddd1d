"""How the rows of a corpus file follow each other, and how many documents they have.

In: its rows in order. Out: counts; a ValueError says what is wrong with a row. Where rows were selected, their
neighbours are not those of the corpus, and nothing is expected of how a document goes on, nor of how many there are.
"""

from dataclasses import dataclass, field

import numpy as np

from shards.manifest import CorpusFile, Manifest
from shards.packing import Window, best_fit

OUT_OF_ORDER = "documents are out of order"
NO_EOS = "a document does not end in EOS"


@dataclass
class Followed:
    """What was seen of one corpus file so far. seq_len, eos: of the folder; selected: whether rows were;
    as_found: whether documents may end without EOS."""

    seq_len: int
    eos: int
    selected: bool
    as_found: bool
    rows: int = 0
    tokens: int = 0
    documents: int = 0
    bos_tokens: int = 0
    predicted_tokens: int = 0
    without_eos: int = 0

    def add(self, ids: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> None:
        """The next row. ids: int32 [T]; documents, lengths: of its pieces, [D]. ValueError where it does not follow."""
        if np.any(np.diff(documents) <= 0):
            raise ValueError(OUT_OF_ORDER)
        self._follow(ids, documents, lengths)
        inner = ids[np.cumsum(lengths)[:-1] - 1]  # where a document ends inside the row
        self._ends(int(np.count_nonzero(inner != self.eos)))
        self.rows += 1
        self.tokens += len(ids)

    def _ends(self, without_eos: int) -> None:
        """Count documents that ended without EOS."""
        self.without_eos += without_eos
        if without_eos and not self.as_found:
            raise ValueError(NO_EOS)

    def _follow(self, ids: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> None:
        raise NotImplementedError

    def forget(self) -> None:
        """What follows a bad part must not be judged by what precedes it."""

    def finish(self) -> None:
        """The rows have come to an end. ValueError where they must not end so."""


@dataclass
class Concatenated(Followed):
    """Documents laid end to end: only the last row is short."""

    last_document: int = -1
    last_token: int = -1
    short_row: bool = False

    def _follow(self, ids: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> None:
        continues = self.last_document == documents[0]
        if self.short_row:
            raise ValueError("follows the short last row of its corpus file")
        if documents[0] < self.last_document:
            raise ValueError(OUT_OF_ORDER)
        if not (self.selected or continues):
            self._ends(self.last_token not in (-1, self.eos))
        self.documents += len(documents) - continues
        self.last_document, self.last_token = int(documents[-1]), int(ids[-1])
        self.short_row = len(ids) < self.seq_len

    def forget(self) -> None:
        self.last_document, self.last_token, self.short_row = -1, -1, False

    def finish(self) -> None:
        if not self.selected and self.last_token not in (-1, self.eos):
            self.without_eos += 1
            if not self.as_found:
                raise ValueError("its last document does not end in EOS")


@dataclass
class BestFitted(Followed):
    """Rows by shards/packing.py: each window is packed again and compared."""

    window: Window = field(default_factory=Window)
    closed: int = -1
    """The last document of the windows so far."""
    full: dict[int, int] = field(default_factory=dict)
    """Of the open window: last token of the last full piece of each document that is longer than a row."""
    packed: list[list[tuple[int, int]]] = field(default_factory=list)
    """Of the open window: its rows so far, as document and length of each piece."""
    num_pieces: int = 0
    num_tokens: int = 0
    """Of these rows."""
    lost: bool = False

    def _follow(self, ids: np.ndarray, documents: np.ndarray, lengths: np.ndarray) -> None:
        if self.selected or self.lost:
            return
        is_full = len(documents) == 1 and len(ids) == self.seq_len
        if documents[0] <= self.closed or (is_full and self.packed):
            raise ValueError(OUT_OF_ORDER)
        if is_full:
            if self.full and documents[0] < max(self.full):
                raise ValueError(OUT_OF_ORDER)
            self.full[int(documents[0])] = int(ids[-1])
            return
        self._ends(int(ids[-1]) != self.eos)
        self.packed.append(list(zip(documents.tolist(), lengths.tolist())))
        self.num_pieces += len(documents)
        self.num_tokens += len(ids)
        if self.window.is_full(self.num_pieces, self.num_tokens):
            self._close()

    def _close(self) -> None:
        pieces = sorted(piece for row in self.packed for piece in row)
        documents = [document for document, _ in pieces]
        if len(set(documents)) < len(documents):
            raise ValueError("a document has two pieces that are shorter than a row")
        rows = best_fit([length for _, length in pieces], self.seq_len)
        if [[pieces[place] for place in row] for row in rows] != self.packed:
            raise ValueError("the rows up to here are not those that best-fit packing makes of their documents")
        if self.full and max(self.full) > documents[-1]:
            raise ValueError(OUT_OF_ORDER)
        self._count_full(set(documents))
        self.documents += len(documents)
        self.closed, self.packed, self.num_pieces, self.num_tokens = documents[-1], [], 0, 0

    def _count_full(self, documents: set[int]) -> None:
        """Count the documents of full pieces; documents: those that end in a shorter one."""
        ended = self.full.keys() - documents
        self.documents += len(ended)
        without_eos, self.full = sum(self.full[document] != self.eos for document in ended), {}
        self._ends(without_eos)

    def forget(self) -> None:
        self.lost = True

    def finish(self) -> None:
        if self.selected or self.lost:
            return
        full, self.full = self.full, {}
        if self.packed:
            last = max(document for row in self.packed for document, _ in row)
            self.full = {document: token for document, token in full.items() if document <= last}
            self._close()
        self.full = {document: token for document, token in full.items() if document > self.closed}
        self._count_full(set())


def follow(manifest: Manifest, file: CorpusFile) -> Followed:
    """What follows the rows of a corpus file."""
    settings = (
        manifest.seq_len,
        manifest.tokenizer["eos_token_id"],
        bool(manifest.selections),
        file.without_eos is not None,
    )
    return BestFitted(*settings, window=Window.of(manifest.packing)) if manifest.packing else Concatenated(*settings)
