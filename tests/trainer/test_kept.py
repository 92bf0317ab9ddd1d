"""What a run must not lose or stumble over: a finished model, a copy of a checkpoint, the count of AdamW's steps."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from annotated import run

from trainer.checkpoint import _state
from trainer.config import TrainConfig
from trainer.train import train

SETTINGS: dict = {"schedule": "constant", "global_batch_size": 2, "checkpoint_every": 2, "micro_batch_size": 2}


def damage(checkpoint: Path) -> None:
    file = next(checkpoint.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_finished_model_stays_where_its_checkpoint_is_damaged(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    run(out, annotated["packed"], models["base"], max_steps=4, **SETTINGS)
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file() and "_lease" not in file.parts}
    damage(out / "checkpoints" / "step-000004")
    again = r"last checkpoint is damaged.* step 2 alone; keep its model .*--resume-from .*checkpoints/step-000002"
    with pytest.raises(ValueError, match=again):
        run(out, annotated["packed"], models["base"], max_steps=6, **SETTINGS)
    for file, data in before.items():
        assert file.read_bytes() == data or file.suffix == ".distcp", file
    train(
        TrainConfig(
            str(annotated["packed"]), str(models["base"]), tmp_path / "new", max_steps=6, dtype="float32",
            resume_from=out / "checkpoints" / "step-000002", **SETTINGS,
        )
    )  # fmt: skip
    whole = run(tmp_path / "whole", annotated["packed"], models["base"], max_steps=6, **SETTINGS)
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    assert [line["loss"] for line in lines] == [line["loss"] for line in whole[2:]]


def test_a_copy_of_a_checkpoint_is_left_alone(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    out = tmp_path / "out"
    run(out, annotated["packed"], models["base"], max_steps=4, keep_checkpoints=1, **SETTINGS)
    kept = out / "checkpoints" / "step-000002-keep"
    shutil.copytree(out / "checkpoints" / "step-000004", kept)
    lines = run(out, annotated["packed"], models["base"], max_steps=8, keep_checkpoints=1, **SETTINGS)
    assert lines[-1]["step"] == 8
    assert sorted(path.name for path in kept.parent.iterdir()) == ["step-000002-keep", "step-000008"]


def test_a_save_before_any_update_counts_no_step() -> None:
    """The update after it is that of an optimizer that was never asked for its state."""
    weights = []
    for asked in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
        if asked:
            assert {float(state["step"]) for state in _state(model, optimizer)["optimizer"]["state"].values()} == {0.0}
        for value in (1.0, -3.0):
            model(torch.full((1, 3), value)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(model.weight.detach().clone())
    assert torch.equal(*weights)
