"""remit completion: the script that a shell sources, as tyro writes it from the options of all commands."""

import io
import re
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Literal

import tyro

from pipelines.terminal import DONE, ShouldStop

# bash takes one empty answer for the completion; without any, it completes file names
BASH_FILES = """
_remit_or_files() {
  _tyro_remit "$@"
  [[ ${#COMPREPLY[@]} -eq 1 && -z ${COMPREPLY[0]} ]] && COMPREPLY=()
}
complete -o default -F _remit_or_files remit
"""


@dataclass(frozen=True)
class CompletionConfig:
    """Print a script with which your shell completes commands, options and values of remit."""

    shell: tyro.conf.Positional[Literal["bash", "zsh", "tcsh"]]
    """Your shell. bash: add eval "$(remit completion bash)" to ~/.bashrc; zsh: write it to a file _remit in a folder
    of $fpath; tcsh: write it to a file that ~/.tcshrc sources."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""


def script(shell: str) -> str:
    """The script for bash, zsh or tcsh; ValueError where tcsh's needs a package that is missing."""
    from pipelines.cli import parse  # which imports this file

    if shell == "tcsh" and find_spec("shtab") is None:
        raise ValueError("tcsh needs shtab; pip install shtab")
    with redirect_stdout(io.StringIO()) as printed, suppress(SystemExit):
        parse(["--tyro-print-completion", shell])
    # the script prints a candidate and its help in one line: of a help text with line breaks the rest became candidates
    lines = [
        re.sub(r"(\\n|\s)+", " ", line) if line.startswith("COMPLETION_SPEC = ") else line
        for line in printed.getvalue().splitlines()
    ]
    return "\n".join(lines) + "\n" + (BASH_FILES if shell == "bash" else "")


def run(config: CompletionConfig, should_stop: ShouldStop) -> int:
    print(script(config.shell), end="")
    return DONE
