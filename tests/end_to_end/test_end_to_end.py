"""Each model family from a corpus to a trained model that transformers and vLLM load, through the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from annotated import annotate, by_model, rows_of_step
from conftest import make_model
from oracles import kd_step, load, read_rows, remit_step, rho1_step, row_logprobs

Remit = Callable[..., tuple[int, str, str]]


def done(result: tuple[int, str, str]) -> str:
    assert result[0] == 0, result[2]
    return result[1]


def check_scores(shards: Path, model: Path, name: str, context: str) -> None:
    """Every tenth row's log-probs against a transformers forward."""
    reference = load(model)
    with torch.no_grad():
        for row in read_rows(shards)[::10]:
            want = row_logprobs(reference, row, context)
            for value, expected in zip(row[f"{name}_logprobs"], want, strict=True):
                assert (value is None) == (expected is None)
                assert value is None or abs(value - expected.item()) <= 1 / 128 + 1e-3


@pytest.mark.parametrize(
    ("family", "context", "by_engine"),
    [
        ("Olmo2", "packed", True), ("SmolLM3", "document", False), ("Youtu", "packed", False),
        pytest.param("SmolLM3", "document", True, marks=pytest.mark.slow),
        pytest.param("Youtu", "packed", True, marks=pytest.mark.slow),
        pytest.param("Qwen3", "document", True, marks=pytest.mark.slow),
        pytest.param("Llama", "packed", True, marks=pytest.mark.slow),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("ray_session")
def test_family(
    tmp_path: Path,
    corpus_folder: Path,
    tokenizer_folder: Path,
    remit: Remit,
    family: str,
    context: str,
    by_engine: bool,
) -> None:
    """by_engine: vLLM scores the reference too; else transformers does, and vLLM the trained model alone."""
    base = make_model(tmp_path / "base", family, seed=1, positions=48)
    reference = make_model(tmp_path / "reference", family, seed=2, positions=48)
    for folder in (base, reference):
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    packed, shards, run = tmp_path / "packed", tmp_path / "shards", tmp_path / "run"

    done(remit("pack", "--corpus", corpus_folder, "--tokenizer", base, "--out", packed, "--seq-len", 48))
    score = ("score", "--num-engines", 1, "--dtype", "float32", "--context", context)
    if by_engine:
        done(remit(*score, "--shards", packed, "--model", reference, "--out", shards))
    else:
        annotate(packed, shards, by_model(reference, context, 1 / 64), context, 1 / 64)
    check_scores(shards, reference, "rl", context)
    assert "OK" in done(remit("verify", "--shards", shards))

    # no --context for train: it follows the column
    train = ("train", "--shards", shards, "--model", base, "--out", run, "--max-steps", 3, "--seed", 7)
    output = done(remit(*train, "--global-batch-size", 6, "--micro-batch-size", 4, "--dtype", "float32"))
    assert "weights clipped low (to 0.8): " in output
    metrics = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    want = remit_step(load(base), rows_of_step(shards, 0, 6, seed=7), context, "rl_logprobs", 0.2)
    for key in ("loss", "ntp_loss", "weight_mean", "clipped_low", "clipped_high"):
        assert metrics[key] == pytest.approx(float(want[key]), abs=1e-4), key

    trained, before = load(run / "model"), load(base)
    tied = family in ("SmolLM3", "Qwen3", "Youtu")
    assert (trained.get_output_embeddings().weight is trained.get_input_embeddings().weight) is tied
    changed = [not torch.equal(a, b) for a, b in zip(trained.parameters(), before.parameters(), strict=True)]
    assert all(changed)
    tokenizer = transformers.AutoTokenizer.from_pretrained(run / "model")
    assert tokenizer("x = 1")["input_ids"] == transformers.AutoTokenizer.from_pretrained(base)("x = 1")["input_ids"]

    # vLLM loads the export and agrees with transformers on it, as is checked here and need not be by remit score
    score += ("--no-canary", "--shards", packed, "--model", run / "model", "--name", "trained")
    done(remit(*score, "--out", tmp_path / "again"))
    check_scores(tmp_path / "again", run / "model", "trained", context)


@pytest.mark.parametrize("by_engine", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.usefixtures("ray_session")
def test_every_objective_from_one_store(
    tmp_path: Path, exact: Path, reference_model: Path, remit: Remit, by_engine: bool
) -> None:
    """A folder with the most probable tokens, by a real engine; two columns more; then every method from that folder.

    by_engine: the other two come from engines as well, not from transformers.
    """
    shards = exact
    models = {"rl": reference_model}
    for name, seed in (("base", 5), ("sft", 3)):
        models[name] = make_model(tmp_path / name, seed=seed)
        before, shards = shards, tmp_path / f"with-{name}"
        if by_engine:
            options = ("--name", name, "--model", models[name], "--dtype", "float32", "--num-engines", 1)
            done(remit("score", "--shards", before, "--out", shards, *options))
        else:
            annotate(before, shards, by_model(models[name], "packed", 1 / 64), "packed", 1 / 64, name)
    assert "OK" in done(remit("verify", "--shards", shards))
    for name, model in models.items():
        check_scores(shards, model, name, "packed")

    rows = rows_of_step(shards, 0, 8, seed=7)
    base = load(models["base"])
    kd = {"kd_weight": 0.5, "temperature": 1.0, "missing_mass": "bucket"}
    wanted = {
        ("remit", "--reference", "sft"): remit_step(base, rows, "packed", "sft_logprobs", 0.2),
        ("remit", "--epsilon", "inf"): remit_step(base, rows, "packed", "rl_logprobs", float("inf")),
        ("rho1", "--keep-ratio", 0.7): rho1_step(base, rows, "packed", "rl_logprobs", [list(range(8))], 0.7),
        ("kd",): kd_step(base, rows, "packed", "rl", kd),
    }
    common = ("--model", models["base"], "--max-steps", 1, "--seed", 7, "--global-batch-size", 8, "--dtype", "float32")
    for index, (options, want) in enumerate(wanted.items()):
        out = tmp_path / f"run-{index}"
        output = done(remit("train", "--shards", shards, "--out", out, *common, "--objective", *options))
        assert ("clipped low" in output) == (options[-1] == "sft")
        metrics = json.loads((out / "metrics.jsonl").read_text())
        for key in set(want) & set(metrics):
            assert metrics[key] == pytest.approx(float(want[key]), abs=1e-4), (options, key)

    output = done(remit("select", "--shards", shards, "--teacher", "rl", "--small", "base", "--keep-ratio", 0.5,
                        "--out", tmp_path / "chosen"))  # fmt: skip
    everything, kept = read_rows(shards), read_rows(tmp_path / "chosen")
    scores = [
        sum(a - b for a, b in zip(row["rl_logprobs"][1:], row["base_logprobs"][1:])) / max(1, len(row["input_ids"]) - 1)
        if len(row["input_ids"]) > 1 else None
        for row in everything
    ]  # fmt: skip
    ranked = sorted((n for n, score in enumerate(scores) if score is not None), key=lambda n: (-scores[n], n))
    best = sorted(ranked[: int(len(ranked) * 0.5 + 0.5)])
    assert kept == [everything[n] for n in best]
    assert f"selected {len(best):,} of {len(ranked):,} rows" in output
    assert "OK" in done(remit("verify", "--shards", tmp_path / "chosen"))
    for objective in ("ntp", "kd"):
        out = tmp_path / f"chosen-{objective}"
        done(remit("train", "--shards", tmp_path / "chosen", "--out", out, *common, "--objective", objective))

    figures = tmp_path / "figures.json"
    plan = done(remit("weights", "--shards", shards, "--rows", 0, "--json", figures))
    assert "epsilon" in plan
    whole = tmp_path / "whole"
    done(remit("train", "--shards", shards, "--out", whole, *common, "--global-batch-size", len(everything)))
    metrics = json.loads((whole / "metrics.jsonl").read_text())
    line = json.loads(figures.read_text())["epsilons"]["0.2"]
    # the stored log-probs of the base are rounded, the live ones are not
    assert line["clipped_high"] == pytest.approx(metrics["clipped_high"], abs=0.01)
    assert line["effective_share"] == pytest.approx(metrics["effective_tokens"] / metrics["predicted_tokens"], abs=1e-3)
