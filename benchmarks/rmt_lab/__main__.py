"""Reinforcement mid-training against NTP and ReMiT, at equal steps and at equal compute, with several seeds.

    python -m benchmarks.rmt_lab --size small --seeds 1 2 3 --out lab-rmt

Out: OUT/results.parquet with the seeds that are done, OUT/report.md; OUT/stages, OUT/records and OUT/logs as remit flywheel
writes them. The same command again does what is missing; other seeds are added by naming them. It takes one core; two commands
with an OUT each run side by side.
"""

from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.lab.command import run_command
from benchmarks.rmt_lab.recipe import RmtSize
from pipelines.terminal import DONE, STOPPED, ShouldStop


@dataclass(frozen=True)
class RmtLabConfig:
    """Compare reinforcement mid-training with plain training at equal compute."""

    out: Path
    """Folder of the comparison; the same command again goes on."""
    size: RmtSize = "small"
    """Which recipe."""
    seeds: tuple[int, ...] = (1,)
    """Seeds to run, one after the other."""
    dry_run: bool = False
    """Show the stages, done and to do, and run nothing. Those at equal compute follow when rmt is done."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds are {list(self.seeds)}, expected different numbers of 0 or more")


def run(config: RmtLabConfig, should_stop: ShouldStop) -> int:
    from rich.console import Console

    from benchmarks.lab import results as of_lab
    from benchmarks.lab.__main__ import take_one_core
    from benchmarks.rmt_lab import report, results
    from benchmarks.rmt_lab.graph import RmtSeed
    from pipelines.flywheel.folder import survey
    from pipelines.flywheel.run import run_stages
    from pipelines.flywheel.show import show_plan

    for number in config.seeds:
        seed = RmtSeed(config.size, number)
        if config.dry_run:
            show_plan(survey(seed.stages, config.out), config.out, Console())
            continue
        take_one_core(config.seeds[0])
        outcome = run_stages(seed.stages, config.out, should_stop)
        if not outcome.finished:
            return STOPPED
        rmt = outcome.folder.path / outcome.records[seed.models["rmt", "mid"].name]["output"]
        scored = results.scoring(outcome.result(seed.columns["rl"].name))
        seed = RmtSeed(config.size, number, results.compute_of_rmt(seed, rmt) + scored, scored)
        outcome = run_stages(seed.stages, config.out, should_stop)
        if not outcome.finished:
            return STOPPED
        result = results.collect(seed, outcome)
        path = of_lab.write(config.out, result)
        print(f"\nseed {number} -> {path}")
        print(f"-> {report.write([config.out])}")
    return DONE


if __name__ == "__main__":
    run_command("rmt_lab", RmtLabConfig, run, __doc__, graceful=True)
