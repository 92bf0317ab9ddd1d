"""Which models the flywheel takes from post-training, and which it refuses, by name."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from pipelines.flywheel.check_model import check_model


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **values: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def other_tokenizer(folder: Path) -> None:
    value = json.loads((folder / "tokenizer.json").read_text())
    vocabulary = value["model"]["vocab"]
    first, second = list(vocabulary)[20:22]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (folder / "tokenizer.json").write_text(json.dumps(value))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def single_beside_shards(folder: Path) -> None:
    """Shards of the result with their index, and the one file of the model that it was made of."""
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_embeddings(folder: Path) -> None:
    """A whole model that transformers loads, without the last token."""
    edit_config(folder, vocab_size=520)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    rewrite(folder, lambda w: w.update({name: w[name][:520].clone() for name in tables if name in w}))


NORM = "model.norm.weight"
BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: (folder / "config.json").unlink(), "has no config.json (it has: "),
    (lambda folder: (folder / "model.safetensors").unlink(), "has no *.safetensors weights"),
    (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer.json: missing, expected the tokenizer beside"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "tokenizer.json: damaged"),
    (other_tokenizer, "its tokenizer is not that of the model it was made of (id 20 is "),
    (lambda folder: (folder / "modeling.py").touch(), "Python code in a model folder"),
    (lambda folder: edit_config(folder, model_type="nonesuch"), "transformers cannot make a model of it"),
    (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
    (lambda folder: edit_config(folder, hidden_size=128), "has shape (521, 64), expected (521, 128)"),
    (cut, "transformers cannot make a model of it (Error while deserializing header"),
    (single_beside_shards, "has model.safetensors, expected no weights beside model-00001-of-00001.safetensors"),
    (
        lambda folder: shutil.copy(folder / "model.safetensors", folder / "x.safetensors"),
        "has x.safetensors, expected no",
    ),
    (
        lambda folder: (folder / "model.safetensors").rename(folder / "x.safetensors"),
        "transformers cannot make a model of it (Error no file named model.safetensors",
    ),
    (lambda folder: edit_config(folder, num_hidden_layers=1, layer_types=None), "its weights hold model.layers.1."),
    (fewer_embeddings, "its embedding has 520 rows, expected at least the 521 of the model"),
    (lambda folder: rewrite(folder, lambda w: w.pop(NORM)), f"its weights have no {NORM}"),
    (lambda folder: rewrite(folder, lambda w: w[NORM].fill_(float("nan"))), f"{NORM} has values that are not finite"),
]


@pytest.mark.parametrize(("damage", "message"), BROKEN)
def test_broken_models_are_refused(
    tmp_path: Path, reference_model: Path, damage: Callable[[Path], object], message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(reference_model, folder)
    check_model(folder, {"model": reference_model})
    damage(folder)
    with pytest.raises(ValueError, match=re.escape(message)):
        check_model(folder, {"model": reference_model})


@pytest.mark.parametrize("family", ["Llama", "Qwen3", "SmolLM3"])
def test_whole_models_are_taken(tmp_path: Path, reference_model: Path, tokenizer_folder: Path, family: str) -> None:
    """Also with tied weights, in several files, in half precision."""
    import transformers

    folder = make_model(tmp_path / "model", family)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    shutil.rmtree(folder)
    model.save_pretrained(folder, max_shard_size="100KB")
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    assert len(list(folder.glob("*.safetensors"))) > 1
    check_model(folder, {"model": reference_model})
    sorted(folder.glob("*.safetensors"))[1].unlink()
    with pytest.raises(ValueError, match=r"transformers cannot make a model of it .*model-0000"):
        check_model(folder, {"model": reference_model})
