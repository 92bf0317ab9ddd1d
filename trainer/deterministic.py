"""The same bits from the same step on a GPU, in whatever process it runs: what exact resume rests on.

Left to itself a GPU adds in the order in which its threads arrive (the backward pass of attention), and torch.compile
picks kernels by timing them, and by the shapes that it has seen, so that each process may add in an order of its own.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def deterministic(device: torch.device, wanted: bool) -> Iterator[None]:
    """Operations in the block that have no deterministic form on a GPU are errors, and the compiler does not choose
    by time. On a CPU it changes nothing: what runs there is deterministic for a given number of threads.

    Enter it before the first product on the GPU: cuBLAS reads its setting then.
    """
    if device.type != "cuda" or not wanted:
        yield
        return
    import torch._dynamo.config as compiler  # seconds that others need not wait

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # one of the two that cuBLAS repeats itself with
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # of the flash-attn package, read by transformers
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled = memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a help to find bugs, at the cost of a pass over all new memory
    try:
        with compiler.patch(recompile_limit=64):  # of shapes; beyond it layers would run as they are
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
