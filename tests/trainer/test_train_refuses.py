"""What must not train, and says why: models, settings, numbers."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from annotated import annotate, run
from conftest import make_model
from oracles import load

Remit = Callable[..., tuple[int, str, str]]


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Gemma2", {}, "Gemma2ForCausalLM: .*soft-capping or scaling"),
        ("Granite", {}, "GraniteForCausalLM: .*soft-capping or scaling"),
        ("Cohere", {}, "CohereForCausalLM: .*soft-capping or scaling"),
        ("Llama", {"max_position_embeddings": 16}, "takes at most 16 tokens"),
        ("Llama", {"vocab_size": 400}, "has 400 embedding rows"),
    ],
)
def test_models_that_cannot_be_trained_right_are_refused(
    tmp_path: Path, annotated: dict[str, Path], remit: Remit, family: str, changes: dict, message: str
) -> None:
    make_model(tmp_path / "model", family, **changes)
    code, _, error = remit(
        "train",
        "--shards",
        annotated["packed"],
        "--model",
        tmp_path / "model",
        "--out",
        tmp_path / "out",
        "--max-steps",
        1,
    )
    assert code == 1
    assert re.search(message, error.strip().splitlines()[-1]), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--reference", "sft"], 1, "has no log-probs of a reference named 'sft' (it has: rl)"),
        (["--context", "document"], 1, "was scored in packed context, document asked for"),
        (["--epsilon", "1.5"], 2, "--epsilon is 1.5, expected a number between 0 and 1"),
        (["--global-batch-size", "0"], 2, "--global-batch-size is 0, expected at least 1"),
        (["--learning-rate", "nan"], 2, "--learning-rate is nan"),
        (["--out", "{tmp}/full"], 1, "is not empty and not a run of remit train"),
        (["--model", "{tmp}/nowhere"], 1, "no such folder"),
        (["--shards", "{tmp}/full"], 1, "has no _manifest.json"),
        (["--objective", "magic"], 2, "magic"),
    ],
)
def test_bad_arguments(
    tmp_path: Path,
    annotated: dict[str, Path],
    models: dict[str, Path],
    remit: Remit,
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    settings = {"--shards": annotated["packed"], "--model": models["base"], "--out": tmp_path / "out", "--max-steps": 1}
    settings |= dict(zip(arguments[::2], (value.format(tmp=tmp_path) for value in arguments[1::2])))
    got, _, error = remit("train", *(item for pair in settings.items() for item in pair))
    assert got == code
    assert message in " ".join(error.replace("│", " ").split())
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "is nan, which is not finite"),
        (0.5, "is 0.5, which is not"),
        (None, "is null, expected null exactly"),
    ],
)
def test_only_valid_numbers_train(
    tmp_path: Path, small: Path, models: dict[str, Path], value: float | None, message: str
) -> None:
    shards = annotate(small, tmp_path / "bad", lambda row: [None] + [value] * (len(row["input_ids"]) - 1), "packed")
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "out", shards, models["base"])


def test_a_loss_that_is_not_finite_stops_before_the_step(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    model = load(models["base"])
    with torch.no_grad():
        model.lm_head.weight[3] = float("nan")
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(FloatingPointError, match="step 1: loss nan"):
        run(tmp_path / "out", annotated["packed"], tmp_path / "model")
    assert not (tmp_path / "out" / "model").exists()
