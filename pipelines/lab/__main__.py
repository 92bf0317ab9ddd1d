"""The laboratory: the paper's comparisons on tiny models, with several seeds.

    python -P -m pipelines.lab --size full --seeds 0 1 2 --out lab

Out: OUT/results.parquet with each seed that is done; OUT/stages, OUT/records and OUT/logs as remit flywheel writes
them. The same command again does what is missing; other seeds are added by naming them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.terminal import DONE, STOPPED, progress_bar
from pipelines.lab.recipe import RECIPES, Size
from pipelines.terminal import StopRequest


@dataclass(frozen=True)
class LabConfig:
    """Run the laboratory."""

    out: Path
    """Folder of the laboratory; the same command again goes on."""
    size: Size = "full"
    """Which recipe."""
    seeds: tuple[int, ...] = (0,)
    """Seeds to run."""
    jobs: int = 2
    """Stages at once, a core each."""
    dry_run: bool = False
    """Show the stages, done and to do, and run nothing."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise ValueError(f"--jobs is {self.jobs}, expected at least 1")
        if not self.seeds or min(self.seeds) < 0 or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"--seeds are {list(self.seeds)}, expected different numbers of 0 or more")


def run(config: LabConfig, stop: StopRequest) -> int:
    from rich.console import Console

    from pipelines.flywheel.runner import run_stages
    from pipelines.flywheel.show import Progress, show_plan
    from pipelines.flywheel.stage import Stage
    from pipelines.flywheel.survey import survey
    from pipelines.lab.graph import Seed

    assert config.size in RECIPES
    seeds = [Seed(config.size, number) for number in config.seeds]
    stages: list[Stage] = [stage for seed in seeds for stage in seed.stages]
    if config.dry_run:
        show_plan(survey(stages, config.out), config.out, Console())
        return DONE
    with progress_bar(desc="lab", unit=" stages", total=len(stages)) as bar:
        watch = with_results(seeds, config.out, Progress(bar, stages))
        outcome = run_stages(stages, config.out, config.jobs, stop.requested, watch)
    return DONE if outcome.finished else STOPPED


def with_results(seeds: list[Any], folder: Path, watch: Callable[[str, Any, Any], None]) -> Callable:
    """A watch that also writes and prints the results of a seed when its last stage is done."""
    from tqdm import tqdm

    from benchmarks.lab import results

    waiting = {seed.seed: {stage.name for stage in seed.stages} for seed in seeds}
    records: dict[str, Any] = {}

    def watching(what: str, stage: Any, facts: Any) -> None:
        watch(what, stage, facts)
        if what not in ("finished", "done before"):
            return
        records[stage.name] = facts
        for seed in seeds:
            if stage.name in waiting[seed.seed]:
                waiting[seed.seed].discard(stage.name)
                if not waiting[seed.seed]:
                    of_seed = {stage.name: records[stage.name] for stage in seed.stages}
                    outputs = {name: folder / record["output"] for name, record in of_seed.items()}
                    seconds = {name.partition("/")[2]: record["seconds"] for name, record in of_seed.items()}
                    versions: dict[str, set[str]] = {}
                    for record in of_seed.values():
                        for package, version in record["versions"].items():
                            versions.setdefault(package, set()).add(version)
                    code = sorted({record.get("code", "not known") for record in of_seed.values()})
                    known = {package: sorted(versions[package]) for package in sorted(versions)}
                    result = results.collect(seed, outputs, seconds, known, code)
                    path = results.write(folder, result)
                    tqdm.write(f"\nseed {seed.seed}\n{results.table(result)}\n-> {path}")

    return watching


def main() -> None:
    from pipelines.lab.command import run_command

    run_command("lab", LabConfig, run, __doc__, graceful=True)


if __name__ == "__main__":
    main()
