"""The console script `remit`: parse, run, and turn errors into one line and an exit code.

Exit codes: 0 done, 1 failed, 2 bad usage, 3 stopped by a signal and resumable.
"""

import io
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import field, make_dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, NoReturn

from pipelines.own_packages import what_is_in_the_way

if obstacle := what_is_in_the_way():  # before an import of what is in the way fails, with a traceback
    sys.exit(f"remit: error: {obstacle}")
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

import tyro
import yaml

from pipelines.recipes import config_file
from pipelines.terminal import BAD_USAGE, FAILED, STOPPED, BadUsage, ShouldStop, SignalReceived, StopRequest, note
from shards.asking import tell_of_silence

# the settings of each command and what runs it; imported when it is asked for, so that a command loads nothing of the others
COMMANDS = {
    "pack": ("scorer.config:PackConfig", "pipelines.commands.pack:run"),
    "score": ("scorer.config:ScoreConfig", "pipelines.commands.score:run"),
    "select": ("scorer.config:SelectConfig", "pipelines.commands.select:run"),
    "train": ("trainer.config:TrainConfig", "pipelines.commands.train:run"),
    "average": ("pipelines.commands.average:AverageConfig", "pipelines.commands.average:run"),
    "verify": ("pipelines.commands.verify:VerifyConfig", "pipelines.commands.verify:run"),
    "upgrade": ("pipelines.commands.upgrade:UpgradeConfig", "pipelines.commands.upgrade:run"),
    "export": ("pipelines.export.settings:ExportConfig", "pipelines.commands.export:run"),
    "inspect": ("pipelines.inspect.settings:InspectConfig", "pipelines.commands.inspect:run"),
    "distribution": ("pipelines.distribution.settings:DistributionConfig", "pipelines.commands.distribution:run"),
    "weights": ("pipelines.weights.settings:WeightsConfig", "pipelines.commands.weights:run"),
    "plan": ("pipelines.plan.settings:PlanConfig", "pipelines.commands.plan:run"),
    "push": ("pipelines.push.settings:PushConfig", "pipelines.commands.push:run"),
    "compare": ("pipelines.report.compare:CompareConfig", "pipelines.commands.compare:run"),
    "report": ("pipelines.report.settings:ReportConfig", "pipelines.commands.report:run"),
    "eval": ("pipelines.evaluation.settings:EvalConfig", "pipelines.commands.eval:run"),
    "sft": ("pipelines.posttrain.settings:SftConfig", "pipelines.commands.posttrain:sft"),
    "dpo": ("pipelines.posttrain.settings:DpoConfig", "pipelines.commands.posttrain:dpo"),
    "rl": ("pipelines.posttrain.settings:RlConfig", "pipelines.commands.posttrain:rl"),
    "rmt": ("pipelines.rmt.settings:RmtConfig", "pipelines.commands.rmt:run"),
    "flywheel": ("pipelines.commands.flywheel:FlywheelOptions", "pipelines.commands.flywheel:run"),
    "completion": ("pipelines.commands.completion:CompletionConfig", "pipelines.commands.completion:run"),
}
GOES_ON = "the same command again goes on"
OWN_CONFIG = ("flywheel", "completion")  # the file of the first describes a loop, the second has no file
# these end what they are at when a signal comes: a step and a checkpoint, the parts in work, the stage that runs
GRACEFUL = ("pack", "score", "select", "train", "upgrade", "export", "push", "sft", "dpo", "rl", "rmt", "flywheel")
MOVED = {  # options of remit plan that went elsewhere
    "--weights": "--weights is a command of its own now: remit weights --shards DIR",
    "--measure": "--measure is gone; run remit train --max-steps 20, score one part, and give --train-rate and --score-rate",
}
DESCRIPTION = (
    "ReMiT mid-training without the reference in the training step: pack a corpus, score it once with the reference, "
    "train from the annotated shards. Options may also come from a YAML file, --config run.yaml; options on the "
    "command line win. remit COMMAND --help explains the options of a command, remit --version says which remit this is."
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
        path = config_file(value if equals else next(iterator, ""))
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
    text = "YAML file with options, for instance seq_len: 4096, or of train the name of a published recipe, olmo2-1b; options on the command line win."
    entry = Annotated[Path | None, tyro.conf.arg(help=text)]
    changed = make_dataclass(
        settings.__name__, [("config", entry, field(default=None))], bases=(settings,), frozen=True
    )
    changed.__doc__ = settings.__doc__
    return changed


def find(name: str) -> Any:
    """What `module:name` of COMMANDS names."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(module), attribute)


def parse(arguments: list[str]) -> Any:
    """The settings dataclass of the command that `arguments` name; SystemExit(2) for bad usage."""
    name = arguments[0] if arguments else ""
    if name in COMMANDS:  # the others are not even imported, and errors point to the command's own --help
        settings = find(COMMANDS[name][0])
        if {"-h", "--help"} & set(arguments) and name not in OWN_CONFIG:
            settings = with_config_file(settings)
        return tyro.cli(settings, prog=f"remit {name}", args=arguments[1:], use_underscores=False)
    if name in ("--version", "-V"):
        print(f"remit {version('remit')}")
        sys.exit(0)
    if name and not name.startswith("-"):
        near = get_close_matches(name, COMMANDS, 1)
        hint = f"; did you mean remit {near[0]}?" if near else f", expected one of {', '.join(COMMANDS)}"
        raise ValueError(f"{name!r} is no command{hint}")
    union: Any = None
    for name, (where, _) in COMMANDS.items():
        settings = find(where)
        summary = (settings.__doc__ or "").splitlines()[0]
        if name not in OWN_CONFIG:
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
        for option in set(arguments) & set(MOVED) if command == "plan" else ():
            raise ValueError(MOVED[option])
        config = parse(expand_config_file(arguments))
    except BrokenPipeError:  # --help | head: what Python has not written yet goes nowhere as it ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(FAILED)
    except ValueError as error:
        fail(command, BAD_USAGE, str(error))

    execute(command, find(COMMANDS[command][1]), config, command in GRACEFUL)


def execute(command: str, run: Callable[[Any, ShouldStop], int], config: Any, graceful: bool) -> NoReturn:
    """Run a command with its settings and leave with its exit code; errors become one line, signals are heeded.

    graceful: on a first signal `run` ends what it is at, which it asks should_stop for.
    """
    stop = StopRequest(
        graceful, getattr(config, "grace_seconds", None), f"remit {command}: stopped by {{name}}; {GOES_ON}"
    )
    stop.install()
    tell_of_silence(note)
    try:
        code = run(config, stop.requested)
    except SignalReceived:
        code = STOPPED
    except BadUsage as error:
        fail(command, BAD_USAGE, str(error))
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        if isinstance(error, ValueError | OSError | RuntimeError | FloatingPointError) and str(error):
            fail(command, FAILED, str(error))
        fail(command, FAILED, f"internal error, {type(error).__name__}: {error}; --debug shows where")
    finally:
        stop.close()
    if code == STOPPED:
        print(
            f"\nremit {command}: stopped{f' by {stop.name}' if stop.name else ''}; {GOES_ON}",
            file=sys.stderr,
            flush=True,
        )
    sys.exit(code)


if __name__ == "__main__":
    main()
