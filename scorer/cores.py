"""Each CPU engine gets cores of its own, also where several jobs or raylets share a machine."""

import fcntl
import os
from typing import IO

from scorer.once_per_node import user_folder

_held: list[IO[bytes]] = []  # open files whose locks end with the process


def claim_cores(count: int) -> list[int]:
    """`count` cores that no other engine on this machine has claimed; where too few are free, some that have.

    A claim is a file lock, which the kernel takes back when the process ends, however it ends.
    """
    allowed = sorted(os.sched_getaffinity(0))
    folder = user_folder("remit-cores")
    claimed: list[int] = []
    for core in allowed:
        if len(claimed) == count:
            break
        number = os.open(folder / str(core), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        file = os.fdopen(number, "wb")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            file.close()
            continue
        _held.append(file)
        claimed.append(core)
    others = [core for core in allowed if core not in claimed]
    return claimed + others[: max(0, count - len(claimed))]
