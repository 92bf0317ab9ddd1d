"""Steps of torchtitan and OLMo-core on exported shards, beside the same steps of this trainer: losses have to be equal.

    python -m benchmarks.other_trainers --shards work/scored --base .cache/sample/base --work work/other-trainers

torchtitan trains a tiny Qwen3 of random weights, in the order of remit train, whose losses stand beside; OLMo-core the sample's
OLMo 2, in its own order, beside this trainer's loss on the same rows. float32, two CPU cores, about two minutes.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
import tyro
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.common import Claim, claim, report
from shards import ShardFolder
from trainer.batch import collate
from trainer.data import RowReader
from trainer.loss_model import LossModel
from trainer.model import load_base
from trainer.objectives import ObjectiveSettings, make_objective
from trainer.statistics import StepStatistics

STEPS, BATCH, MICRO, RATE = 8, 16, 4, 1e-3
LARGEST = 20  # difference of two losses, in millionths of the loss: float32, after some steps


@dataclass(frozen=True)
class Settings:
    shards: Path
    """Annotated shards."""
    base: Path
    """OLMo 2 that OLMo-core begins with."""
    work: Path
    """Folder for exports and runs."""
    reference: str = "rl"
    """Name of the log-probs."""


def call(*command: object, **environment: str) -> str:
    """Output of a command of this Python; its errors are shown."""
    arguments = [sys.executable, "-m", *map(str, command)]
    found = subprocess.run(arguments, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=False)
    if found.returncode:
        sys.exit(f"{' '.join(arguments)}: exit code {found.returncode}\n{found.stdout[-3000:]}")
    return found.stdout


def places(block_rows: np.ndarray, numbers: list[int]) -> np.ndarray:
    """Block and row within the block of rows that are counted over all parts, [rows, 2]."""
    ends = np.cumsum(block_rows)
    blocks = np.searchsorted(ends, numbers, side="right")
    return np.stack([blocks, np.array(numbers) - (ends - block_rows)[blocks]], axis=1)


def own_losses(settings: Settings, steps: list[list[int]]) -> list[float]:
    """This trainer's loss of these rows of the shards, step by step, AdamW between them."""
    folder = ShardFolder(settings.shards)
    context = folder.require_scored(settings.reference)["context"]
    base = load_base(settings.base, "float32", torch.device("cpu"), context)
    reader = RowReader(folder, context, settings.reference, base.num_embeddings)
    model, objective = LossModel(base), make_objective(ObjectiveSettings())
    optimizer = torch.optim.AdamW(model.parameters(), RATE, (0.9, 0.95), weight_decay=0.0)
    losses = []
    for numbers in steps:
        rows = reader.rows(places(reader.block_rows, numbers))
        total = sum(int(row.predicted.sum()) for row in rows)
        loss = torch.zeros(())
        for first in range(0, len(rows), MICRO):
            batch = collate(rows[first : first + MICRO], context, "cpu")
            part = model(batch, objective, total, 1.0, StepStatistics())
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


def in_olmo_core(settings: Settings) -> tuple[list[float], list[float]]:
    """Losses of OLMo-core, and of this trainer on the same rows."""
    rows = settings.work / "olmo-core"
    call(
        "pipelines.cli",
        "export",
        "--to",
        "olmo-core",
        "--shards",
        settings.shards,
        "--reference",
        settings.reference,
        "--out",
        rows,
    )
    said = call(
        "benchmarks.other_trainers.olmo_core_steps", "--rows", rows, "--base", settings.base,
        "--out", settings.work / "olmo-core-run", "--steps", STEPS, "--batch-rows", BATCH, "--micro-rows", MICRO,
        "--learning-rate", RATE,
    )  # fmt: skip
    steps = [json.loads(line) for line in said.splitlines() if line.startswith('{"step"')]
    return [step["loss"] for step in steps], own_losses(settings, [step["rows"] for step in steps])


def in_torchtitan(settings: Settings) -> tuple[list[float], list[float]]:
    """Losses of torchtitan, and of remit train."""
    base, rows, run = (settings.work / name for name in ("qwen3", "torchtitan", "qwen3-run"))
    if not (base / "config.json").exists():
        write_qwen3(base, ShardFolder(settings.shards))
    call(
        "pipelines.cli", "export", "--to", "torchtitan", "--shards", settings.shards, "--reference", settings.reference,
        "--out", rows,
    )  # fmt: skip
    titan_run = settings.work / f"torchtitan-run-{os.getpid()}"
    call(
        "benchmarks.other_trainers.titan_on_cpu", "--module", "remit_rows", "--config",
        "benchmarks.other_trainers.titan_config.tiny_qwen3", "--dump_folder", titan_run.absolute(),
        PYTHONPATH=os.pathsep.join([str(rows.absolute()), str(Path.cwd())]), BASE=str(base.absolute()),
    )  # fmt: skip
    call(
        "pipelines.cli", "train", "--shards", settings.shards, "--model", base, "--reference", settings.reference, "--out",
        f"{run}-{os.getpid()}", "--max-steps", STEPS, "--schedule", "constant", "--warmup-steps", 0, "--learning-rate", RATE,
        "--weight-decay", 0, "--global-batch-size", BATCH, "--micro-batch-size", MICRO, "--dtype", "float32",
        "--checkpoint-every", 0,
    )  # fmt: skip
    ours = [json.loads(line)["loss"] for line in Path(f"{run}-{os.getpid()}/metrics.jsonl").read_text().splitlines()]
    events = next(titan_run.rglob("events.out.tfevents.*"))
    found = EventAccumulator(str(events.parent))
    found.Reload()
    return [event.value for event in found.Scalars("loss_metrics/global_avg_loss")], ours


def write_qwen3(folder: Path, shards: ShardFolder) -> None:
    """A tiny Qwen3 with random weights for the tokenizer of the rows."""
    torch.manual_seed(0)
    vocabulary, seq_len = shards.manifest.tokenizer["vocab_size"], shards.manifest.seq_len
    config = transformers.Qwen3Config(
        vocab_size=vocabulary, hidden_size=96, intermediate_size=256, num_hidden_layers=3, num_attention_heads=3,
        num_key_value_heads=3, head_dim=32, max_position_embeddings=seq_len, tie_word_embeddings=False, bos_token_id=None,
        eos_token_id=shards.manifest.tokenizer["eos_token_id"], pad_token_id=None,
    )  # fmt: skip
    model: Any = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    shards.copy_tokenizer(folder)


def compare(name: str, theirs: list[float], ours: list[float]) -> Claim:
    """Print the steps side by side; the largest difference."""
    if len(theirs) != STEPS or len(ours) != STEPS:
        sys.exit(f"{name}: {len(theirs)} and {len(ours)} steps, expected {STEPS}")
    print(f"\n{'step':>4}  {name:>12}  {'remit':>12}  {'difference':>10}")
    for step, (their, our) in enumerate(zip(theirs, ours), 1):
        print(f"{step:4}  {their:12.6f}  {our:12.6f}  {abs(their - our):10.1e}")
    worst = 1e6 * max(abs(their - our) / our for their, our in zip(theirs, ours))
    return claim(f"loss of {name} against remit's, largest difference in millionths", [worst], at_most=LARGEST)


def main() -> None:
    settings = tyro.cli(Settings, description=__doc__)
    settings.work.mkdir(parents=True, exist_ok=True)
    claims = [compare("OLMo-core", *in_olmo_core(settings)), compare("torchtitan", *in_torchtitan(settings))]
    sys.exit(report("other_trainers", claims))


if __name__ == "__main__":
    main()
