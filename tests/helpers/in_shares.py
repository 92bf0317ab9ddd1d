"""Ranks of gloo that call a function each, and what they found wrong."""

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import outside
from processes import FORKS, start_server

PORT = "MASTER_PORT"


def _rank(call: Callable[..., None], rank: int, size: int, port: int, machines: int, errors: Path, more: tuple) -> None:
    os.environ |= {
        "RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank % (size // machines)), "MASTER_ADDR": "127.0.0.1",
        "LOCAL_WORLD_SIZE": str(size // machines), PORT: str(port), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    try:
        import torch

        from trainer.distributed import connect

        torch.set_num_threads(1)
        with connect(60) as world:
            call(world, *more)
    except BaseException:
        errors.with_suffix(f".{rank}").write_text(traceback.format_exc())
        os._exit(1)


def start_ranks(folder: Path, call: Callable[..., None], size: int, *more: Any, machines: int = 1) -> list[Any]:
    """Processes that call call(world, *more)."""
    outside.require_allowed("processes")
    start_server()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [
        FORKS.Process(target=_rank, args=(call, rank, size, port, machines, folder / "error", more))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    return ranks


def on_ranks(folder: Path, call: Callable[..., None], size: int, *more: Any, machines: int = 1) -> None:
    """Call call(world, *more) on each of `size` ranks; AssertionError with what one of them raised."""
    for process in start_ranks(folder, call, size, *more, machines=machines):
        process.join(300)
    errors = "\n".join(file.read_text() for file in sorted(folder.glob("error.*")))
    assert not errors, errors
