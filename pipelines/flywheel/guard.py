"""Run one command and let nothing of it outlive the driver: `python -I -S guard.py WATCH CORES COMMAND...`.

WATCH is a pipe whose other end the driver holds: when the driver is gone, however it went, the command and all that it
has started are killed. CORES is a list such as 0,1, or `all`. SIGTERM is handed to the command; what is left of its
processes when it ends is killed. Exit code: the command's own, 128 + N where signal N ended it.

Linux; plain Python without the packages, so that it is up in milliseconds. A kill -9 of this process kills the command,
but not what the command has started.
"""

import ctypes
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

SET_PDEATHSIG, SET_CHILD_SUBREAPER = 1, 36  # of prctl(2)


def descendants() -> list[int]:
    """Processes below this one, whoever their parent is now: orphans come to a subreaper."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue  # it has just ended
            if fields[0] != "Z":
                children.setdefault(int(fields[1]), []).append(int(entry.name))
    found, front = [], [os.getpid()]
    while front:
        front = [child for parent in front for child in children.get(parent, [])]
        found += front
    return found


def kill_all() -> None:
    """Until there are none: a process may start another one while it is being killed."""
    while below := descendants():
        for pid in below:
            try:
                os.kill(pid, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def main() -> int:
    watch, cores, command = int(sys.argv[1]), sys.argv[2], sys.argv[3:]
    libc = ctypes.CDLL(None)
    libc.prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if cores != "all":
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    woken, wake = os.pipe()
    os.set_blocking(woken, False)
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGCHLD):
        signal.signal(number, lambda number, frame: None)
    try:
        child = subprocess.Popen(command, preexec_fn=lambda: libc.prctl(SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0))
    except OSError as error:
        print(f"{command[0]}: cannot be started ({error.strerror})", file=sys.stderr)
        return 127
    while child.poll() is None:
        ready, _, _ = select.select([watch, woken], [], [])
        if watch in ready:  # nothing is ever written to it: the driver is gone
            kill_all()
            return 128 + signal.SIGKILL
        if {signal.SIGTERM, signal.SIGINT} & set(os.read(woken, 64)):
            child.send_signal(signal.SIGTERM)
    kill_all()
    return child.returncode if child.returncode >= 0 else 128 - child.returncode


if __name__ == "__main__":
    sys.exit(main())
