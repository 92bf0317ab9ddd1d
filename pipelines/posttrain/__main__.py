"""python -P -m pipelines.posttrain sft|dpo|rl --model DIR --data FILE.jsonl --out DIR

Exit codes: 0 done, 1 failed, 2 bad usage, 3 stopped by a signal and resumable by the same command.
"""

import sys
import traceback
from typing import Annotated, Any

import tyro

from pipelines.cli import expand_config_file, fail
from pipelines.console import BAD_USAGE, FAILED, STOPPED
from pipelines.posttrain.settings import DpoConfig, RlConfig, SftConfig
from pipelines.signals import SignalReceived, StopRequest

DESCRIPTION = (
    "Post-train a model with TRL (in your checkout of remit: pip install '.[flywheel]'). Writes OUT/model, a Hugging Face folder, and "
    "OUT/metrics.jsonl. Options may also come from a YAML file, --config FILE."
)
STAGES: dict[str, type] = {"sft": SftConfig, "dpo": DpoConfig, "rl": RlConfig}


def parse(arguments: list[str]) -> Any:
    """The settings of the stage that `arguments` name; SystemExit(2) for bad usage."""
    union: Any = None
    for name, settings in STAGES.items():
        summary = (settings.__doc__ or "").splitlines()[0]
        entry = Annotated[settings, tyro.conf.subcommand(name, description=summary)]  # type: ignore[valid-type]
        union = entry if union is None else union | entry
    prog = "python -P -m pipelines.posttrain"
    return tyro.cli(union, prog=prog, description=DESCRIPTION, args=arguments, use_underscores=False)


def run(config: Any, should_stop: Any) -> int:
    if isinstance(config, SftConfig):
        from pipelines.posttrain.sft import sft

        return sft(config, should_stop)
    if isinstance(config, DpoConfig):
        from pipelines.posttrain.dpo import dpo

        return dpo(config, should_stop)
    from pipelines.posttrain.rl import rl

    return rl(config, should_stop)


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    command = f"posttrain {arguments[0]}" if arguments else "posttrain"
    try:
        config = parse(expand_config_file(arguments))
    except ValueError as error:
        fail(command, BAD_USAGE, str(error))
    stop = StopRequest(graceful=True)
    stop.install()
    try:
        code = run(config, stop.requested)
    except SignalReceived:
        code = STOPPED
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        if isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError) and str(error):
            fail(command, FAILED, str(error))
        fail(command, FAILED, f"internal error, {type(error).__name__}: {error}; --debug shows where")
    if code == STOPPED:
        print(f"\nremit {command}: stopped by {stop.name}; the same command again goes on", file=sys.stderr, flush=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
