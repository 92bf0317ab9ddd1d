"""Do rows decode to the documents that they came from? A sample of each corpus file's documents is kept while it is
packed, then read out of the rows, decoded and compared.

Of long documents the beginning counts. A tokenizer that drops characters it cannot spell, changes them by its normaliser
or loses spaces shows here, and so would a mistake in the cutting of rows.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from tokenizers import Tokenizer

from shards.schema import list_lengths

SAMPLE = 32  # documents of a file
CHARACTERS = 1 << 16  # of a document


class DocumentSample:
    """A random sample of the documents of a file, the same whenever the file is read. source: index of the file."""

    def __init__(self, source: int) -> None:
        self._rng = np.random.default_rng(source)
        self._seen = 0
        self.texts: dict[int, str] = {}  # by doc_id, cut to one character more than counts
        self._places: list[int] = []

    def offer(self, doc_id: int, text: str) -> None:
        """Take a document in, in the place of another one where the sample is full."""
        self._seen += 1
        if len(self._places) < SAMPLE:
            self._places.append(doc_id)
        else:
            place = int(self._rng.integers(self._seen))
            if place >= SAMPLE:
                return
            del self.texts[self._places[place]]
            self._places[place] = doc_id
        self.texts[doc_id] = text[: CHARACTERS + 1]

    def changed(
        self, rows: pa.NativeFile, encoder: Tokenizer, bos: int | None, as_found: bool = False
    ) -> list[tuple[int, str]]:
        """The documents of the sample that the rows do not decode to: doc_id, and where they part.

        rows: an Arrow file with the rows of the corpus file; a document that is in none decodes to nothing. as_found: the
        text itself has what documents begin and end with, as that of a chat template has.
        """
        beginning = (encoder.id_to_token(bos) or "") if as_found and bos is not None else ""
        ids: dict[int, list[np.ndarray]] = {doc_id: [] for doc_id in self.texts}
        for doc_id, piece in _pieces(rows, np.array(sorted(self.texts))):
            ids[doc_id].append(piece[0 if bos is None else 1 :])
        found = []
        for doc_id, text in sorted(self.texts.items()):
            text = text.removeprefix(beginning)
            all_ids = np.concatenate([np.zeros(0, np.int32), *ids[doc_id]])
            all_ids = all_ids if as_found else all_ids[:-1]  # without EOS
            # a character takes several tokens at most, and a token is rarely less than one
            decoded = encoder.decode(all_ids[: 4 * CHARACTERS].tolist(), skip_special_tokens=False)
            expected = text
            if len(text) > CHARACTERS or len(all_ids) > 4 * CHARACTERS:
                length = min(CHARACTERS, len(text), len(decoded.rstrip("\ufffd")))
                decoded, expected = decoded[:length], text[: max(length, 1)]
            if decoded != expected:
                found.append((doc_id, _where_they_part(expected, decoded)))
        return found


def _pieces(rows: pa.NativeFile, doc_ids: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """The pieces of these documents, in order, as (doc_id, ids)."""
    fields = pa.ipc.open_file(rows).schema.names
    light = pa.ipc.IpcReadOptions(included_fields=[fields.index("doc_ids")])
    looking, reading = pa.ipc.open_file(rows, options=light), pa.ipc.open_file(rows)
    for index in range(looking.num_record_batches):
        wanted = np.isin(looking.get_batch(index).column("doc_ids").flatten().to_numpy(), doc_ids)
        if not wanted.any():
            continue
        batch = reading.get_batch(index)
        ids = batch.column("input_ids").flatten().to_numpy()
        documents = batch.column("doc_ids").flatten().to_numpy()
        lengths = batch.column("doc_lengths").flatten().to_numpy().astype(np.int64)
        assert list_lengths(batch.column("input_ids")).sum() == lengths.sum()
        ends = np.cumsum(lengths)
        for piece in np.flatnonzero(wanted):
            yield int(documents[piece]), ids[ends[piece] - lengths[piece] : ends[piece]]


def _where_they_part(text: str, decoded: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(text, decoded)) if a != b), min(len(text), len(decoded)))
    return f"{text[at : at + 20]!r} became {decoded[at : at + 20]!r} at character {at}"
