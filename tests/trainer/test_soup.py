"""Soups of models against the mean of what transformers loads, and every kind of model that does not fit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model
from oracles import load
from safetensors.torch import load_file, save_file

from trainer.soup import average, mean, shares_of

Remit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three models of one kind; the second is cut into several files."""
    root = tmp_path_factory.mktemp("parts")
    folders = [make_model(root / f"{seed}", seed=seed) for seed in (1, 2, 3)]
    load(folders[1]).save_pretrained(root / "cut", max_shard_size="40KB")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (folders[1] / name).exists():
            shutil.copyfile(folders[1] / name, root / "cut" / name)
    assert len(list((root / "cut").glob("*.safetensors"))) > 1
    return [folders[0], root / "cut", folders[2]]


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 0, 2)])
def test_soup_is_the_weighted_mean(tmp_path: Path, parts: list[Path], remit: Remit, order: tuple[int, ...]) -> None:
    folders = [parts[index] for index in order]
    code, output, error = remit("average", *folders, "--out", tmp_path / "soup", "--weights", 2, 1, 1)
    assert code == 0, error
    assert "averaged 3 models" in output
    models = [load(folder).state_dict() for folder in folders]
    got = load(tmp_path / "soup").state_dict()
    assert got.keys() == models[0].keys()
    for name, value in got.items():
        want = sum(share * model[name].double() for share, model in zip((0.5, 0.25, 0.25), models))
        torch.testing.assert_close(value.double(), want, rtol=1e-6, atol=1e-7)
    assert (tmp_path / "soup/config.json").read_bytes() == (folders[0] / "config.json").read_bytes()
    record = json.loads((tmp_path / "soup/average.json").read_text())
    assert [entry["weight"] for entry in record["models"]] == [0.5, 0.25, 0.25]
    assert [path.name for path in tmp_path.iterdir()] == ["soup"]
    code, output, _ = remit("average", *folders, "--out", tmp_path / "soup", "--weights", 2, 1, 1)
    assert (code, "nothing to do" in output) == (0, True)
    code, _, error = remit("average", *folders, "--out", tmp_path / "soup")
    assert (code, "exists and is not this average" in error) == (1, True)


def test_dtypes_and_shapes_stay(tmp_path: Path) -> None:
    """bfloat16 is summed in float32; scalars, empty tensors and equal integers pass, metadata is kept."""
    folders = []
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        tensors = {
            "low": torch.randn(33, 5, generator=g).bfloat16(), "half": torch.randn(7, generator=g).half(),
            "double": torch.randn(3, generator=g).double(), "scalar": torch.tensor(float(seed)),
            "none": torch.zeros(0, 4), "ids": torch.arange(5), "é/ü": torch.randn(2, 2, generator=g),
        }  # fmt: skip
        folders.append(tmp_path / f"{seed}")
        folders[-1].mkdir()
        save_file(tensors, folders[-1] / "model.safetensors", metadata={"format": "pt", "by": "x"})
        (folders[-1] / "config.json").write_text(json.dumps({"model_type": "llama", "transformers_version": str(seed)}))
    assert average(folders, tmp_path / "soup")
    got, all_parts = (
        load_file(tmp_path / "soup/model.safetensors"),
        [load_file(f / "model.safetensors") for f in folders],
    )
    for name, value in got.items():
        want = sum(part[name].double() for part in all_parts) / 4
        assert value.dtype == all_parts[0][name].dtype
        assert value.shape == all_parts[0][name].shape
        torch.testing.assert_close(value, want.to(value.dtype), rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match="exists and is not this average"):
        average(folders[:2], tmp_path / "soup")
    assert mean([torch.ones(2).half()] * 3, [1 / 3] * 3).tolist() == [1.0, 1.0]


def test_what_does_not_fit_is_refused_by_field(tmp_path: Path, parts: list[Path]) -> None:
    first = parts[0]

    def changed(name: str, change: Callable[[Path], None]) -> Path:
        shutil.copytree(first, tmp_path / name)
        change(tmp_path / name)
        return tmp_path / name

    def tensors(change: Callable[[dict], dict]) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

        return write

    def config(**values: object) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            there = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps(there | values))

        return write

    head = "lm_head.weight"
    cases = [
        ("gone", tensors(lambda t: {n: v for n, v in t.items() if n != head}), f"has a tensor {head}"),
        ("more", tensors(lambda t: t | {"more": torch.ones(1)}), "more has a tensor more"),
        ("shape", tensors(lambda t: t | {head: t[head][:-1].clone()}), f"shape of {head} is"),
        ("dtype", tensors(lambda t: t | {head: t[head].bfloat16()}), f"dtype of {head} is torch.bfloat16"),
        ("config", config(rms_norm_eps=0.5), "config.json has another rms_norm_eps"),
        ("quantised", config(quantization_config={"bits": 4}), "quantised"),
        ("tokenizer", lambda folder: (folder / "tokenizer.json").write_text("{}"), "its tokenizer has another tokenizer.json"),
    ]  # fmt: skip
    for name, change, message in cases:
        with pytest.raises(ValueError, match=message):
            average([first, changed(name, change)], tmp_path / "soup")
    folders = [changed(f"ids{n}", tensors(lambda t, n=n: t | {"ids": torch.tensor([n])})) for n in (1, 2)]
    with pytest.raises(ValueError, match="holds integers that differ"):
        average(folders, tmp_path / "soup")
    assert not (tmp_path / "soup").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    for weights in ([1.0], [1.0, -1.0], [0.0, 0.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="--weights"):
            shares_of(weights, 2)


def test_one_model_is_no_soup(tmp_path: Path, parts: list[Path], remit: Remit) -> None:
    code, _, error = remit("average", parts[0], "--out", tmp_path / "soup")
    assert code == 2
    assert "expected at least two" in " ".join(error.replace("│", " ").split())
    code, _, error = remit("average", parts[0], tmp_path / "missing", "--out", tmp_path / "soup")
    assert (code, "no such folder" in error) == (1, True)
