"""Have main memory that is freed go back to the system while a base is loaded, saved and exported.

glibc takes blocks of up to 32 MiB from its heap once some of that size were freed, and what is freed there stays with the
process as long as anything above it is in use. Measured: a load that held 0.9 GB of tensors at most kept 0.6 GB of free heap beside them.
"""

import contextlib
import ctypes
import os
from collections.abc import Iterator
from typing import Any

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""As malloc.h has them."""
FRUGAL = {MMAP_THRESHOLD: 1 << 20, TRIM_THRESHOLD: 1 << 20}
QUICK = {MMAP_THRESHOLD: 4 << 20, TRIM_THRESHOLD: 64 << 20}
"""For the steps: smaller blocks are used again without asking the system, and weights that are gathered leave no holes behind.
As quick as glibc's own rule where that was measured; with 32 MiB, where that rule ends, a sharded step held half as much again."""
BY_USER = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "MALLOC_MMAP_MAX_")


@contextlib.contextmanager
def frugal_heap() -> Iterator[None]:
    """Within it blocks of 1 MiB and more come from the system and go back as they are freed.

    Nothing is changed where the C library is another one, or the user has set glibc's thresholds by the environment.
    """
    libc: Any = ctypes.CDLL(None)
    is_set = any(name in os.environ for name in BY_USER) or "malloc" in os.environ.get("GLIBC_TUNABLES", "")
    if is_set or not hasattr(libc, "gnu_get_libc_version"):
        yield
        return
    libc.malloc_trim(0)
    try:
        for parameter, value in FRUGAL.items():
            libc.mallopt(parameter, value)
        yield
    finally:
        for parameter, value in QUICK.items():
            libc.mallopt(parameter, value)
        libc.malloc_trim(0)
