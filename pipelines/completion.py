"""remit completion: the script that a shell sources, as tyro writes it from the options of all commands."""

import io
import re
from contextlib import redirect_stdout, suppress
from importlib.util import find_spec

from pipelines.console import DONE, ShouldStop
from pipelines.settings import CompletionConfig

# bash takes one empty answer for the completion; without any, it completes file names
BASH_FILES = """
_remit_or_files() {
  _tyro_remit "$@"
  [[ ${#COMPREPLY[@]} -eq 1 && -z ${COMPREPLY[0]} ]] && COMPREPLY=()
}
complete -o default -F _remit_or_files remit
"""


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


def print_script(config: CompletionConfig, should_stop: ShouldStop) -> int:
    print(script(config.shell), end="")
    return DONE
