"""A reference without a tokenizer is scored, told of and recorded; one that predicts worse than a guess is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import transformers
from conftest import VOCABULARY, make_model

from scorer import score as score_module
from scorer.canary import Forwards
from scorer.engine import Answer
from scorer.forward import load_forward
from scorer.guess import MARGIN, GuessCheck, instead_of_tokenizer, mean_logprob, require_better_than_a_guess
from shards import ShardFolder

Remit = Callable[..., tuple[int, str, str]]
LN_8 = 2.0794415


def forwards(*logprobs: list[float]) -> Forwards:
    return Forwards([], [Answer(np.array(each, np.float32)) for each in logprobs], {})


def test_means_by_hand() -> None:
    said = forwards([-1.0, -2.0], [-6.0], [np.nan, -np.inf])
    assert mean_logprob(said) == -3
    assert mean_logprob(forwards([np.nan])) is mean_logprob(forwards()) is None
    line, facts = instead_of_tokenizer(said, 8, Path("m"))
    assert line == (
        "m: its tokenizer is not compared, it has none; its log-probs of the first rows are -3.00 nat in the mean, a guess has -2.08"
    )
    assert facts == {"mean_logprob": -3.0, "guess": pytest.approx(-LN_8)}
    assert "nothing else was compared" in instead_of_tokenizer(forwards(), 8, Path("m"))[0]


def test_worse_than_a_guess_is_refused() -> None:
    require_better_than_a_guess(forwards([-LN_8 - MARGIN + 0.01] * 4), 8, Path("m"))
    require_better_than_a_guess(forwards([np.nan]), 8, Path("m"))  # said by the canary
    require_better_than_a_guess(forwards(), 8, Path("m"))
    with pytest.raises(ValueError, match=r"m: its log-probs .* are -3\.40 nat .* 8 tokens -2\.08, .*--no-canary if"):
        require_better_than_a_guess(forwards([-LN_8 - MARGIN - 0.07] * 4), 8, Path("m"))


@pytest.mark.parametrize("family", ["Olmo2", "Qwen3", "Gemma2", "Granite"])
def test_random_weights_are_near_a_guess_and_pass(tmp_path: Path, family: str) -> None:
    """Large ones, as the tests have, and such as a training begins with."""
    large = make_model(tmp_path / "large", family)
    config = transformers.AutoConfig.from_pretrained(large)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "small")
    generator = np.random.default_rng(0)
    for folder in (large, tmp_path / "small"):
        forward = load_forward(folder)
        said = forwards(*(forward(generator.integers(0, VOCABULARY, length)) for length in (60, 40, 2)))
        require_better_than_a_guess(said, config.vocab_size, folder)


def test_the_choice_of_a_dtype_looks_at_it(monkeypatch: pytest.MonkeyPatch) -> None:
    engine: Any = SimpleNamespace(vocab_size=8, model=Path("m"))
    task = SimpleNamespace(wait=lambda stop: forwards([-20.0] * 9))
    monkeypatch.setattr(score_module, "ForwardTask", lambda *arguments: task)
    monkeypatch.setattr(score_module, "find_prompts", lambda *arguments: [np.arange(9)])
    monkeypatch.setattr(score_module, "ray_errors", lambda stop: monkeypatch.context())
    config: Any = SimpleNamespace(context="packed")
    shards: Any = SimpleNamespace(manifest=SimpleNamespace(parts=[]))
    with pytest.raises(ValueError, match="guess among its 8 tokens"):
        score_module.choose_dtype(config, shards, engine, lambda: False, print)


def test_a_run_looks_once_as_soon_as_it_is_known(tmp_path: Path) -> None:
    told: list[tuple[str, str]] = []

    def tell(event: str, line: str, **facts: Any) -> None:
        told.append((event, line))

    engine: Any = SimpleNamespace(vocab_size=8, model=tmp_path, kind="vllm")
    check = GuessCheck(engine, tell)
    check.look(None)
    assert told == []
    for _ in range(2):
        check.look(forwards([-1.0]))
    assert [event for event, _ in told] == ["no_tokenizer"]
    assert "-1.00 nat in the mean" in told[0][1]
    with pytest.raises(ValueError, match="guess among its 8 tokens"):
        GuessCheck(engine, tell).look(forwards([-20.0] * 9))
    (tmp_path / "tokenizer.json").write_text("{}")
    GuessCheck(engine, tell).look(forwards([-1.0]))
    assert len(told) == 1


@pytest.mark.usefixtures("ray_session")
def test_a_reference_without_a_tokenizer_is_told_of_and_recorded(
    tmp_path: Path, packed: Path, reference_model: Path, tokenizer_folder: Path, remit: Remit
) -> None:
    model, out = tmp_path / "weights", tmp_path / "out"
    make_model(model, seed=1)
    command = ["score", "--shards", packed, "--model", model, "--name", "rl", "--engine", "fake", "--num-engines", 1]
    code, _, error = remit(*command, "--out", out)
    assert code == 0, error
    assert f"{model}: has no tokenizer to compare with the rows'" in error
    assert f"{model}: its tokenizer is not compared, it has none; nothing else was compared" in error
    assert ShardFolder(out).manifest.references["rl"]["tokenizer"] == "none"
    events = [json.loads(line) for line in (out / "_score.jsonl").read_text().splitlines()]
    (event,) = [event for event in events if event["event"] == "no_tokenizer"]
    assert event["guess"] == pytest.approx(-np.log(VOCABULARY))
    assert remit("verify", "--shards", out)[0] == 0
    # with the tokenizer beside the same weights, it is the same scoring
    shutil.copytree(tokenizer_folder, model, dirs_exist_ok=True)
    code, output, error = remit(*command, "--out", out)
    assert (code, "nothing to do" in output) == (0, True), error
    code, _, error = remit(*command, "--out", tmp_path / "other")
    assert (code, "its tokenizer is not compared" in error) == (0, False)
    assert "tokenizer" not in ShardFolder(tmp_path / "other").manifest.references["rl"]
