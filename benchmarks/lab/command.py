"""What the laboratory's own commands share: parse, run, one-line errors, exit codes as those of remit."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

import tyro

from pipelines.cli import fail
from pipelines.terminal import BAD_USAGE, FAILED, STOPPED, SignalReceived, StopRequest, quiet_libraries


def run_command(
    name: str, settings: type, run: Callable[[Any, StopRequest], int], description: str | None, graceful: bool = False
) -> None:
    """Entry point of `python -m benchmarks.NAME`. graceful: `run` asks the StopRequest at safe points."""
    try:
        config: Any = tyro.cli(
            settings, prog=f"python -m benchmarks.{name}", description=description, use_underscores=False
        )
    except ValueError as error:
        fail(name, BAD_USAGE, str(error))
    stop = StopRequest(graceful=graceful)
    stop.install()
    try:
        quiet_libraries()
        code = run(config, stop)
    except SignalReceived:
        code = STOPPED
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        if isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError) and str(error):
            fail(name, FAILED, str(error))
        fail(name, FAILED, f"internal error, {type(error).__name__}: {error}; --debug shows where")
    if code == STOPPED:
        print(f"\nremit {name}: stopped by {stop.name}; the same command again goes on", file=sys.stderr, flush=True)
    sys.exit(code)
