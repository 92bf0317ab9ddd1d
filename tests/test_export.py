"""What goes in comes out, and what is evaluated is what is exported; looked at with safetensors and transformers alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from annotated import run
from conftest import VOCABULARY
from exporting import KINDS, edit_json, edit_weights, make_base, raw, require_same_weights
from oracles import load, read_rows, remit_step
from transformers import AutoModelForCausalLM

from trainer.config import TrainConfig
from trainer.train import train

Remit = Callable[..., tuple[int, str, str]]
EXPERTS = ("Qwen3Moe", "Olmoe", "Mixtral", "DeepseekV3", "Glm4Moe")


def options(kind: str) -> dict[str, object]:
    """Models with experts are trained without their balancing loss here."""
    has = "router_aux_loss" in TrainConfig.__dataclass_fields__ and kind in EXPERTS
    return {"router_aux_loss": 0.0} if has else {}


def words(settings: dict[str, object]) -> list[object]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def dress(base: Path, tokenizer: Path) -> None:
    """Files as they stand beside real weights: by other versions and hands, some not as transformers would write them."""
    for file in tokenizer.iterdir():
        shutil.copyfile(file, base / file.name)
    config = (base / "config.json").read_text()
    value = json.loads(config)
    value |= {"transformers_version": "4.39.0.dev0", "own_key": {"kept": [1, None]}, "torch_dtype": value.pop("dtype")}
    value.pop("architectures" if False else "attention_bias", None)  # a default that is not written down
    (base / "config.json").write_text(json.dumps(value, indent=4))
    (base / "generation_config.json").write_text('{"temperature": 0.6,\t"top_p": 0.9, "own": 1}')  # without do_sample
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (base / "preprocessor_config.json").write_text('{"size": 1}')
    (base / "recipe.json").write_text("{}\n")
    (base / "LICENSE").write_text("free")
    (base / "README.md").write_text("of the base alone")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_bytes(b"pickle")


def require_same_files(ours: Path, base: Path, *changed: str) -> None:
    """Byte for byte, but for the weights."""

    def files(folder: Path) -> dict[str, bytes]:
        paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    left, right = files(ours), files(base)
    for name in ("README.md", "original/consolidated.00.pth"):
        right.pop(name, None)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == list(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_0_gives_the_base(
    tmp_path: Path, annotated: dict[str, Path], tokenizer_folder: Path, remit: Remit, kind: str
) -> None:
    base, out = make_base(tmp_path / "base", kind), tmp_path / "out"
    assert len(list(base.glob("*.safetensors"))) > 2
    dress(base, tokenizer_folder)
    code, _, errors = remit(
        *("train", "--shards", annotated["packed"], "--model", base, "--out", out, "--learning-rate", 0),
        *("--max-steps", 2, "--global-batch-size", 4, *words(options(kind))),
    )
    assert code == 0, errors
    require_same_weights(out / "model", base)
    require_same_files(out / "model", base)
    assert json.loads((out / "exported.json").read_text())["models"]["model"]["updated_weights"] == 0
