"""remit flywheel: mid-train, post-train, score with the result, mid-train again."""

import sys

from rich.console import Console

from pipelines.flywheel.config import FlywheelOptions, read_config
from pipelines.terminal import DONE, STOPPED, ShouldStop, note, progress_bar


def run(config: FlywheelOptions, should_stop: ShouldStop) -> int:
    from pipelines.flywheel.folder import survey
    from pipelines.flywheel.loop import make_loop
    from pipelines.flywheel.run import StageFailed, run_stages
    from pipelines.flywheel.show import Progress, show_models, show_plan

    file = read_config(config.config, config.out)
    loop = make_loop(file)
    console = Console(file=sys.stdout, highlight=False)
    if config.dry_run:
        show_plan(survey(loop.stages, file.out), file.out, console)
        return DONE
    with progress_bar(desc="flywheel", unit=" stages", total=len(loop.stages)) as bar:
        try:
            outcome = run_stages(loop.stages, file.out, should_stop, Progress(bar, loop.stages))
        except StageFailed as error:
            bar.close()
            for line in error.log:
                note(f"  | {line}")
            raise
    if not outcome.finished:
        return STOPPED
    show_models(loop, outcome, console)
    return DONE
