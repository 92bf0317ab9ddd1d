"""A limit on the memory of each of some processes that the kernel enforces.

By a control group where this process may make one (as root; version 1 or 2): what is counted is memory, and a process that needs
more is killed. Pages of files count as well and are taken back first. Elsewhere by RLIMIT_DATA, which counts address space that
could be written to, so that thread stacks and files that are mapped privately count in full; an allocation beyond it fails.
"""

import os
import resource
from pathlib import Path
from typing import Literal

LimitBy = Literal["auto", "cgroup", "data"]
ROOT = Path("/sys/fs/cgroup")


def own_bytes(field: str = "RssAnon") -> int:
    """A field of /proc/self/status."""
    with open("/proc/self/status", encoding="utf-8") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


class Limits:
    """Limits of the same `size` in bytes for `count` processes; `remove` when they have ended.

    mapped: bytes of files that a process maps at a time, which RLIMIT_DATA counts and a control group does not.
    """

    def __init__(self, size: int, count: int, by: LimitBy = "auto", mapped: int = 0) -> None:
        self.size, self.mapped = size, mapped
        self._groups: list[Path] = []
        if by != "data":
            try:
                for index in range(count):
                    self._groups.append(_make_group(f"remit-limit-{os.getpid()}-{index}", size))
            except OSError:
                self.remove()
                if by == "cgroup":
                    raise
        self.text = "a control group" if self._groups else "RLIMIT_DATA"

    def group(self, index: int) -> Path | None:
        return self._groups[index] if self._groups else None

    def enter(self, index: int) -> None:
        """Hold this process to the limit. A control group does not count what the process holds already."""
        if group := self.group(index):
            (group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            most = own_bytes("VmData") - own_bytes() + self.size + self.mapped
            resource.setrlimit(resource.RLIMIT_DATA, (most, most))

    def remove(self) -> None:
        for group in self._groups:
            group.rmdir()
        self._groups = []


def _make_group(name: str, size: int) -> Path:
    """OSError where it cannot be made."""
    first = (ROOT / "memory").is_dir()
    group = (ROOT / "memory" if first else ROOT) / name
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(size))
        swap = group / ("memory.memsw.limit_in_bytes" if first else "memory.swap.max")
        if swap.exists():
            swap.write_text(str(size) if first else "0")
    except OSError:
        group.rmdir()
        raise
    return group
