"""Each model family from a corpus to a trained model that transformers and vLLM load, through the command line."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from annotated import rows_of_step
from conftest import make_model
from oracles import load, read_rows, remit_step, row_logprobs

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
    ("family", "context"),
    [
        ("Olmo2", "packed"), ("SmolLM3", "document"), ("Qwen3", "document"), ("Youtu", "packed"),
        pytest.param("Llama", "packed", marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_family(
    tmp_path: Path, corpus_folder: Path, tokenizer_folder: Path, remit: Remit, family: str, context: str
) -> None:
    base = make_model(tmp_path / "base", family, seed=1, positions=48)
    reference = make_model(tmp_path / "reference", family, seed=2, positions=48)
    for folder in (base, reference):
        shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    packed, shards, run = tmp_path / "packed", tmp_path / "shards", tmp_path / "run"

    done(remit("pack", "--corpus", corpus_folder, "--tokenizer", base, "--out", packed, "--seq-len", 48))
    score = ("score", "--num-engines", 1, "--dtype", "float32", "--context", context)
    done(remit(*score, "--shards", packed, "--model", reference, "--out", shards))
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

    # vLLM loads the export and agrees with transformers on it
    done(remit(*score, "--shards", packed, "--model", run / "model", "--out", tmp_path / "again", "--name", "trained"))
    check_scores(tmp_path / "again", run / "model", "trained", context)
