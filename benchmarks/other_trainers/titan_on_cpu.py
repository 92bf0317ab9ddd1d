"""torchtitan.train on a machine without an accelerator: python -m benchmarks.other_trainers.titan_on_cpu --module ... --config ...

torchtitan asks torch for an accelerator and takes CUDA where there is none. Here torch answers with its CPU, whose module lacks
a few functions that torchtitan reports memory with.
"""

import os
from types import SimpleNamespace
from typing import Any

import torch

MISSING = {
    "current_device": lambda: 0,  # a number, where torch.cpu has a word
    "get_device_name": lambda device=None: "CPU",
    "get_device_properties": lambda device=None: SimpleNamespace(total_memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")),
    "memory_stats": lambda device=None: {},
    "reset_peak_memory_stats": lambda device=None: None,
    "empty_cache": lambda: None,
}  # fmt: skip


class CpuModule:
    """torch.cpu with what it lacks, or answers otherwise than an accelerator does."""

    def __getattr__(self, name: str) -> Any:
        return MISSING[name] if name in MISSING else getattr(torch.cpu, name)


def use_cpu() -> None:
    """Call it before torchtitan is imported."""
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device_type: CpuModule()
    if not hasattr(torch.distributed, "set_timeout"):  # torchtitan 0.3 is ahead of PyTorch 2.13
        torch.distributed.set_timeout = torch.distributed.distributed_c10d._set_pg_timeout


def main() -> None:
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    use_cpu()
    from torchtitan.train import main as train

    train()


if __name__ == "__main__":
    main()
