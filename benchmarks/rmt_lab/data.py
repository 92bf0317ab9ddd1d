"""Make the data of one seed, its tokenizer and its untrained model, as benchmarks.lab.data does, at a size of this comparison.

python -m benchmarks.rmt_lab.data --size small --seed 0 --out DIR
"""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.lab import data
from benchmarks.lab.command import run_command
from benchmarks.rmt_lab.recipe import RECIPES, RmtSize


@dataclass(frozen=True)
class DataConfig:
    """Make the data of one seed."""

    out: Path
    """Folder to write; it may be there, and empty."""
    size: RmtSize = "small"
    """Which recipe."""
    seed: int = 0
    """Decides everything."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks and what the workers print."""


def run(config: DataConfig) -> int:
    return data.build(config.out, RECIPES[config.size], config.seed, config.debug)


if __name__ == "__main__":
    run_command("rmt_lab.data", DataConfig, lambda config, stop: run(config), __doc__)
