"""Resumable state of a run: written to a temporary folder, hashed, then renamed into place.

OUT/checkpoints/step-000100/ holds a torch.distributed.checkpoint and checkpoint.json, which lists the
sha256 of each of its files. A folder that does not match its list is passed over, never loaded.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from shards.part import encode_json, publish_json, sha256_file
from shards.store import fsync_folder, open_store, temporary_name

KEEP = 2
INDEX = "checkpoint.json"


def _state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    model_state, optimizer_state = get_state_dict(model, optimizer)
    return {"model": model_state, "optimizer": optimizer_state}


def save_checkpoint(folder: Path, step: int, model: nn.Module, optimizer: Optimizer) -> Path:
    """Save the state after `step` steps under `folder` and remove all but the newest KEEP checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:06d}"
    temporary = temporary_name(final)
    dcp.save(_state(model, optimizer), checkpoint_id=temporary, no_dist=True)
    files = {file.name: sha256_file(file) for file in sorted(temporary.iterdir())}
    for name in files:
        with open(temporary / name, "rb") as file:
            os.fsync(file.fileno())
    publish_json(open_store(temporary), INDEX, encode_json({"step": step, "sha256": files}), "")
    if final.exists():  # one that did not match its hashes, or the run would have gone on from it
        shutil.rmtree(final)
    os.rename(temporary, final)
    fsync_folder(folder)
    for old in sorted(folder.glob("step-*"))[:-KEEP]:
        shutil.rmtree(old)
    for leftover in folder.glob(".step-*.tmp"):
        shutil.rmtree(leftover)
    return final


def _damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        index = json.loads((checkpoint / INDEX).read_text())
        for name, sha256 in index["sha256"].items():
            if sha256_file(checkpoint / name) != sha256:
                return f"{checkpoint / name}: sha256 differs from {INDEX}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{checkpoint / INDEX}: {error}"
    return None


def load_newest(folder: Path, model: nn.Module, optimizer: Optimizer) -> tuple[int, list[str]]:
    """Load the newest valid checkpoint into model and optimizer.

    Returns the number of steps done (0 without a checkpoint) and what was wrong with newer ones.
    """
    problems = []
    for checkpoint in sorted(folder.glob("step-*"), reverse=True):
        problem = _damage(checkpoint)
        if problem:
            problems.append(problem)
            continue
        state = _state(model, optimizer)
        dcp.load(state, checkpoint_id=checkpoint, no_dist=True)
        set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
        return json.loads((checkpoint / INDEX).read_text())["step"], problems
    return 0, problems
