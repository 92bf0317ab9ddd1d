"""Rows read through ShardFolder: arrays, contexts, places. What rows must be is in tests/shards/test_verify.py."""

from pathlib import Path

import numpy as np
import pytest
from damage import rows, write_folder

from trainer.dataset import RowDataset

REFERENCES = {"rl": {"context": "document", "logprob_step": 0.25}}
DOCUMENT_LOGPROBS = [[None, -1.0, -0.25, 0.0], [None, -3.5, None, -1.0], [None, -2.0, -2.0, None], [None, -7.75]]


def test_batches_by_hand(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, rows())
    first, second = folder.batches()
    assert first.ids.tolist() == [5, 6, 7, 8, 9, 0, 11, 12]
    assert second.doc_lengths.tolist() == [3, 1, 2]
    assert second.doc_ids.tolist() == [1, 2, 2]
    assert second.pieces.tolist() == [2, 1]
    assert second.numbers.tolist() == [2, 3]
    assert first.source.tolist() == [0, 0]
    assert first.spans("packed") == [(0, 4, 0), (4, 8, 1)]
    assert first.spans("document") == [(0, 4, 0), (4, 6, 1), (6, 8, 1)]
    assert second.spans("document") == [(0, 3, 0), (4, 6, 1)]  # of one token alone nothing is predicted
    np.testing.assert_array_equal(second.logprobs("rl"), [np.nan, -2.0, -2.0, -0.5, np.nan, -7.75])
    assert second.predicted("rl").tolist() == [False, True, True, True, False, True]


def test_rows_by_number(tmp_path: Path) -> None:
    values = rows() | {"rl_logprobs": DOCUMENT_LOGPROBS}
    folder = write_folder(tmp_path, values, references=REFERENCES)
    for number, row in zip([3, 0, 0, 2], folder.rows([3, 0, 0, 2]), strict=True):
        assert row.numbers.tolist() == [number]
        assert row.ids.tolist() == values["input_ids"][number]
        assert row.doc_lengths.tolist() == values["doc_lengths"][number]
        assert row.doc_ids.tolist() == values["doc_ids"][number]
        expected = [np.nan if value is None else value for value in values["rl_logprobs"][number]]
        np.testing.assert_array_equal(row.logprobs("rl"), expected)
        assert row.where() == f"{tmp_path}/part-0000{number // 2}.arrow row {number % 2}"
    for number in (-1, 4):
        with pytest.raises(ValueError, match=rf"has rows 0\.\.3, not row {number}"):
            list(folder.rows([0, number]))


def test_only_what_is_asked_for_and_what_its_check_needs_is_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, rows())
    documents = ["doc_lengths", "doc_ids", "source"]
    assert next(folder.batches(["doc_ids"])).batch.schema.names == documents
    assert next(folder.batches(["input_ids"])).batch.schema.names == ["input_ids", *documents]
    assert next(folder.batches(["rl_logprobs"])).batch.schema.names == ["input_ids", *documents, "rl_logprobs"]
    assert [row.numbers.tolist() for row in folder.batches(["input_ids"], ["part-00001.arrow"])] == [[2, 3]]


def test_log_probs_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    references = {
        "rl": REFERENCES["rl"],
        "base": {"context": "packed", "logprob_step": 0.25},
        "pretend": {"context": "packed", "logprob_step": 0.25, "engine": "fake"},
    }
    values = rows()
    packed = values["rl_logprobs"]
    values |= {"rl_logprobs": DOCUMENT_LOGPROBS, "base_logprobs": packed, "pretend_logprobs": packed}
    folder = write_folder(tmp_path, values, references=references)
    assert folder.require_scored("rl", "document") == references["rl"]
    assert folder.require_one_context("base", "base") == "packed"
    with pytest.raises(ValueError, match=r"no log-probs of a reference named 'sft' \(it has: base, pretend, rl\)"):
        folder.require_scored("sft")
    with pytest.raises(ValueError, match="rl_logprobs was scored in document context, packed asked for"):
        folder.require_scored("rl", "packed")
    with pytest.raises(ValueError, match="pretend_logprobs comes from the fake engine"):
        folder.require_one_context("base", "pretend")
    with pytest.raises(ValueError, match="pretend_logprobs comes from the fake engine"):
        RowDataset(tmp_path, "pretend")
    message = "rl_logprobs was scored in document context, base_logprobs in packed context"
    with pytest.raises(ValueError, match=message):
        folder.require_one_context("rl", "base")


def test_a_reference_may_be_called_like_the_top_k_of_another(tmp_path: Path) -> None:
    """rl_topk_logprobs is then what a reference called rl_topk says, and no entry of most probable tokens of rl."""
    reference = {"context": "packed", "logprob_step": 0.25}
    values = rows()
    values["rl_topk_logprobs"] = values["rl_logprobs"]
    folder = write_folder(tmp_path, values, references={"rl": reference, "rl_topk": reference})
    read = next(folder.batches(["rl_topk_logprobs"]))
    assert "rl_logprobs" not in read.batch.schema.names
    np.testing.assert_array_equal(read.logprobs("rl_topk"), next(folder.batches(["rl_logprobs"])).logprobs("rl"))
    assert sum(len(batch) for batch in folder.batches()) == 4
