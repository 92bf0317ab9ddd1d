"""Ranks of gloo that call a function each, and what they found wrong."""

import faulthandler
import os
import signal
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import outside
from processes import FORKS, start_server


def _rank(call: Callable[..., None], rank: int, size: int, machines: int, folder: Path, more: tuple) -> None:
    faulthandler.enable()
    local = size // machines
    os.environ |= {"LOCAL_RANK": str(rank % local), "LOCAL_WORLD_SIZE": str(local), "GLOO_SOCKET_IFNAME": "lo"}
    try:
        import torch

        from trainer.distributed import connect

        torch.set_num_threads(1)
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=size, timeout=timedelta(seconds=60)
        )
        with connect(60) as world:
            call(world, *more)
            world.barrier()
    except BaseException:
        (folder / f"error.{rank}").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def on_ranks(folder: Path, call: Callable[..., None], size: int, *more: Any, machines: int = 1) -> None:
    """Call call(world, *more) on each of `size` ranks; AssertionError with what one of them raised.

    Once in some forty runs a rank was ended by glibc ("double free or corruption"), at a place that is not known; its stack
    is printed then, and the ranks are started once more.
    """
    outside.require_allowed("processes")
    start_server()
    for _ in range(2):
        ended, errors = _run(Path(tempfile.mkdtemp(prefix="ranks-", dir=folder)), call, size, machines, more)
        if -signal.SIGABRT not in ended:
            break
    assert ended == [0] * size, f"ranks ended with {ended}\n{errors}"


def _run(
    folder: Path, call: Callable[..., None], size: int, machines: int, more: tuple
) -> tuple[list[int | None], str]:
    """How each rank ended, and what they raised."""
    ranks = [FORKS.Process(target=_rank, args=(call, rank, size, machines, folder, more)) for rank in range(size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(300)
    return [process.exitcode for process in ranks], "\n".join(
        file.read_text() for file in sorted(folder.glob("error.*"))
    )
