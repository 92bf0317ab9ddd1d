"""What engines write into the temporary folder does not stay there."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from processes import Command

pytestmark = pytest.mark.usefixtures("starts_processes")

ROOT = Path(__file__).parents[2]
STAYS = {f"remit-cores-{os.getuid()}", f"remit-fingerprints-{os.getuid()}", "ray"}
FORGET = (
    "import os, tempfile; tempfile.tempdir = None; os.environ.pop('RAY_TMPDIR', None)"  # of the process that is forked
)
ENGINE = """
import os, subprocess, sys, tempfile
from scorer.scratch import own_temporary_folder

folder = own_temporary_folder()
with tempfile.NamedTemporaryFile(delete=False) as file:
    file.write(b"x")
child = subprocess.Popen(["python3", "-c", "import tempfile; print(tempfile.gettempdir())"], stdout=subprocess.PIPE)
print(child.communicate()[0].decode().strip() == str(folder), file.name, flush=True)
sys.stdin.read()
"""


def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A temporary folder for child processes; not below pytest's, whose path is too long for Ray's sockets."""
    folder = Path(tempfile.mkdtemp(prefix="t"))
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("how", ["kill", "end"])
def test_the_folder_goes_with_its_process(temporary: Path, how: str) -> None:
    process = subprocess.Popen([sys.executable, "-c", ENGINE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    same, file = process.stdout.readline().split()
    assert (same, Path(file).parent.parent) == ("True", temporary)
    time.sleep(0.3)
    assert Path(file).exists()
    if how == "kill":
        process.kill()
    else:
        process.communicate("")
    until(lambda: not list(temporary.iterdir()))
    process.wait()


def score(temporary: Path, out: Path, shards: Path, model: Path, *options: object, **variables: str) -> Command:
    """remit score with a Ray of its own, both of which find `temporary`."""
    arguments = ["score", "--shards", shards, "--model", model, "--out", out, "--num-engines", 1, *options]
    return Command(out.parent, *arguments, private=True, first=FORGET, TMPDIR=str(temporary), **variables)


def test_score_leaves_nothing_behind(temporary: Path, tmp_path: Path, packed: Path, reference_model: Path) -> None:
    """vLLM itself, which the end of the run ends."""
    run, seen = score(temporary, tmp_path / "out", packed, reference_model, "--dtype", "float32", "--no-canary"), set()
    while run.process.is_alive():
        seen |= {path.parent.name[:13] for path in temporary.glob("remit-engine-*/vllm_dist_*")}
        time.sleep(0.1)
    assert run.finish() == 0, run.errors
    assert seen == {"remit-engine-"}  # else this test looks for the wrong name
    until(lambda: {path.name for path in temporary.iterdir()} <= STAYS)
    assert list((temporary / "ray").glob("session_2*")) == []


def test_sessions_of_ray(temporary: Path, tmp_path: Path, packed: Path, reference_model: Path) -> None:
    """A private Ray's logs go where all went well, and stay where they may be wanted."""
    sessions = lambda: len(list((temporary / "ray").glob("session_2*")))  # noqa: E731
    inputs = (packed, reference_model, "--engine", "fake")
    run = score(temporary, tmp_path / "a", *inputs)
    assert (run.finish(), sessions()) == (0, 0), run.errors
    run = score(temporary, tmp_path / "b", *inputs, REMIT_CRASH_AT="driver.committed")
    assert (run.finish(), sessions()) == (-signal.SIGKILL, 1), run.errors
