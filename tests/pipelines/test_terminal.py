"""Lines and progress in files, and a command that ends in time although something does not come back."""

import re
import signal
import subprocess
import sys
import time

import pytest

from pipelines import terminal
from pipelines.terminal import note, progress_bar

DATE = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "


def test_progress_in_a_file_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal, "LOG_SECONDS", 0.1)
    with progress_bar(desc="score", unit=" tokens", unit_scale=True, total=1000) as bar:
        bar.set_description("later")
        for _ in range(100):  # however often something moves
            bar.update(1)
            bar.set_description("score")
        note("between")
        time.sleep(0.35)  # and where nothing does
    text = capfd.readouterr().err
    assert "\r" not in text
    lines = text.splitlines()
    assert all(re.match(DATE, line) for line in lines), lines
    assert lines[0].endswith(" between")
    assert 3 <= len(lines) <= 6
    assert all("score:  10% 100/1.00k [" in line for line in lines[1:])


def test_a_bar_that_did_nothing_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="bad"), progress_bar(desc="x"):
        raise ValueError("bad")
    with progress_bar(desc="x", disable=True) as bar:
        bar.update(3)
    with progress_bar(desc="x", leave=False) as bar:
        bar.update(3)
    assert capfd.readouterr().err == ""


STUCK = """
import ctypes, os, signal
from pipelines import terminal
terminal.LEAVE_SECONDS = 0.5
stop = terminal.StopRequest(True, 0.5, "remit score: stopped by {name}; the same command again goes on")
stop.install()
signal.siginterrupt(signal.SIGTERM, False)
print("ready", flush=True)
ctypes.CDLL(None).read(os.pipe()[0], ctypes.create_string_buffer(1), 1)  # no Python runs until it comes back
"""


@pytest.mark.usefixtures("starts_processes")
def test_a_command_that_is_stuck_ends_in_time() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={"PYTHONPATH": ":".join(sys.path)}
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - began < 20
    assert process.returncode == 3
    assert error.strip() == "remit score: stopped by SIGTERM; the same command again goes on"
