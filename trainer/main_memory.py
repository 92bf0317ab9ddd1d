"""How much main memory this process may still take: what the machine has, its control group and its limits leave it."""

import resource
from collections.abc import Iterator
from pathlib import Path

UNLIMITED = 1 << 60  # more than any machine; control groups without a limit say a number above it, or "max"


def free_main_memory(processes: int, root: Path = Path("/")) -> int:
    """Bytes that each of `processes` on this machine may take at the same time, 0 or more. root: of /proc and /sys, for tests."""
    free = [_fields(root / "proc/meminfo")["MemAvailable"] * 1024 // processes]
    for limit, used, members in _groups(root):
        if limit < UNLIMITED:
            free.append((limit - used) // max(1, min(processes, members)))
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if soft != resource.RLIM_INFINITY:
        free.append(soft - _fields(root / "proc/self/status")["VmData"] * 1024)
    return max(0, min(free))


def _groups(root: Path) -> Iterator[tuple[int, int, int]]:
    """Of each control group above this process: its limit, what is used without cached files, its processes."""
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, kinds, path = line.split(":", 2)
        if kinds not in ("", "memory"):
            continue
        first = kinds == "memory"  # version 1
        base = root / "sys/fs/cgroup" / ("memory" if first else "")
        limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if first else ("memory.max", "memory.current")
        cached = ("total_inactive_file", "total_active_file") if first else ("inactive_file", "active_file")
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            if not folder.is_relative_to(base):
                break
            try:
                most, now = (folder / limit).read_text().strip(), int((folder / used).read_text())
                statistics = _fields(folder / "memory.stat")
                members = len((folder / "cgroup.procs").read_text().split())
            except (OSError, ValueError):  # the root has no limit; in a container the path may be that of the host
                continue
            files = sum(statistics.get(name, 0) for name in cached)
            yield UNLIMITED if most == "max" else int(most), max(0, now - files), members


def _fields(path: Path) -> dict[str, int]:
    """The lines "name value" or "name: value kB" of a file of the kernel."""
    fields = {}
    for line in path.read_text().splitlines():
        name, *rest = line.replace(":", " ").split()
        if rest and rest[0].isdigit():
            fields[name] = int(rest[0])
    return fields
