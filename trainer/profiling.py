"""A profile of one step (--profile STEP): OUT/profile/step-000123.json, a trace for Perfetto or chrome://tracing."""

import contextlib
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from shards.store import temporary_name

PROFILES = "profile"


@contextlib.contextmanager
def profiled(wanted: bool, out: Path, step: int) -> Any:
    """Profile the block and write its trace, with shapes and memory; nothing unless `wanted`."""
    if not wanted:
        yield
        return
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])
    with profile(activities=activities, record_shapes=True, profile_memory=True) as trace:
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # what the step has queued belongs to it
    final = out / PROFILES / f"step-{step:06d}.json"
    final.parent.mkdir(exist_ok=True)
    temporary = temporary_name(final).with_suffix(".json")  # the profiler looks at the suffix
    trace.export_chrome_trace(str(temporary))
    temporary.replace(final)
