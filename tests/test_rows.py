"""RowCutter against laying the tokens end to end by hand."""

import random

import numpy as np
import pytest

from scorer.rows import RowCutter


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
        batches += list(cutter.add(index, np.array(document, dtype=np.int32)))
    assert all(batch.num_rows == rows_per_batch for batch in batches)
    batches += list(cutter.finish())
    rows = [row for batch in batches for row in batch.to_pylist()]
    assert rows == by_hand(documents, seq_len)


def test_nothing_gives_no_batch() -> None:
    assert list(RowCutter(8, 2, source=0).finish()) == []
