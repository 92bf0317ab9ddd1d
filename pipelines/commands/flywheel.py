"""remit flywheel: mid-train, post-train, score with the result, mid-train again."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from pipelines.terminal import DONE, STOPPED, ShouldStop


@dataclass(frozen=True)
class FlywheelOptions:
    """Run the loop of a YAML file: mid-train, post-train, score with the result, mid-train the base again with ReMiT.

    Stages whose result is there already, made of the same, are left alone; so the same command goes on after a kill, and
    after a change of the file it repeats what depends on the change.
    """

    config: Path
    """YAML file with the loop: base, corpus, posttrain and so on; the documentation has an example and all keys."""
    out: Path | None = None
    """Folder for all stages; default: the file's `out`."""
    dry_run: bool = False
    """Only show which stages are done and which would run, with their commands; nothing is written."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""


def run(options: FlywheelOptions, should_stop: ShouldStop) -> int:
    from pipelines.flywheel.config import read_config
    from pipelines.flywheel.folder import survey
    from pipelines.flywheel.loop import make_loop
    from pipelines.flywheel.run import run_stages
    from pipelines.flywheel.show import show_models, show_plan

    config = read_config(options.config, options.out)
    loop = make_loop(config)
    console = Console(file=sys.stdout, highlight=False)
    if options.dry_run:
        show_plan(survey(loop.stages, config.out), config.out, console)
        return DONE
    outcome = run_stages(loop.stages, config.out, should_stop)
    if not outcome.finished:
        return STOPPED
    show_models(loop, outcome, console)
    return DONE
