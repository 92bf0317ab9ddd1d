"""--float8 is refused where it cannot be, before anything is loaded. tests/real/test_float8.py has what needs torchao."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.config import TrainConfig
from trainer.float8 import require_float8

Remit = Callable[..., tuple[int, str, str]]


def test_refused_before_anything_is_loaded(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], remit: Remit
) -> None:
    line = ("train", "--shards", annotated["packed"], "--model", models["base"], "--out", tmp_path / "run", "--float8")
    for more, message in (
        (
            ("--dtype", "bfloat16"),
            r"--float8: the device is cpu, expected a GPU with float8 products; .*--float8-emulated",
        ),
        (("--float8-emulated",), r"--dtype is auto, float32 on this cpu device, expected bfloat16"),
        (("--dtype", "float32", "--float8-emulated"), r"--dtype is float32, expected bfloat16"),
    ):
        code, _, error = remit(*line, *more)
        assert code == 1
        assert re.search(message, error)
    assert not (tmp_path / "run" / "run.json").exists()
    with pytest.raises(ValueError, match="--float8-emulated is given without --float8"):
        TrainConfig(("shards",), "model", tmp_path / "run", float8_emulated=True)


def test_refused_on_older_cards_and_without_torchao(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(("shards",), "model", tmp_path / "run", float8=True, dtype="bfloat16")
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    cuda = SimpleNamespace(type="cuda")
    monkeypatch.setattr("trainer.float8.find_spec", lambda name: name)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda: True)
    for capability, accepted in (((8, 0), False), ((8, 9), True), ((9, 0), True), ((10, 0), True)):
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device, now=capability: now)
        if accepted:
            require_float8(config, cuda)
        else:
            with pytest.raises(ValueError, match=r"A100-SXM4-80GB has compute capability 8\.0, expected 8\.9 or newer"):
                require_float8(config, cuda)
    monkeypatch.setattr("trainer.float8.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"torchao is not installed; .*pip install '\.\[float8\]'"):
        require_float8(config, cuda)
