"""Ranks that hash their files by themselves: one that is slow, one that fails, one that is gone."""

import threading
import time
from pathlib import Path

import pytest

from trainer import rank_reports
from trainer.rank_reports import clear_reports, leave_report, signs_of_life, wait_for_report


def later(call, *arguments: object) -> threading.Thread:  # type: ignore[no-untyped-def]
    thread = threading.Thread(target=call, args=arguments)
    thread.start()
    return thread


def test_a_slow_rank_is_waited_for(tmp_path: Path) -> None:
    """Longer than the limit, since it gives signs of life."""

    def hash_for_a_second() -> None:
        with signs_of_life(tmp_path, 3, 0.02):
            time.sleep(1)
        leave_report(tmp_path, 3, {"files": {"a": "1"}})

    thread = later(hash_for_a_second)
    assert wait_for_report(tmp_path, 3, 0.5, threading.Event()) == {"files": {"a": "1"}}
    thread.join()
    clear_reports(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_rank_that_fails_says_so(tmp_path: Path) -> None:
    leave_report(tmp_path, 1, {"error": "OSError: No space left on device"})
    with pytest.raises(RuntimeError, match=r"rank 1 could not save its part: OSError: No space"):
        wait_for_report(tmp_path, 1, 60, threading.Event())


@pytest.mark.parametrize("is_ending", [False, True])
def test_a_rank_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_ending: bool) -> None:
    """After the limit, and sooner where the run ends with an error anyway."""
    monkeypatch.setattr(rank_reports, "GRACE_SECONDS", 0.1)
    ending = threading.Event()
    if is_ending:
        ending.set()
    with signs_of_life(tmp_path, 2, 10):
        pass  # began, and was killed
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no sign of rank 2"):
        wait_for_report(tmp_path, 2, 0.4, ending)
    assert (time.monotonic() - began < 0.4) == is_ending
