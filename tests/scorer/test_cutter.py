"""RowCutter against laying the tokens end to end by hand."""

import random

import numpy as np
import pytest

from scorer.cutter import RowCutter
from scorer.documents import TokenDocument


def by_hand(documents: list[list[int]], seq_len: int) -> list[dict]:
    """Every token with its document, cut every seq_len tokens."""
    stream = [(token, index) for index, document in enumerate(documents) for token in document]
    rows = []
    for start in range(0, len(stream), seq_len):
        row = stream[start : start + seq_len]
        lengths: list[int] = []
        doc_ids: list[int] = []
        for _, document in row:
            if not doc_ids or doc_ids[-1] != document:
                doc_ids.append(document)
                lengths.append(0)
            lengths[-1] += 1
        rows.append({"input_ids": [token for token, _ in row], "doc_lengths": lengths, "doc_ids": doc_ids, "source": 3})
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_rows_equal_cutting_by_hand(seed: int) -> None:
    rng = random.Random(seed)
    seq_len, rows_per_batch = rng.choice([1, 2, 5, 16]), rng.choice([1, 2, 7])
    documents = [
        [rng.randrange(1000) for _ in range(rng.choice([1, 1, 2, 4, 5, 16, 33, 200]))]
        for _ in range(rng.randint(1, 30))
    ]
    cutter = RowCutter(seq_len, rows_per_batch, source=3)
    batches = []
    for index, document in enumerate(documents):
        batches += list(cutter.add(index, TokenDocument(np.array(document, dtype=np.int32))))
    assert all(batch.num_rows == rows_per_batch for batch in batches)
    batches += list(cutter.finish())
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert rows == by_hand(documents, seq_len)


def by_hand_with_bos(documents: list[list[int]], seq_len: int, bos: int) -> list[dict]:
    """Token by token: a BOS where a document begins, and where a row begins inside one."""
    rows: list[dict] = []
    for index, document in enumerate(documents):
        for number, token in enumerate(document):
            while number == 0 or not rows or len(rows[-1]["input_ids"]) == seq_len:
                if not rows or len(rows[-1]["input_ids"]) == seq_len:
                    rows.append({"input_ids": [], "doc_lengths": [], "doc_ids": [], "source": 3})
                rows[-1]["input_ids"].append(bos)
                rows[-1]["doc_lengths"].append(1)
                rows[-1]["doc_ids"].append(index)
                if len(rows[-1]["input_ids"]) < seq_len:
                    break
            rows[-1]["input_ids"].append(token)
            rows[-1]["doc_lengths"][-1] += 1
    return rows


@pytest.mark.parametrize("seed", range(60))
def test_with_bos_each_piece_begins_with_one(seed: int) -> None:
    rng = random.Random(seed)
    seq_len, rows_per_batch, bos = rng.choice([2, 3, 5, 16]), rng.choice([1, 2, 7]), rng.choice([7, 1000])
    documents = [
        [rng.randrange(1000) for _ in range(rng.choice([1, 1, 2, 4, 5, 15, 16, 33, 200]))]
        for _ in range(rng.randint(1, 30))
    ]
    cutter = RowCutter(seq_len, rows_per_batch, source=3, bos=bos)
    batches = []
    for index, document in enumerate(documents):
        batches += list(cutter.add(index, TokenDocument(np.array(document, dtype=np.int32))))
    assert all(batch.num_rows == rows_per_batch for batch in batches)
    batches += list(cutter.finish())
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert rows == by_hand_with_bos(documents, seq_len, bos)
    assert cutter.bos_tokens == sum(len(row["doc_ids"]) for row in rows)
    assert all(len(row["input_ids"]) == seq_len for row in rows[:-1])
    text: dict[int, list[int]] = {}
    for row in rows:  # without the first token of each piece the documents are what they were
        start = 0
        for doc_id, length in zip(row["doc_ids"], row["doc_lengths"]):
            text.setdefault(doc_id, []).extend(row["input_ids"][start + 1 : start + length])
            start += length
    assert list(text.values()) == documents


def test_nothing_gives_no_batch() -> None:
    assert list(RowCutter(8, 2, source=0).finish()) == []
