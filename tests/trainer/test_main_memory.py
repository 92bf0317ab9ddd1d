"""Main memory that is left, from files as the kernel writes them; what is freed goes back; a save without room for its copy."""

import ctypes
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from annotated import run
from safetensors.torch import load_file

import trainer.checkpoint
from trainer.main_memory import free_main_memory


def kernel(root: Path, cgroup: str, **files: str) -> Path:
    texts = {"proc/meminfo": "MemTotal: 99 kB\nMemAvailable:    8000 kB\n", "proc/self/cgroup": cgroup}
    for name, text in (texts | {name.replace("__", "/"): text for name, text in files.items()}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def group(folder: str, names: tuple[str, str], limit: str, used: int, cached: str, members: int) -> dict[str, str]:
    values = {names[0]: limit, names[1]: f"{used}\n", "memory.stat": cached, "cgroup.procs": "1\n" * members}
    return {f"sys/fs/cgroup/{folder}/{name}": value for name, value in values.items()}


FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes")
SECOND = ("memory.max", "memory.current")


@pytest.mark.parametrize(
    ("cgroup", "groups", "processes", "free"),
    [
        ("0::/\n", {}, 4, 2_048_000),
        ("0::/a\n", group("a", SECOND, "max", 5, "", 9), 1, 8_192_000),
        # 3,000,000 less 1,000,000 of which 400,000 are cached files; four processes of the run, nine in the group
        ("0::/a\n", group("a", SECOND, "3000000", 1_000_000, "inactive_file 300000\nactive_file 100000\n", 9), 4, 600_000),
        ("0::/a\n", group("a", SECOND, "3000000", 1_000_000, "", 1), 4, 2_000_000),
        ("0::/a/b\n", group("a", SECOND, "100", 200, "", 1) | group("a/b", SECOND, "max", 5, "", 1), 1, 0),
        ("5:cpu:/x\n4:memory:/a\n0::/\n", group("memory/a", FIRST, "900000", 100_000, "total_inactive_file 50000\n", 1), 1, 850_000),
        ("4:memory:/a\n", group("memory/a", FIRST, "9223372036854771712", 100_000, "", 1), 1, 8_192_000),
        ("4:memory:/of/the/host\n", {}, 2, 4_096_000),
    ],
)  # fmt: skip
def test_what_is_free(tmp_path: Path, cgroup: str, groups: dict[str, str], processes: int, free: int) -> None:
    kernel(tmp_path, cgroup, **groups)
    assert free_main_memory(processes, tmp_path) == free


def test_of_this_process() -> None:
    assert 0 < free_main_memory(1) <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_limit_on_data_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel(tmp_path, "0::/\n", proc__self__status="VmPeak: 9 kB\nVmData:\t  1000 kB\n")
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1_500_000, resource.RLIM_INFINITY))
    assert free_main_memory(1, tmp_path) == 1_500_000 - 1_024_000


def test_a_save_without_room_for_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, annotated: dict[str, Path], models: dict[str, Path]
) -> None:
    """It is written at once, and the run goes on from it as from the other kind."""
    saved: list[str] = []
    for name in ("save", "async_save"):
        own = getattr(dcp, name)
        monkeypatch.setattr(
            dcp, name, lambda *inputs, own=own, name=name, **named: (saved.append(name), own(*inputs, **named))[1]
        )
    for free in (1 << 60, 0):
        monkeypatch.setattr(trainer.checkpoint, "free_main_memory", lambda processes, free=free: free)
        run(tmp_path / str(free), annotated["packed"], models["base"], max_steps=2, checkpoint_every=1)
        for done in (tmp_path / str(free) / "model", tmp_path / str(free) / "checkpoints" / "step-000002"):
            shutil.rmtree(done)
        run(tmp_path / str(free), annotated["packed"], models["base"], max_steps=2, checkpoint_every=1)
    assert saved == ["async_save"] * 3 + ["save"] * 3
    one, other = (load_file(tmp_path / str(free) / "model" / "model.safetensors") for free in (1 << 60, 0))
    assert all(torch.equal(one[name], other[name]) for name in one)


HELD = """
import torch
from trainer.heap import frugal_heap
from benchmarks.memory_limit import own_bytes

def churn():
    first = torch.ones(20 << 20, dtype=torch.uint8)  # glibc takes blocks of that size from its heap once it is freed
    del first
    keep = []
    for _ in range(20):
        block = torch.ones(15 << 20, dtype=torch.uint8)
        keep.append(torch.ones(300 << 10, dtype=torch.uint8))
        more = torch.ones(15 << 20, dtype=torch.uint8)
        keep.append(torch.ones(300 << 10, dtype=torch.uint8))
        del block, more
    return own_bytes()

before = own_bytes()
if %s:
    with frugal_heap():
        print(churn() - before)
else:
    print(churn() - before)
"""


@pytest.mark.usefixtures("starts_processes")
@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"), reason="glibc's thresholds")
def test_what_is_freed_goes_back() -> None:
    held = [
        int(subprocess.run([sys.executable, "-c", HELD % is_frugal], capture_output=True, text=True, check=True).stdout)
        for is_frugal in (True, False)
    ]
    assert held[0] < 16 << 20  # 12 MB are kept
    assert held[1] > held[0] + (10 << 20)
