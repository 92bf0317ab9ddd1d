"""An engine that disagrees with transformers gets no part; a model that is broken for one token loses only its rows."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from conftest import make_model, score_to
from oracles import load, read_rows, row_logprobs

import scorer.forward
from scorer.canary import CanaryFailed, Distance, Limits, canary_prompts, compare, compute, measure
from scorer.engine import Answer
from scorer.logits import Kept
from shards import ShardFolder
from shards.verify import verify_folder

ROOT = Path(__file__).parents[2]


def answers(values: list[np.ndarray]) -> list[Answer]:
    return [Answer(part) for part in values]


def test_limits_by_hand() -> None:
    """Without a dtype of its own the floor of 0.002 nat; with one, 2 times its distance more, a quarter of that as bias."""
    expected = [np.full(10, -2.0, np.float32), np.full(30, -1.0, np.float32)]
    exact = Limits("float32")
    signs = np.resize([1, -1], 40).astype(np.float32)

    def off(size: float, bias: float = 0.0) -> list[Answer]:
        return answers([expected[0] + size * signs[:10] + bias, expected[1] + size * signs[10:] + bias])

    figures = compare(off(0.001), answers(expected), exact)
    assert (figures["tokens"], figures["bias"]) == (40, pytest.approx(0, abs=1e-6))
    assert figures["mean"] == pytest.approx(0.001, rel=1e-3)
    with pytest.raises(
        CanaryFailed, match=r"in the mean and 0.01 at most, expected a mean of at most 0.002 in float32"
    ):
        compare(off(0.01), answers(expected), exact)
    with pytest.raises(CanaryFailed, match=r"biased: over 40 tokens they are \+0.000[67]"):
        compare(off(0.001, bias=0.0006), answers(expected), exact)
    own = Limits("bfloat16", measure(off(0.04), answers(expected)))
    assert own.mean == pytest.approx(0.082, rel=1e-3)
    assert own.bias(40) == pytest.approx(0.082 / 4 + 4 * 0.04 / 40**0.5, rel=1e-3)
    assert own.bias(10**9) == pytest.approx(0.082 / 4, rel=1e-2)
    assert compare(off(0.08), answers(expected), own)["max"] == pytest.approx(0.08, rel=1e-3)
    for wrong, message in ((off(0.084), "2 times what bfloat16 costs"), (off(0.04, bias=0.047), "biased")):
        with pytest.raises(CanaryFailed, match=message):
            compare(wrong, answers(expected), own)
    # one token that the model is broken for on both sides says nothing; on one side it is a failure
    broken = [values.copy() for values in expected]
    broken[0][3] = np.nan
    assert compare(answers(broken), answers(broken), exact)["tokens"] == 39
    for bad in (np.nan, -np.inf):
        broken[0][3] = bad
        with pytest.raises(CanaryFailed):
            compare(answers(broken), answers(expected), exact)
    nothing = [np.full(4, np.nan, np.float32)]
    with pytest.raises(CanaryFailed, match="no finite log-prob for any of 4"):
        compare(answers(nothing), answers(nothing), exact)


REAL = os.environ.get("REMIT_REAL_MODEL", "")


def noisy_models(tmp_path: Path) -> list[tuple[Path, int]]:
    """Models in bfloat16 and their vocabularies; with a real one, where REMIT_REAL_MODEL names its folder."""
    tiny = [make_model(tmp_path / family, family, seed=3, positions=512) for family in ("Olmo2", "Qwen3")]
    for folder in tiny:
        in_dtype(folder, torch.bfloat16)
    models = [(folder, 521) for folder in tiny]
    return [*models, (Path(REAL), 40_000)] if REAL else models


def in_dtype(folder: Path, dtype: torch.dtype) -> Path:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.save_pretrained(folder)
    return folder


def test_noise_and_bias_of_a_bfloat16_engine_fail(tmp_path: Path) -> None:
    """An engine that rounds otherwise than the forward passes; noise of 0.11 nat or a bias on top does not.

    The engine is a forward in bfloat16 with bfloat16 logits, by transformers alone: it errs more than ours may.
    """
    rng = np.random.default_rng(0)
    for model, vocabulary in noisy_models(tmp_path):
        prompts = [rng.integers(1, vocabulary, length) for length in (512, 256, 256, 256)]
        forwards = compute(model, prompts, Kept(), ("bfloat16",), 1)
        network = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16).eval()
        engine = []
        with torch.no_grad():
            for prompt in prompts:
                ids = torch.from_numpy(prompt)
                logprobs = network(ids[None]).logits[0, :-1].float().log_softmax(-1)
                engine.append(logprobs.gather(-1, ids[1:, None])[:, 0].numpy())
        limits = forwards.limits("bfloat16")
        good = compare(answers(engine), forwards.expected, limits)
        assert good["mean"] > 2e-3, "else the floor alone would pass it"
        with pytest.raises(CanaryFailed, match="in the mean"):
            compare(answers([v + rng.normal(0, 0.11, len(v)) for v in engine]), forwards.expected, limits)
        for bias in (0.05, -0.05):
            with pytest.raises(CanaryFailed):
                compare(answers([v + bias for v in engine]), forwards.expected, limits)


def test_chance_alone_is_no_bias() -> None:
    """Errors without bias, heavy tails included, as those of bfloat16: the gate fires in none of 2,000 trials."""
    rng = np.random.default_rng(1)
    own = 0.03 * rng.standard_t(4, 20_000)
    for tokens in (60, 1000):
        want = [np.full(tokens, -3.0)]
        limits = Limits("bfloat16", measure(answers([want[0] + own[:tokens]]), answers(want)))
        for _ in range(1000):
            compare(answers([want[0] + rng.choice(own - own.mean(), tokens)]), answers(want), limits)


def test_forward_in_pieces_and_in_float16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits that do not fit at once give the same numbers, soft-capped and scaled ones too; float16 is near float32."""
    rng = np.random.default_rng(2)
    for family in ("Olmo2", "SmolLM3", "Gemma2", "Granite", "Cohere"):
        model = make_model(tmp_path / family, family, seed=4)
        prompt = rng.integers(1, 521, 61)
        whole = scorer.forward.load_forward(model)(prompt, best=3, temperatures=(1.0, 2.0))
        with monkeypatch.context() as patch:
            patch.setattr(scorer.forward, "LOGITS_BYTES", 4 * 521 * 7)
            pieces = scorer.forward.load_forward(model)(prompt, best=3, temperatures=(1.0, 2.0))
        for one, other in zip(whole, pieces, strict=True):
            assert (one is None and other is None) or np.allclose(one, other, atol=1e-5), family
        kept = Kept(temperatures=(1.0, 2.0))
        distances = compute(model, [prompt], kept, ("bfloat16", "float16"), 1).distances
        assert 0 < distances["float16"].mean < distances["bfloat16"].mean / 3
        assert 0 < distances["float16"].entropy_mean < distances["bfloat16"].entropy_mean / 3


def pieces(row: dict) -> list[list[int]]:
    ends = np.cumsum(row["doc_lengths"])
    return [row["input_ids"][end - length : end] for end, length in zip(ends, row["doc_lengths"])]


def test_prompts_come_from_the_rows(packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ShardFolder(packed)
    table = read_rows(packed)
    rows = [row["input_ids"] for row in table]
    packed_prompts = canary_prompts(folder, "part-00000.arrow", "packed", 521)
    assert [list(prompt) for prompt in packed_prompts] == [row for row in rows if len(row) > 1][:4]
    monkeypatch.setattr("scorer.canary.SHORT_TOKENS", 9)
    cut = [list(prompt) for prompt in canary_prompts(folder, "part-00000.arrow", "packed", 521)]
    assert cut == [rows[0], *(row[:9] for row in rows[1:4])]
    monkeypatch.undo()
    documents = [prompt for row in table for prompt in pieces(row) if len(prompt) > 1]
    own = [list(prompt) for prompt in canary_prompts(folder, "part-00000.arrow", "document", 521)]
    assert own[1:] == [piece for piece in documents if piece != own[0]][:3]
    assert len(own[0]) == max(len(piece) for row in table[:50] for piece in pieces(row))
    for prompt in canary_prompts(folder, "part-00000.arrow", "document", 521):
        assert len(prompt) > 1
        assert 0 not in prompt[:-1]  # EOS only at the end of a document
    assert canary_prompts(folder, "part-00000.arrow", "packed", 1) == []


@pytest.mark.usefixtures("ray_session")
def test_engine_of_another_model_is_refused(
    tmp_path: Path, packed: Path, reference_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The forward that the engine is held against belongs to a model with other weights."""
    other = make_model(tmp_path / "other", seed=77)
    monkeypatch.setattr(
        "scorer.forwards.compute", lambda model, *rest: __import__("scorer.canary").canary.compute(other, *rest)
    )
    with pytest.raises(CanaryFailed, match="log-probs are not the model's"):
        score_to(tmp_path / "out", packed, reference_model, canary=True)
    assert not list((tmp_path / "out").glob("*.arrow"))
    assert not list((tmp_path / "out").rglob(".*tmp"))
    assert not (tmp_path / "out" / "_lease").exists()


def test_most_probable_tokens_of_another_model_are_refused() -> None:
    """By hand: ids that transformers has far down, log-probs that are others; places that swap in 16 bit are fine."""
    wide_ids, wide = np.array([[7, 3, 9, 1, 4]]), np.array([[-0.5, -1.5, -2.5, -4.0, -5.0]], np.float32)
    one = np.zeros(1, np.float32)
    expected = [Answer(one, wide_ids, wide)]
    limits = Limits("bfloat16", Distance(1, 0.03, 0.03, 0.03, 0.03, topk_mean=0.03))

    def answer(ids: list[int], logprobs: list[float]) -> Answer:
        return Answer(one, np.array([ids], np.int32), np.array([logprobs], np.float32))

    good = compare([answer([7, 9], [-0.5, -2.4])], expected, limits)
    assert (good["topk_mean"], good["topk_elsewhere"]) == (pytest.approx(0.05), 0)
    # a place for which neither has a number says nothing, one for which the engine alone has none does
    two = np.zeros(2, np.float32)
    broken = Answer(two, np.array([[7, 9]] * 2, np.int32), np.array([[-0.5, -2.5], [np.nan] * 2]))
    wide_broken = np.array([wide[0], np.full(5, np.nan)])
    ids = np.concatenate([wide_ids, wide_ids])
    assert compare([broken], [Answer(two, ids, wide_broken)], Limits("float32"))["topk_mean"] == 0
    with pytest.raises(CanaryFailed):
        compare([broken], [Answer(two, ids, np.concatenate([wide, wide]))], Limits("float32"))
    for wrong in (answer([7, 8], [-0.5, -1.5]), answer([3, 7], [-0.5, -1.5]), answer([7, 9], [-0.5, -2.37])):
        with pytest.raises(CanaryFailed, match="most probable tokens are not the model's"):
            compare([wrong], expected, limits)


@pytest.mark.usefixtures("ray_session")
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


@pytest.mark.usefixtures("starts_processes")
def test_forgetting_clears_what_a_nan_left_in_the_cache(reference_model: Path) -> None:
    """Without it a later prompt that gets the same cache blocks comes out NaN: the second value shows the hazard."""
    done = subprocess.run(
        [sys.executable, "-c", POISON, reference_model], capture_output=True, text=True, timeout=600, cwd=ROOT
    )
    result = next((line for line in done.stdout.splitlines() if line.startswith("RESULT")), done.stderr[-2000:])
    assert result == "RESULT True False True"


def test_an_engine_is_refused_where_nothing_tells_what_it_may_differ_by() -> None:
    """A float16 forward that overflows has no distance: any engine would be within it."""
    expected, lost = [np.full(8, -2.0, np.float32)], Distance(0, np.inf, np.inf, np.inf, np.inf)
    with pytest.raises(CanaryFailed, match="not finite"):
        compare(answers([np.full(8, -9.0, np.float32)]), answers(expected), Limits("float16", lost))
