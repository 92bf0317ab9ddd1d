"""The sample project at a small size: complete, deterministic, a reference better at reasoning than its base."""

import random
from pathlib import Path

import pytest
import torch
import transformers
from oracles import load

from pipelines.sample import SampleConfig, build
from pipelines.sample_corpus import documents, reasoning


def test_documents_follow_from_the_seed() -> None:
    assert list(documents(3, 50, 0.5, 0.2)) == list(documents(3, 50, 0.5, 0.2))
    assert list(documents(3, 50, 0.5, 0.2)) != list(documents(4, 50, 0.5, 0.2))


@pytest.mark.parametrize("seed", range(20))
def test_solutions_are_right_unless_asked_otherwise(seed: int) -> None:
    lines = reasoning(random.Random(seed), wrong_steps=0.0).splitlines()
    for step in lines[1:-1]:
        left, right = step.split(" = ")
        assert eval(left) == int(right) >= 0
    assert lines[-1] == f"Answer: {lines[-2].split(' = ')[1]}"
    wrong = reasoning(random.Random(seed), wrong_steps=1.0).splitlines()
    assert any(eval(step.split(" = ")[0]) != int(step.split(" = ")[1]) for step in wrong[1:-1])


@pytest.mark.usefixtures("ray_session")
def test_build_twice_gives_the_same_models(tmp_path: Path) -> None:
    for name in ("one", "two"):
        build(SampleConfig(tmp_path / name, documents=300, base_steps=15, reference_steps=25, seq_len=64))
    files = [
        "base/model.safetensors",
        "reference/model.safetensors",
        "tokenizer/tokenizer.json",
        "corpus/mix-0.jsonl.zst",
    ]
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file
    names = sorted(path.name for path in (tmp_path / "one").iterdir())
    assert names == ["base", "corpus", "heldout", "reference", "tokenizer"]
    assert len(list((tmp_path / "one" / "corpus").glob("*.jsonl.zst"))) == 4
    assert len(list((tmp_path / "one" / "corpus").glob("*.parquet"))) == 1

    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "one" / "tokenizer")
    ids = tokenizer("".join(documents(99, 3, 1.0, 0.0)), return_tensors="pt")["input_ids"][:, :64]
    losses = {}
    for name in ("base", "reference"):
        with torch.no_grad():
            losses[name] = load(tmp_path / "one" / name)(input_ids=ids, labels=ids).loss.item()
    assert losses["reference"] < losses["base"] - 0.1
