"""remit completion: bash, zsh and tcsh are started on a terminal, read the script, and complete what is typed."""

import ast
import fcntl
import os
import pty
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

from pipelines.commands.completion import script

pytestmark = pytest.mark.usefixtures("starts_processes")

Remit = Callable[..., tuple[int, str, str]]
SETUP = {
    "bash": (["bash", "--norc", "--noprofile", "-i"], "source ./_remit"),
    "zsh": (["zsh", "-f", "-i"], "fpath=($PWD $fpath); autoload -Uz compinit; compinit -u -d $PWD/dump"),
    "tcsh": (["tcsh", "-f"], "source ./_remit"),
}


def typed(shell: str, folder: Path, text: str, expected: str) -> str:
    """What the terminal shows once `text` and a tab were typed, up to `expected` or for a minute."""
    command, setup = SETUP[shell]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(folder)
        os.environ.update(TERM="vt100" if shell == "tcsh" else "dumb", PS1="> ")  # tcsh edits nothing on a dumb one
        os.execvp(command[0], command)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 200, 0, 0))

    def read_until(wanted: str, seconds: float) -> str:
        shown, deadline = "", time.monotonic() + seconds
        while wanted not in shown and time.monotonic() < deadline:
            if select.select([terminal], [], [], 0.2)[0]:
                shown += os.read(terminal, 4096).decode(errors="replace")
        return shown

    try:
        os.write(terminal, f"{setup}; echo re''ady\n".encode())
        assert "ready" in read_until("ready", 60)
        os.write(terminal, f"{text}\t".encode())
        shown = read_until(expected, 60)
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(terminal)
    return shown


@pytest.fixture(params=SETUP)
def shell(request: pytest.FixtureRequest, tmp_path: Path, remit: Remit) -> str:
    """A shell, with its script as _remit in tmp_path."""
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    if request.param == "tcsh" and find_spec("shtab") is None:
        pytest.skip("shtab is not installed")
    code, output, error = remit("completion", request.param)
    assert (code, error) == (0, "")
    (tmp_path / "_remit").write_text(output)
    return request.param


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("remit sc", "remit score"),
        ("remit score --num", "--num-engines"),
        ("remit score --config run.yaml --num", "run.yaml --num-engines"),
        ("remit score --conf", "--config"),
        ("remit train --wandb-pr", "--wandb-project"),
    ],
)
def test_a_tab_completes(shell: str, tmp_path: Path, text: str, expected: str) -> None:
    if shell == "tcsh":  # whose script offers the options of all commands
        text = text.replace("--num", "--num-e")
    assert expected in typed(shell, tmp_path, text, expected)


@pytest.mark.parametrize("text", ["remit pack --corpus a-f", "remit train --model a-f", "remit train --config a-f"])
def test_file_names(tmp_path: Path, remit: Remit, text: str) -> None:
    (tmp_path / "a-file.jsonl").write_text("")
    (tmp_path / "_remit").write_text(remit("completion", "bash")[1])
    assert "a-file.jsonl" in typed("bash", tmp_path, text, "a-file.jsonl")


def test_a_shell_without_completion_is_bad_usage(remit: Remit) -> None:
    code, _, error = remit("completion", "fish")
    assert (code, "'bash'" in error) == (2, True)


def test_without_shtab(tmp_path: Path) -> None:
    """An installation from before tyro needed it."""
    code = "import sys; sys.modules['shtab'] = None; from pipelines.cli import main; main(['completion', 'tcsh'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "remit completion: error: tcsh needs shtab; pip install shtab"


def test_candidates_are_no_help_texts() -> None:
    """No line break within a help text: each line that the script prints is taken for a candidate."""
    (line,) = [line for line in script("bash").splitlines() if line.startswith("COMPLETION_SPEC = ")]
    spec = ast.literal_eval(line.removeprefix("COMPLETION_SPEC = "))
    helps = [option["description"] for option in spec["subcommands"]["plan"]["options"]]
    assert any(text.startswith("Default: h200;") or "h200" in text for text in helps)
    assert not [text for text in helps if "\n" in text]
