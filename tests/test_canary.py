"""An engine that disagrees with transformers gets no part; a model that is broken for one token loses only its rows."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
from conftest import make_model, score_to
from oracles import load, read_rows, row_logprobs

from scorer.canary import CanaryFailed, canary_prompts, compare, compare_topk
from scorer.engine import Answer
from shards import ShardFolder
from shards.verify import verify_folder

ROOT = Path(__file__).parent.parent


def test_tolerance_by_hand() -> None:
    expected = [np.full(10, -2.0, np.float32), np.full(30, -1.0, np.float32)]
    near = [values - np.float32(0.001) for values in expected]
    figures = compare(near, expected, "float32")
    assert figures["tokens"] == 40
    assert figures["mean"] == pytest.approx(0.001, rel=1e-3)
    far = [values - np.float32(0.01) for values in expected]
    with pytest.raises(CanaryFailed, match=r"in the mean and 0.01 at most, expected a mean of at most 0.002"):
        compare(far, expected, "float32")
    assert compare(far, expected, "bfloat16")["max"] == pytest.approx(0.01, rel=1e-3)
    # one token that the model is broken for on both sides says nothing; on one side it is a failure
    broken = [values.copy() for values in expected]
    broken[0][3] = np.nan
    assert compare(broken, broken, "float32")["tokens"] == 39
    with pytest.raises(CanaryFailed):
        compare(broken, expected, "float32")
    nothing = [np.full(4, np.nan, np.float32)]
    with pytest.raises(CanaryFailed, match="no finite log-prob for any of 4"):
        compare(nothing, nothing, "float32")


def test_prompts_come_from_the_rows(packed: Path) -> None:
    folder = ShardFolder(packed)
    rows = [row["input_ids"] for row in read_rows(packed)]
    packed_prompts = canary_prompts(folder, "part-00000.arrow", "packed", 521)
    assert [list(prompt) for prompt in packed_prompts] == [row for row in rows if len(row) > 1][:4]
    for prompt in canary_prompts(folder, "part-00000.arrow", "document", 521):
        assert len(prompt) > 1
        assert 0 not in prompt[:-1]  # EOS only at the end of a document
    assert canary_prompts(folder, "part-00000.arrow", "packed", 1) == []


def test_engine_of_another_model_is_refused(
    tmp_path: Path, packed: Path, reference_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward that the engine is held against belongs to a model with other weights."""
    other = make_model(tmp_path / "other", seed=77)
    monkeypatch.setattr(
        "scorer.drive.compute",
        lambda model, prompts, top_k: __import__("scorer.forward").forward.forward_all(other, prompts),
    )
    with pytest.raises(CanaryFailed, match="log-probs are not the model's"):
        score_to(tmp_path / "out", packed, reference_model, canary=True)
    assert not list((tmp_path / "out").glob("*.arrow"))
    assert not list((tmp_path / "out").rglob(".*tmp"))
    assert not (tmp_path / "out" / "_lease").exists()


def test_most_probable_tokens_of_another_model_are_refused() -> None:
    """By hand: ids that transformers has far down, log-probs that are others; places that swap in 16 bit are fine."""
    wide_ids, wide = np.array([[7, 3, 9, 1, 4]]), np.array([[-0.5, -1.5, -2.5, -4.0, -5.0]], np.float32)
    expected = [(np.zeros(1), wide_ids, wide)]

    def answer(ids: list[int], logprobs: list[float]) -> Answer:
        return Answer(np.zeros(1, np.float32), np.array([ids], np.int32), np.array([logprobs], np.float32))

    good = compare_topk([answer([7, 9], [-0.5, -2.4])], expected, "bfloat16")
    assert good == {"topk_mean": pytest.approx(0.05), "topk_elsewhere": 0}
    # a place for which neither has a number says nothing, one for which the engine alone has none does
    broken = Answer(np.zeros(2, np.float32), np.array([[7, 9]] * 2, np.int32), np.array([[-0.5, -2.5], [np.nan] * 2]))
    wide_broken = np.array([wide[0], np.full(5, np.nan)])
    ids = np.concatenate([wide_ids, wide_ids])
    assert compare_topk([broken], [(np.zeros(2), ids, wide_broken)], "float32")["topk_mean"] == 0
    with pytest.raises(CanaryFailed):
        compare_topk([broken], [(np.zeros(2), ids, np.concatenate([wide, wide]))], "float32")
    for wrong in (answer([7, 8], [-0.5, -1.5]), answer([3, 7], [-0.5, -1.5])):
        with pytest.raises(CanaryFailed, match="most probable tokens are not the model's"):
            compare_topk([wrong], expected, "bfloat16")


def test_a_token_that_breaks_the_model(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    """Its embedding is NaN: rows that hold it are quarantined, all others are right. Real engine."""
    rows = read_rows(packed)
    counts = Counter(token for row in rows for token in set(row["input_ids"]))
    token = next(token for token, count in sorted(counts.items()) if 3 <= count <= 8)
    model = tmp_path / "model"
    shutil.copytree(reference_model, model)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    safetensors.torch.save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    folder = score_to(tmp_path / "out", packed, model, canary=True)
    # vLLM's CPU attention lets a NaN reach the tokens before it in its block, so its whole row is lost
    bad = {i for i, row in enumerate(rows) if token in row["input_ids"]}
    assert 0 < len(bad) < len(rows) // 4
    scored = read_rows(folder.path)
    assert {i for i, row in enumerate(scored) if len(row["input_ids"]) > 1 and row["rl_logprobs"][1] is None} == bad
    reference = load(reference_model)
    for index in sorted(bad | set(range(0, len(rows), 7))):
        if index in bad:
            assert scored[index]["rl_logprobs"] == [None] * len(rows[index]["input_ids"])
            continue
        for value, want in zip(
            scored[index]["rl_logprobs"], row_logprobs(reference, rows[index], "packed"), strict=True
        ):
            assert (value is None) == (want is None)
            assert value is None or abs(value - want.item()) <= 1 / 128 + 1e-4
    report = verify_folder(folder)
    assert report.problems == []
    assert report.quarantined == {"rl": len(bad)}
    side = [json.loads(path.read_text()) for path in (folder.path / "_quarantine" / "rows").iterdir()]
    entries = [entry for value in side for entry in value["rows"]]
    assert len(entries) == len(bad)
    assert all("not finite" in entry["reason"] and token in entry["input_ids"] for entry in entries)
    last = json.loads((folder.path / "_score.jsonl").read_text().splitlines()[-1])
    assert (last["event"], last["rows_quarantined"]) == ("done", len(bad))


POISON = """
import os, sys
from pathlib import Path
import numpy as np
from scorer.engine import EngineConfig, VllmEngine, environment
config = EngineConfig(Path(sys.argv[1]), "float32", 64, 521, "", "")
os.environ.update(environment(config, {}, [0], 1024), VLLM_ALLOW_INSECURE_SERIALIZATION="1")
engine = VllmEngine(config, 1024)
prompt = np.random.default_rng(0).integers(1, 521, 37)

def poison(worker):
    for cache in worker.model_runner.kv_caches:
        cache.fill_(float("nan"))

def score():
    engine.add("x", prompt)
    while True:
        for _, values in engine.step():
            return values.logprobs

clean = score()
engine._llm.collective_rpc(poison)
spoiled = score()
engine._llm.collective_rpc(poison)
engine.forget()
print("RESULT", np.isfinite(clean).all(), np.isfinite(spoiled).all(), np.array_equal(clean, score()))
"""


def test_forgetting_clears_what_a_nan_left_in_the_cache(reference_model: Path) -> None:
    """Without it a later prompt that gets the same cache blocks comes out NaN: the second value shows the hazard."""
    done = subprocess.run(
        [sys.executable, "-c", POISON, reference_model], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), done.stderr[-2000:])
    assert result == "RESULT True False True"
