"""remit eval: tasks of lm-evaluation-harness."""

import sys

from rich.console import Console

from pipelines.evaluation.settings import EvalConfig
from pipelines.terminal import DONE, ShouldStop, note


def run(config: EvalConfig, should_stop: ShouldStop) -> int:
    from pipelines.evaluation.compare import compare
    from pipelines.evaluation.results import read_results, write_json
    from pipelines.evaluation.run import evaluate
    from pipelines.evaluation.tables import show, titles

    others = {file: read_results(file) for file in config.compare}  # what is wrong with one shows at once
    folder, results = evaluate(config, note)
    comparisons = [compare(str(file), values, results) for file, values in others.items()]
    if comparisons:
        write_json(config.out / "compare.json", comparisons)
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a log has no width; numbers are not cut
    names = titles(config.model, folder, list(others))
    show(dict(zip(names, [results, *others.values()])), comparisons, console)
    print(f"results of {config.model} -> {folder}/results.json")
    return DONE
