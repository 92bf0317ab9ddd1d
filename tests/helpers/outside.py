"""What a fast test must not do: start a process, start Ray. An audit hook sees it, whoever does it."""

import contextlib
import sys
from collections.abc import Iterator

import pytest

STARTS = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.exec"}
_state = {"forbidden": False}


def require_allowed(what: str) -> None:
    """Fail the test where it may not start processes."""
    if _state["forbidden"]:
        _state["forbidden"] = False  # what reports the failure may start processes
        # not an Exception: code that turns those into a line and an exit code does not catch it
        pytest.fail(f"this test starts a process ({what}); it needs a fixture that conftest.KINDS names")


def _hook(event: str, arguments: tuple) -> None:
    if event in STARTS:
        require_allowed(" ".join(map(str, (event, *arguments[:1]))))


sys.addaudithook(_hook)


@contextlib.contextmanager
def forbidden() -> Iterator[None]:
    before = _state["forbidden"]
    _state["forbidden"] = True
    try:
        yield
    finally:
        _state["forbidden"] = before


@contextlib.contextmanager
def allowed() -> Iterator[None]:
    """For fixtures of the session that the first test to ask for them sets up."""
    before = _state["forbidden"]
    _state["forbidden"] = False
    try:
        yield
    finally:
        _state["forbidden"] = before
