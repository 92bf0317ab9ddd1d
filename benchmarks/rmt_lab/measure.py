"""Measure a model: next-token accuracy by tier of held-out positions, accuracy on held-out problems, losses.

    python -m benchmarks.rmt_lab.measure --model DIR --data DIR --shards DIR --out DIR

Data: as of benchmarks.lab.measure. Shards: held-out problems scored with the reference's entropy; the positions are those
at which remit rmt evaluates, so that a prediction without a thought and one with it are compared on the same ones.
Out: measurements.json, a flat mapping of metric to value.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.lab import measure as of_lab
from benchmarks.lab.command import run_command
from benchmarks.lab.results import RESULT
from pipelines.rmt.evaluation import draw_held_out
from pipelines.rmt.settings import TIERS, RmtConfig
from shards.folder import ShardFolder

BATCH = 64


@dataclass(frozen=True)
class MeasureConfig:
    """Measure a model on held-out problems."""

    model: Path
    """Model folder."""
    data: Path
    """Folder of the held-out data."""
    shards: Path
    """Shard folder of the held-out problems, with the entropy of the reference."""
    out: Path
    """Folder to write measurements.json into."""
    positions: int = 200
    """Of each tier."""
    reference: str = "rl"
    """Whose entropy says how difficult a position is."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""


def greedy_next(model: Any, prefixes: Sequence[Sequence[int]]) -> list[int]:
    """The most probable token after each prefix. Shorter prefixes are padded behind their end, which changes nothing before."""
    import torch

    found = []
    for start in range(0, len(prefixes), BATCH):
        batch = prefixes[start : start + BATCH]
        input_ids_BT = torch.zeros((len(batch), max(map(len, batch))), dtype=torch.long)
        for row, ids in enumerate(batch):
            input_ids_BT[row, : len(ids)] = torch.tensor(ids)
        with torch.no_grad():
            logits_BTV = model(input_ids_BT).logits
        found += [int(logits_BTV[row, len(ids) - 1].argmax()) for row, ids in enumerate(batch)]
    return found


def bare_accuracy(model: Any, config: MeasureConfig) -> dict[str, float]:
    """Share of the positions of each tier whose next token is right without a thought, as bare_TIER, and their mean."""
    thresholds: tuple[float, ...] = RmtConfig.thresholds
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    positions = draw_held_out(
        ShardFolder(str(config.shards)), config.reference, thresholds, config.positions, num_embeddings
    )
    guesses = greedy_next(model, [position.prefix_ids for position in positions])
    hits: dict[str, list[bool]] = {}
    for position, guess in zip(positions, guesses, strict=True):
        hits.setdefault(TIERS[position.tier], []).append(guess == position.target)
    return with_mean("bare", {tier: sum(found) / len(found) for tier, found in hits.items()})


def with_mean(name: str, shares: dict[str, float]) -> dict[str, float]:
    """NAME_TIER of each tier, and NAME_all, in which each tier counts the same."""
    return {f"{name}_{tier}": share for tier, share in shares.items()} | {
        f"{name}_all": sum(shares.values()) / len(shares)
    }


def run(config: MeasureConfig) -> int:
    import transformers

    as_lab = of_lab.MeasureConfig(config.data, config.out, config.model, sampled=0)
    result = of_lab.measure(as_lab, config.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype="float32").eval()
    result |= bare_accuracy(model, config)
    print(", ".join(f"{name} {value:.4f}" for name, value in result.items()))
    config.out.mkdir(parents=True, exist_ok=True)
    (config.out / RESULT).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    run_command("rmt_lab.measure", MeasureConfig, lambda config, stop: run(config), __doc__)
