"""The process that evaluates one model: remit eval, with its results as a line of OUT/tasks.jsonl in a file.

    python -m pipelines.beside.child LINE OPTIONS of remit eval       writes the line to the file LINE
    python -m pipelines.beside.child --check OPTIONS of remit eval    asks nothing, refuses what remit eval would refuse

Its standard input is a pipe that the training holds open: when the training ends, whatever ends it, this process does.
Errors are one line, exit codes are those of remit eval.
"""

import contextlib
import os
import sys
import threading
from functools import partial
from pathlib import Path
from typing import Any

from pipelines.cli import execute, parse
from pipelines.terminal import DONE, STOPPED, ShouldStop, note


def end_with_parent() -> None:
    """Wait for the end of standard input and leave. Answers are kept one by one: nothing is half there."""
    with contextlib.suppress(OSError):
        while os.read(0, 1024):
            pass
    os._exit(STOPPED)


def evaluate_into(line: Path, config: Any, should_stop: ShouldStop) -> int:
    from pipelines.beside.scores import line_of
    from pipelines.evaluation.results import write_json
    from pipelines.evaluation.run import evaluate

    folder, values = evaluate(config, note)
    write_json(line, line_of(values, folder))
    return DONE


def check(config: Any, should_stop: ShouldStop) -> int:
    from pipelines.evaluation.run import require_ready

    require_ready(config)
    return DONE


def main() -> None:
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.nice(10)  # the training goes first where both want the CPU
    what, *options = sys.argv[1:]
    config = parse(["eval", *options])
    execute("eval", check if what == "--check" else partial(evaluate_into, Path(what)), config, graceful=False)


if __name__ == "__main__":
    main()
