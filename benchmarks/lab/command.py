"""What the laboratory's own commands share: parse, then run as a command of remit runs, with its exit codes."""

from collections.abc import Callable
from typing import Any

import tyro

from pipelines.cli import execute, fail
from pipelines.terminal import BAD_USAGE, ShouldStop, quiet_libraries


def run_command(
    name: str, settings: type, run: Callable[[Any, ShouldStop], int], description: str | None, graceful: bool = False
) -> None:
    """Entry point of `python -m benchmarks.NAME`. graceful: `run` asks should_stop at safe points."""
    try:
        config: Any = tyro.cli(
            settings, prog=f"python -m benchmarks.{name}", description=description, use_underscores=False
        )
    except ValueError as error:
        fail(name, BAD_USAGE, str(error))
    quiet_libraries()
    execute(name, run, config, graceful)
