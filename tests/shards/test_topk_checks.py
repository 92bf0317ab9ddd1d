"""Altered most probable tokens are found on disk; the kernel's order and the fake engine's numbers by hand."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import VOCABULARY
from damage import TOP, top_rows, write_folder

from scorer.driver import TOPK_BYTES_PER_ENTRY
from scorer.fake import hashed_logprobs, hashed_topk
from scorer.logits import Kept, token_scores
from shards import ShardFolder
from shards.topk import fault_of_topk, topk_array
from shards.verify import verify_folder


def test_sound_entries_have_no_problems(tmp_path: Path) -> None:
    values = top_rows()
    values["rl_topk_ids"][0][1][1] = 119  # padded embedding rows: beyond the tokenizer's ids, not the reference's
    report = verify_folder(write_folder(tmp_path, values, references=TOP))
    assert report.problems == []
    assert report.logprobs == {"rl": 10}


@pytest.mark.parametrize(("key", "value"), [("top_k", -1), ("top_k", 1 << 40), ("top_k", "2"), ("vocab_size", None)])
def test_manifest_is_checked(tmp_path: Path, key: str, value: object) -> None:
    plan = write_folder(tmp_path / "a", top_rows(), references=TOP).manifest
    (tmp_path / "b").mkdir()
    replace(plan, references={"rl": TOP["rl"] | {key: value}}).write(tmp_path / "b")
    with pytest.raises(ValueError, match=f"reference rl: {key} is {value!r}"):
        ShardFolder(tmp_path / "b")


# --- by hand --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocabulary", "top_k"), [(VOCABULARY, 0), (VOCABULARY, 1), (VOCABULARY, 32), (9, 9), (9, 8)])
def test_kernel_takes_the_lowest_ids_of_equal_ones(dtype: torch.dtype, vocabulary: int, top_k: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(60, vocabulary, generator=generator) * 4).round().to(dtype) / 2
    logits[3] = 0
    logits[4, :7] = 9
    tokens = torch.randint(0, vocabulary, (60,), generator=generator)
    ids, logprobs = token_scores(logits, tokens, Kept(top_k), 7 * vocabulary)
    # equal logits are equal log-probs, so the order is that of the logits; -0.0 equals 0.0
    values = logits.double().numpy()
    want = np.lexsort((np.broadcast_to(np.arange(vocabulary), values.shape), -values), axis=-1)[:, :top_k]
    assert np.array_equal(ids.numpy(), np.concatenate([tokens[:, None].numpy(), want], axis=1))
    full = logits.double().log_softmax(-1)
    assert (logprobs.double() - full.gather(-1, ids.long())).abs().max() < 1e-5


@pytest.mark.parametrize("top_k", [1, 2, 5, 40])
def test_fake_engine_gives_a_distribution(top_k: int) -> None:
    prompt = np.random.default_rng(0).integers(0, 40, 500)
    logprobs = hashed_logprobs(prompt)
    _, ids, best, *_ = hashed_topk(prompt, logprobs, 40, top_k)
    assert ids is not None
    assert best is not None
    assert ids.shape == best.shape == (499, top_k)
    assert fault_of_topk(prompt[1:], logprobs, ids, best, 40) is None
    assert np.all(np.exp(best.astype(np.float64)).sum(axis=1) <= 1 + 1e-6)
    assert top_k < 40 or np.all(np.sort(ids, axis=1) == np.arange(40))


FILE_BYTES = 1200  # of an Arrow file without rows, roughly


def test_estimate_of_the_disk_counts_the_entries(tmp_path: Path) -> None:
    """What the estimate takes for an entry is what ids and rounded log-probs of a large vocabulary need at most."""
    rng = np.random.default_rng(0)
    frequent = -1.05 * np.log(np.arange(1, 50_001) + 5)
    for top_k in (1, 16):
        ids = np.empty((600, top_k), np.int32)
        logprobs = np.empty((600, top_k), np.float32)
        for place in range(600):
            logits = frequent + rng.normal(0, rng.uniform(0.5, 3), len(frequent))
            best = np.argsort(-logits)[:top_k]
            ids[place], logprobs[place] = best * 7919 % 50_000, logits[best] - np.log(np.exp(logits).sum())
        for step, values in ((True, np.rint(logprobs * 64) / 64), (False, logprobs)):
            arrays = [topk_array(array.copy(), np.ones(600, bool)) for array in (ids, values)]
            batch = pa.record_batch(arrays, names=["ids", "logprobs"])
            with pa.ipc.new_file(
                tmp_path / "x", batch.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
            ) as writer:
                writer.write_batch(batch)
            bytes_per_entry = ((tmp_path / "x").stat().st_size - FILE_BYTES) / ids.size
            assert 0.5 * TOPK_BYTES_PER_ENTRY[step] < bytes_per_entry < TOPK_BYTES_PER_ENTRY[step]
