"""Named places at which a test may kill the process, to show that nothing is lost there.

REMIT_CRASH_AT=NAME kills with signal 9 on arrival at NAME; REMIT_CRASH_AT=NAME@FILE does so once, namely for
whoever creates FILE. Without the variable a crash point does nothing.
"""

import os
import signal

CRASH_POINTS = (
    # publishing a file: a part (its temporary file first), a JSON file (record, manifest)
    "part.opened", "part.written", "part.synced", "part.linked", "part.published",
    "record.written", "record.linked", "record.published",
    "manifest.written", "manifest.linked", "manifest.published",
    # drivers of pack and score
    "lease.taken", "output.begun", "staging.written", "staging.done", "driver.planned", "driver.assigned",
    "driver.committed", "driver.finished", "lease.released",
)  # fmt: skip


def crash_point(name: str) -> None:
    """Die here if the environment asks for it."""
    wanted = os.environ.get("REMIT_CRASH_AT")
    if not wanted:
        return
    assert name in CRASH_POINTS, name
    point, _, once = wanted.partition("@")
    if point != name:
        return
    if once:
        try:
            os.close(os.open(once, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return
    os.kill(os.getpid(), signal.SIGKILL)
