"""remit eval: tasks of lm-evaluation-harness."""

import sys

from rich.console import Console

from pipelines.evaluation.settings import EvalConfig
from pipelines.terminal import DONE, ShouldStop, note


def run(config: EvalConfig, should_stop: ShouldStop) -> int:
    from pipelines.evaluation.run import evaluate
    from pipelines.evaluation.tables import show

    values = evaluate(config, note)
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a log has no width; numbers are not cut
    show(values, console)
    for results in values["results"].values():
        print(f"results of {results['model']['name']} -> {results['folder']}/results.json")
    return DONE
