"""What each rank says of the files of a checkpoint that it wrote, left beside them for the first rank, which publishes it.

In place of a collective: a rank that hashes 12 bytes per weight takes the time that its storage takes. While it does, it
touches a file, so that the first rank tells one at work from one that is gone.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05
GRACE_SECONDS = 15.0
"""How long a rank without a sign of life is waited for where the run ends with an error."""


def _report(folder: Path, rank: int) -> Path:
    return folder / f".report-{rank}.json"


def _life(folder: Path, rank: int) -> Path:
    return folder / f".alive-{rank}"


def leave_report(folder: Path, rank: int, report: dict[str, Any]) -> None:
    """Leave what rank `rank` says, whole or not at all."""
    final = _report(folder, rank)
    temporary = final.with_suffix(".tmp")
    temporary.write_text(json.dumps(report), encoding="utf-8")
    os.replace(temporary, final)


@contextlib.contextmanager
def signs_of_life(folder: Path, rank: int, seconds: float) -> Iterator[None]:
    """Touch a file every so many seconds while the block is at work."""
    done = threading.Event()

    def beat() -> None:
        while not done.is_set():
            with contextlib.suppress(OSError):
                _life(folder, rank).touch()
            done.wait(seconds)

    thread = threading.Thread(target=beat, name="signs of life", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


HASH = "hash the files that it wrote; the checkpoint is not published, the one before it is"


def wait_for_report(
    folder: Path, rank: int, quiet_seconds: float, ending: threading.Event, verb: str = "save", task: str = HASH
) -> dict[str, Any]:
    """What rank `rank` left; RuntimeError where it says that it failed, TimeoutError after `quiet_seconds` without a sign of
    life, or after GRACE_SECONDS once `ending` is set. verb, task: what it was to do, for the messages.
    """
    sign, since = None, time.monotonic()
    while not _report(folder, rank).exists():
        with contextlib.suppress(OSError):
            if (newest := _life(folder, rank).stat().st_mtime_ns) != sign:
                sign, since = newest, time.monotonic()
        limit = min(GRACE_SECONDS, quiet_seconds) if ending.is_set() else quiet_seconds
        if time.monotonic() - since > limit:
            raise TimeoutError(f"{folder}: no sign of rank {rank} for {limit:g} s, which was to {task}")
        time.sleep(POLL_SECONDS)
    report: dict[str, Any] = json.loads(_report(folder, rank).read_text(encoding="utf-8"))
    if "error" in report:
        raise RuntimeError(f"{folder}: rank {rank} could not {verb} its part: {report['error']}")
    return report


def clear_reports(folder: Path) -> None:
    """Leave nothing but the checkpoint."""
    for pattern in (".report-*", ".alive-*"):
        for file in folder.glob(pattern):
            file.unlink(missing_ok=True)
