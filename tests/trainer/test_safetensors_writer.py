"""Files written piece by piece, read by the safetensors library."""

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trainer.safetensors_writer import NAMES, SafetensorsWriter

TENSORS = {
    "z.weight": torch.randn(5, 3),
    "a.weight": torch.randn(7, 2).bfloat16(),
    "größe": torch.tensor(4.5),
    "mask": torch.tensor([True, False, True]),
    "none": torch.empty(0, 4),
    "ids": torch.arange(6).view(2, 3),
    "half": torch.randn(3).half(),
}


@pytest.mark.parametrize("piece", [1, 4, 1000])
def test_the_library_reads_it(tmp_path: Path, piece: int) -> None:
    path = tmp_path / "a.safetensors"
    shapes = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}
    writer = SafetensorsWriter(path, shapes, {"format": "pt"})
    for name, tensor in reversed(TENSORS.items()):
        for first in range(0, tensor.numel(), piece):
            writer.write(name, tensor.reshape(-1)[first : first + piece], first)
    writer.close()
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    save_file(TENSORS, tmp_path / "b.safetensors", metadata={"format": "pt"})
    assert path.stat().st_size == (tmp_path / "b.safetensors").stat().st_size


def test_every_dtype_has_the_librarys_name(tmp_path: Path) -> None:
    for dtype, name in NAMES.items():
        save_file({"x": torch.zeros(4, dtype=dtype)}, tmp_path / "x.safetensors")
        with safe_open(tmp_path / "x.safetensors", "pt") as file:
            assert file.get_slice("x").get_dtype() == name
