"""The laboratory: the paper's comparisons on tiny models, with several seeds.

    python -m benchmarks.lab --size full --seeds 0 1 2 --out lab

Out: OUT/results.parquet with the seeds that are done; OUT/stages, OUT/records and OUT/logs as remit flywheel writes
them. The same command again does what is missing; other seeds are added by naming them. It takes one core; two commands
with an OUT each run side by side.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.lab.command import run_command
from benchmarks.lab.recipe import Size
from pipelines.terminal import DONE, STOPPED, ShouldStop


@dataclass(frozen=True)
class LabConfig:
    """Run the laboratory."""

    out: Path
    """Folder of the laboratory; the same command again goes on."""
    size: Size = "full"
    """Which recipe."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to run, one after the other."""
    dry_run: bool = False
    """Show the stages, done and to do, and run nothing."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds are {list(self.seeds)}, expected different numbers of 0 or more")


def take_one_core(seed: int) -> None:
    """The last digits of a sum depend on the number of threads: one, on whatever machine."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[seed % len(cores)]})  # two seeds side by side are on two cores
    os.environ["OMP_NUM_THREADS"] = "1"


def run(config: LabConfig, should_stop: ShouldStop) -> int:
    from rich.console import Console

    from benchmarks.lab import results
    from benchmarks.lab.graph import Seed
    from pipelines.flywheel.folder import survey
    from pipelines.flywheel.run import run_stages
    from pipelines.flywheel.show import show_plan

    for seed in (Seed(config.size, number) for number in config.seeds):
        if config.dry_run:
            show_plan(survey(seed.stages, config.out), config.out, Console())
            continue
        take_one_core(config.seeds[0])
        outcome = run_stages(seed.stages, config.out, should_stop)
        if not outcome.finished:
            return STOPPED
        records = outcome.records
        versions: dict[str, set[str]] = {}
        for record in records.values():
            for package, version in record["versions"].items():
                versions.setdefault(package, set()).add(version)
        result = results.collect(
            seed,
            {name: outcome.folder.path / record["output"] for name, record in records.items()},
            {name.partition("/")[2]: record["seconds"] for name, record in records.items()},
            {package: sorted(found) for package, found in sorted(versions.items())},
            sorted({record["code"] for record in records.values()}),
        )
        path = results.write(config.out, result)
        print(f"\nseed {seed.seed}\n{results.table(result)}\n-> {path}")
    return DONE


if __name__ == "__main__":
    run_command("lab", LabConfig, run, __doc__, graceful=True)
