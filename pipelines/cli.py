"""The console script `remit`: parse, run, and turn errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 bad usage, 3 stopped by a signal and resumable.
"""

import io
import os
import sys
import traceback
from dataclasses import field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pipelines.own_packages import what_is_in_the_way

if obstacle := what_is_in_the_way():  # before an import of what is in the way fails, with a traceback
    sys.exit(f"remit: error: {obstacle}")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import tyro
import yaml

from pipelines import commands, completion, tools
from pipelines.console import BAD_USAGE, FAILED, STOPPED, BadUsage
from pipelines.evaluation.settings import EvalConfig
from pipelines.flywheel.config import FlywheelOptions
from pipelines.plan.settings import PlanConfig
from pipelines.settings import CompletionConfig, InspectConfig, ReportConfig, SelectConfig, VerifyConfig
from pipelines.signals import Stopped, StopRequest
from scorer.config import PackConfig, ScoreConfig
from trainer.config import TrainConfig

COMMANDS: dict[str, tuple[type, Any]] = {
    "pack": (PackConfig, commands.pack),
    "score": (ScoreConfig, commands.score),
    "select": (SelectConfig, commands.select),
    "train": (TrainConfig, commands.train),
    "verify": (VerifyConfig, tools.verify),
    "inspect": (InspectConfig, tools.inspect),
    "plan": (PlanConfig, tools.plan),
    "report": (ReportConfig, tools.report),
    "eval": (EvalConfig, tools.evaluate),
    "flywheel": (FlywheelOptions, commands.flywheel),
    "completion": (CompletionConfig, completion.print_script),
}
DESCRIPTION = (
    "ReMiT mid-training without the reference in the training step: pack a corpus, score it once with the reference, "
    "train from the annotated shards. Options may also come from a YAML file, --config run.yaml; options on the "
    "command line win. remit COMMAND --help explains the options of a command."
)


def expand_config_file(arguments: list[str]) -> list[str]:
    """Replace `--config FILE` by the options in that YAML file, in front of the others so that those win.

    Raises ValueError for a file that is missing or no mapping of options to values.
    """
    if arguments[:1] == ["flywheel"]:  # its file describes a loop and is no list of options
        return arguments
    rest: list[str] = []
    options: list[str] = []
    iterator = iter(arguments)
    for argument in iterator:
        name, equals, value = argument.partition("=")
        if name != "--config":
            rest.append(argument)
            continue
        path = Path(value if equals else next(iterator, ""))
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise ValueError(f"--config {path}: cannot be read ({' '.join(str(error).split())})") from None
        if not isinstance(values, dict):
            raise ValueError(f"--config {path}: expected a mapping of options to values, for instance seq_len: 4096")
        for key, entry in values.items():
            option = "--" + str(key).replace("_", "-")
            if isinstance(entry, bool):
                options.append(option if entry else option.replace("--", "--no-", 1))
            elif entry is not None:
                options += [option, *map(str, entry if isinstance(entry, list) else [entry])]
    return rest[:1] + options + rest[1:]


def with_config_file(settings: type) -> type:
    """`settings` with --config, which expand_config_file replaces before options are parsed; for --help and completion."""
    text = "YAML file with options, for instance seq_len: 4096; those on the command line win."
    entry = Annotated[Path | None, tyro.conf.arg(help=text)]
    changed = make_dataclass(
        settings.__name__, [("config", entry, field(default=None))], bases=(settings,), frozen=True
    )
    changed.__doc__ = settings.__doc__
    return changed


def parse(arguments: list[str]) -> Any:
    """The settings dataclass of the command that `arguments` name; SystemExit(2) for bad usage."""
    described = {"-h", "--help", "--tyro-print-completion"} & set(arguments)
    union: Any = None
    for name, (settings, _) in COMMANDS.items():
        summary = (settings.__doc__ or "").splitlines()[0]
        if described and settings not in (CompletionConfig, FlywheelOptions):  # that one has a --config of its own
            settings = with_config_file(settings)
        entry = Annotated[settings, tyro.conf.subcommand(name, description=summary)]  # type: ignore[valid-type]
        union = entry if union is None else union | entry
    return tyro.cli(union, prog="remit", description=DESCRIPTION, args=arguments, use_underscores=False)


def fail(command: str, code: int, message: str) -> NoReturn:
    """Print one line and leave."""
    rank = f"rank {os.environ['RANK']}: " if "RANK" in os.environ else ""
    print(f"remit {command}: error: {rank}{' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(code)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of the console script."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be no Unicode
    command = arguments[0] if arguments else ""
    try:
        config = parse(expand_config_file(arguments))
    except BrokenPipeError:  # --help | head: what Python has not written yet goes nowhere as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except ValueError as error:
        fail(command, BAD_USAGE, str(error))

    # these end what they are at: a step and a checkpoint, the parts in work, what the stages are at
    stop = StopRequest(graceful=command in ("pack", "score", "select", "train", "flywheel"))
    stop.install()
    try:
        run = next(run for settings, run in COMMANDS.values() if settings is type(config))
        code = run(config, stop.requested)
    except Stopped:
        code = STOPPED
    except BadUsage as error:
        fail(command, BAD_USAGE, str(error))
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        if isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError) and str(error):
            fail(command, FAILED, str(error))
        fail(command, FAILED, f"internal error, {type(error).__name__}: {error}; --debug shows where")
    if code == STOPPED:
        print(
            f"\nremit {command}: stopped{f' by {stop.name}' if stop.name else ''}; the same command again goes on",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(code)


if __name__ == "__main__":
    main()
