"""Connect to Ray: the cluster that RAY_ADDRESS names, else a private one on this machine."""

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import ray


@contextlib.contextmanager
def ray_cluster(debug: bool = False) -> Iterator[None]:
    """Hold a Ray connection for the block. debug: show what the workers print.

    A private cluster listens on loopback only, has no dashboard and ends with the block.
    """
    if ray.is_initialized():  # a caller holds one for several stages
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = os.environ.get("RAY_ADDRESS")
    local: dict[str, Any] = {} if address else {"include_dashboard": False, "_node_ip_address": "127.0.0.1"}
    ray.init(
        address=address or "local",
        log_to_driver=debug,
        logging_level=logging.INFO if debug else logging.ERROR,
        **local,
    )
    try:
        yield
    finally:
        ray.shutdown()


def cause(error: BaseException) -> BaseException:
    """The exception that a task raised, out of Ray's wrapping."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error
