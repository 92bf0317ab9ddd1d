"""Connect to Ray: the cluster that RAY_ADDRESS names, else a private one on this machine."""

import contextlib
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator

import ray


@contextlib.contextmanager
def ray_cluster(debug: bool = False) -> Iterator[None]:
    """Hold a Ray connection for the block; inside a caller's own it does nothing. debug: show worker output.

    A private cluster has no dashboard and ends with the block. ValueError where RAY_ADDRESS does not answer.
    """
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    address = os.environ.get("RAY_ADDRESS")
    level = logging.INFO if debug else logging.ERROR
    if address:
        try:
            host, colon, port = address.rpartition(":")
            if colon and port.isdigit() and "://" not in address:
                # Ray retries for many minutes where nothing listens, and says nothing meanwhile
                socket.create_connection((host, int(port)), timeout=10).close()
            own = {name: value for name, value in os.environ.items() if name.startswith("REMIT_")}
            # workers of a private cluster inherit these, those of one that was there before do not
            runtime_env = {"env_vars": own} if own else None
            ray.init(address=address, log_to_driver=debug, logging_level=level, runtime_env=runtime_env)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"RAY_ADDRESS is {address}, where no Ray cluster lets us in ({str(error).splitlines()[0]}); start it, "
                "correct the address, give its token in RAY_AUTH_TOKEN, or unset RAY_ADDRESS to use this machine alone"
            ) from error
    else:
        ray.init(
            address="local",
            log_to_driver=debug,
            logging_level=level,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",  # no listener beyond loopback
        )
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # ray.init replaced the caller's by one that exits with 15
    try:
        yield
    finally:
        ray.shutdown()


def cause(error: BaseException) -> BaseException:
    """The exception that a task raised, out of Ray's wrapping."""
    inner = getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error
