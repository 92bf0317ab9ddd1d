"""Connect to Ray: the cluster that RAY_ADDRESS names, else a private one on this machine."""

import contextlib
import logging
import os
import shutil
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from time import monotonic
from typing import Any

import ray
from ray._private import ray_constants
from ray.job_config import JobConfig

from scorer.stopping import Stopped

LOOPBACK = ("127.0.0.1", "localhost")
RECONNECT_SECONDS = "RAY_gcs_rpc_server_reconnect_timeout_s"
SHUTDOWN_SECONDS = 2.0
HEAD_PATIENCE, HEAD_LEAVE = 0.6, 0.2  # of the time after which Ray's library ends a driver that does not reach the head
PACKAGES = Path(__file__).resolve().parent.parent


class OwnPath(JobConfig):
    """What Ray's workers are told of this driver: where our packages are.

    Of itself Ray would put the current folder and the script's in front of their path, where a trainer.py or a folder
    shards of the user's own hides ours. It leaves that out for jobs whose code it brings along.
    """

    def __init__(self) -> None:
        # in front of the path, the folder of installed packages would hide some of Python's own
        installed = {"site-packages", "dist-packages"} & {*PACKAGES.parts}
        super().__init__(_py_driver_sys_path=[] if installed else [str(PACKAGES)])

    def _runtime_env_has_working_dir(self) -> bool:
        return True


class RayGone(ray.exceptions.RayError):
    """A process of the private Ray has ended, or the head of the cluster."""


@contextlib.contextmanager
def ray_errors(stopping: Callable[[], bool]) -> Iterator[None]:
    """Ray's own errors in the block: Stopped where a signal came, which went to Ray's processes too, else RuntimeError."""
    try:
        yield
    except ray.exceptions.RayError as error:
        if stopping():
            raise Stopped("stopped by a signal") from None
        raise RuntimeError(f"Ray failed: {one_line(error)}; the same command again goes on") from error


def nodes_may_join() -> bool:
    """Whether there is a cluster that others run, and not a private Ray, which stays as it is."""
    return bool(os.environ.get("RAY_ADDRESS"))


@contextlib.contextmanager
def ray_cluster(debug: bool = False, note: Callable[[str], None] = lambda line: None) -> Iterator[None]:
    """Hold a Ray connection for the block; inside a caller's own it does nothing. debug: show worker output.

    A private cluster has no dashboard and ends with the block. ValueError where RAY_ADDRESS does not answer. note: told
    when the head of a cluster falls silent.
    """
    if ray.is_initialized():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    address = os.environ.get("RAY_ADDRESS")
    if address and "://" in address:
        raise ValueError(
            f"RAY_ADDRESS is {address}, expected host:port of the cluster's head, such as head:6379; remit runs on a machine of "
            "the cluster: start it there, or hand it over with `ray job submit -- remit ...`"
        )
    level = logging.INFO if debug else logging.ERROR
    if address:
        try:
            host, colon, port = address.rpartition(":")
            on_loopback = False
            if colon and port.isdigit() and "://" not in address:
                # Ray retries for many minutes where nothing listens, and says nothing meanwhile
                socket.create_connection((host, int(port)), timeout=10).close()
                on_loopback = host in LOOPBACK and not _answers(ray.util.get_node_ip_address(), int(port))
            own = {name: value for name, value in os.environ.items() if name.startswith("REMIT_")}
            # workers of a private cluster inherit these, those of one that was there before do not
            runtime_env = {"env_vars": own} if own else None
            with loopback() if on_loopback else contextlib.nullcontext():
                ray.init(
                    address=address,
                    log_to_driver=debug,
                    logging_level=level,
                    runtime_env=runtime_env,
                    job_config=OwnPath(),
                )
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"RAY_ADDRESS is {address}, where no Ray cluster lets us in ({str(error).splitlines()[0]}); start it, "
                "correct the address, give its token in RAY_AUTH_TOKEN, or unset RAY_ADDRESS to use this machine alone"
            ) from error
    else:
        # a worker that a busy machine starts later than this is given up, and ray.init then waits for it for ever;
        # Ray's own limit is a minute
        os.environ.setdefault("RAY_worker_register_timeout_seconds", "900")
        # Ray gives its workers nice 15: beside any other work on the machine an engine would not come up for minutes
        os.environ.setdefault("RAY_worker_niceness", "0")
        with loopback():
            ray.init(
                address="local", log_to_driver=debug, logging_level=level, include_dashboard=False, job_config=OwnPath()
            )
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)  # ray.init replaced the caller's by one that exits with 15
    node: Any = ray._private.worker._global_node
    session = None if address else node.get_session_dir_path()
    went_well = False
    head = HeadWatch(ray.get_runtime_context().gcs_address, note) if address else None
    try:
        yield
        went_well = True
    except SystemError as error:  # what a signal's handler raises within one of Ray's calls arrives so
        raise cause(error) from None
    finally:
        if HeadWatch.gone and head:  # it may not come back
            head.quiet = True
            closing = threading.Thread(target=ray.shutdown, daemon=True)
            closing.start()
            closing.join(SHUTDOWN_SECONDS)
        else:
            ray.shutdown()
            if head:
                head.end()
        if went_well and session and not debug:  # else the logs of Ray's processes may be wanted
            shutil.rmtree(session, ignore_errors=True)


def require_ray() -> None:
    """RayGone where the private cluster has lost one of its processes, or somebody else's its head.

    Without it Ray's calls come back empty for a minute, and then its library ends the driver.
    """
    if HeadWatch.gone:
        raise RayGone(HeadWatch.gone)
    node: Any = ray._private.worker._global_node  # no public name tells it
    for kind, process in node.dead_processes() if node is not None else ():
        raise RayGone(f"its {kind} has ended, with {process.poll()}")


class HeadWatch:
    """Looks whether the head of a cluster takes connections, until `end`.

    One that comes back within the time that Ray waits for it (fault-tolerant heads do) costs nothing. Shortly before
    Ray's library would end this process, `require_ray` raises; where the driver is within one of Ray's calls and does not
    get there, the process ends from here, with a line (unless quiet: the driver has its own) and our exit code.
    """

    gone = ""  # why there is no head any more
    silent = False  # calls that ask it would not come back now

    def __init__(self, address: str, note: Callable[[str], None]) -> None:
        self._address, self._note = address, note
        seconds = float(os.environ.get(RECONNECT_SECONDS, 60))
        self._patience, self._leave = HEAD_PATIENCE * seconds, HEAD_LEAVE * seconds
        self._ended = threading.Event()
        self.quiet = False
        threading.Thread(target=self._watch, name="head", daemon=True).start()

    def end(self) -> None:
        self._ended.set()
        HeadWatch.gone, HeadWatch.silent = "", False

    def _watch(self) -> None:
        host, _, port = self._address.rpartition(":")
        since = None
        while not self._ended.wait(2.0):
            began = monotonic()
            try:
                socket.create_connection((host, int(port)), timeout=5).close()
            except OSError as error:
                if since is None:
                    since = began
                    self._note(
                        f"the head of the Ray cluster, {self._address}, does not answer ({error}); waiting for it for "
                        f"{self._patience:.0f} s"
                    )
                HeadWatch.silent = True
            else:
                if since is not None:
                    self._note(
                        f"the head of the Ray cluster, {self._address}, answers again, after {monotonic() - since:.0f} s"
                    )
                since, HeadWatch.silent = None, False
            if since is not None and monotonic() - since > self._patience:
                break
        else:
            return
        HeadWatch.gone = (
            f"the head of the cluster, {self._address}, has not answered for {self._patience:.0f} s; start it again"
        )
        if self._ended.wait(self._leave):
            return
        if not self.quiet:
            line = f"remit: error: Ray failed: RayGone: {HeadWatch.gone}; the same command again goes on"
            os.write(2, f"{line}\n".encode())
        os._exit(1)


@contextlib.contextmanager
def loopback() -> Iterator[None]:
    """What Ray starts in the block listens on 127.0.0.1 alone, as it does of itself on Windows and macOS.

    Elsewhere it takes 127.0.0.1, given as the node's address, for the machine's own and listens on every interface.
    """
    name, before = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR, ray_constants.ENABLE_RAY_CLUSTER
    own = os.environ.get(name)
    os.environ[name], ray_constants.ENABLE_RAY_CLUSTER = "0", False  # for the processes that it starts, and for us
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
        del os.environ[name]
        if own is not None:
            os.environ[name] = own


def _answers(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), timeout=10).close()
    except OSError:
        return False
    return True


def cause(error: BaseException) -> BaseException:
    """The exception that a task, or a signal's handler within one of Ray's calls, raised, out of Ray's wrapping."""
    inner = error.__cause__ if isinstance(error, SystemError) else getattr(error, "cause", None)
    return inner if isinstance(inner, BaseException) else error


def one_line(error: BaseException) -> str:
    """The last line of an error's text, or its type."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1].strip()}" if lines else type(error).__name__


def death(error: BaseException) -> str:
    """Why Ray says that a process died, without the ids, addresses and advice around it."""
    detail = " ".join(str(error).split()).partition("Worker exit detail: ")[2]
    detail = detail.partition(" Some common causes")[0].partition("If the process was")[0].strip(" .")
    return f"killed, out of memory or crashed ({detail or one_line(error)})"
