"""One driver per folder: a lease that a second driver sees, that the dead leave behind and the next takes over.

The lease is the file with the highest number in DIR/_lease/. Taking it means to create the next number, which
only one can. So the number is also a fence: a driver that finds another one than its own has lost the lease
and publishes nothing more. Numbers begin anew once a lease was given back, so the file also holds a token.
Works alike on filesystems and on object stores with a conditional put.
"""

import contextlib
import json
import math
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shards.crash import crash_point
from shards.store import LocalStore, Store, open_store

LEASE = "_lease"
HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 30.0  # without a heartbeat, where its process cannot be looked up because it ran on another machine
TAKE_ATTEMPTS = 20
UNREADABLE_SECONDS = 2.0  # for which a lease file that is empty, or not JSON, is read again

TRUSTED_SECONDS = 10.0  # for a check in a loop, less than the silence after which another may take over


class LeaseLost(RuntimeError):
    """Another driver has taken the folder over."""


def machine() -> str:
    """What distinguishes machines, their reboots and containers: process ids are comparable within one."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def process_start(pid: int) -> str | None:
    """When a process began, in the kernel's ticks, so that a reused pid is told apart; None where it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
        try:
            os.kill(pid, 0)
        except OSError:
            return None
        return "unknown"
    except OSError:
        return None
    return None if fields[0] in "ZX" else fields[19]


def _clocks() -> tuple[float, float]:
    """Seconds by two clocks: only one of them goes on in a machine that sleeps, and the other may be set back."""
    return time.time(), time.monotonic()


class Lease:
    """The lease of a folder, held from `acquire` to `release`; a thread renews it. option: that the folder was given with."""

    def __init__(self, folder: Store | str | Path, option: str = "--out") -> None:
        self.store, self.option = open_store(folder), option
        self.number = 0
        self._value: dict[str, Any] = {}
        self._confirmed = (-math.inf, -math.inf)  # when it was seen to be ours, by two clocks
        self._stop = threading.Event()
        self._writing = threading.Lock()

    @property
    def fence(self) -> tuple[int, str]:
        """Number and token, for `check_fence` in other processes."""
        return self.number, self._value.get("token", "")

    def acquire(self, on_wait: Callable[[str], None] = lambda message: None) -> "Lease":
        """Take the lease; RuntimeError names the driver that holds it.

        on_wait: told where it takes up to STALE_SECONDS to see whether a driver on another machine is gone.
        """
        for attempt in range(1, TAKE_ATTEMPTS + 1):
            try:
                self._take(on_wait)
                break
            except FileNotFoundError:  # a driver that began or ended just now took our temporary file or folder away
                if attempt == TAKE_ATTEMPTS:
                    raise
        crash_point("lease.taken")
        threading.Thread(target=self._beat, name="lease", daemon=True).start()
        return self

    def _take(self, on_wait: Callable[[str], None]) -> None:
        highest = self._highest()
        while highest:
            self._require_gone(highest, on_wait)
            before, highest = highest, self._highest()
            if highest == before:
                break
        self.number = highest + 1
        self._value = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "machine": machine(),
            "process_start": process_start(os.getpid()),
            "token": secrets.token_hex(8),
            "started": time.time(),
            "beats": 0,
        }
        try:
            self.store.create(self._name(self.number), self._encoded())
        except FileExistsError:
            self._refuse(self._read(self.number) or {})
        except FileNotFoundError:
            raise
        except OSError:  # a filesystem of no use here: nothing stays in what may be a new folder
            self._remove_empty_folders()
            raise
        if self._highest() != self.number:
            self._remove(self.number)
            self._refuse(self._read(self._highest()) or {})
        for old in self._numbers():
            if old < self.number:
                self._remove(old)

    def release(self) -> None:
        """Give the lease back; safe to call twice, and after it was lost."""
        self._stop.set()
        try:
            with self._writing:
                if (self._read(self.number) or {}).get("token") == self._value.get("token"):
                    self._remove(self.number)
        except OSError:
            pass
        self._remove_empty_folders()
        crash_point("lease.released")

    def _remove_empty_folders(self) -> None:
        with contextlib.suppress(OSError):
            if isinstance(self.store, LocalStore):
                self.store.path(LEASE).rmdir()
                self.store.path("").rmdir()  # where nothing was written

    def check(self) -> None:
        """LeaseLost where another driver has taken over."""
        now = _clocks()  # before the look, which may take long
        check_fence(self.store, *self.fence)
        self._confirmed = now

    def check_often(self) -> None:
        """`check` for a loop: what a heartbeat of the last TRUSTED_SECONDS has seen is not looked up again."""
        if max(now - before for now, before in zip(_clocks(), self._confirmed)) > TRUSTED_SECONDS:
            self.check()

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            self._value["beats"] += 1
            try:
                with self._writing:
                    if not self._stop.is_set():
                        self.check()
                        self.store.replace(self._name(self.number), self._encoded())
            except LeaseLost:
                self._confirmed = (-math.inf, -math.inf)
                return
            except Exception:  # a filesystem that hangs for a while; the driver's own work will say so
                continue

    def _require_gone(self, number: int, on_wait: Callable[[str], None]) -> None:
        value = self._read(number)
        if value is None or value.get("machine") == machine():
            if value is not None and process_start(value["pid"]) == value["process_start"]:
                self._refuse(value)
            return
        on_wait(
            f"{self.store.url}: a driver on {value['host']} (pid {value['pid']}) holds it; waiting up to "
            f"{STALE_SECONDS:.0f} s to see whether it is alive"
        )
        deadline = time.monotonic() + STALE_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(1.0, STALE_SECONDS / 4))
            now = self._read(number)
            if self._highest() != number:
                return
            if now is not None and (now["token"], now["beats"]) != (value["token"], value["beats"]):
                self._refuse(now)

    def _refuse(self, value: dict[str, Any]) -> None:
        age = max(0.0, time.time() - value.get("started", time.time()))
        raise RuntimeError(
            f"{self.store.url}: another driver writes to this folder: host {value.get('host')}, pid {value.get('pid')}, "
            f"since {age // 60:.0f} min {int(age % 60)} s; let it finish, stop it, or choose another {self.option}"
        )

    def _encoded(self) -> bytes:
        return json.dumps(self._value).encode()

    def _name(self, number: int) -> str:
        return lease_name(number)

    def _numbers(self) -> list[int]:
        return lease_numbers(self.store)

    def _highest(self) -> int:
        return max(self._numbers(), default=0)

    def _read(self, number: int) -> dict[str, Any] | None:
        return read_lease(self.store, number)

    def _remove(self, number: int) -> None:
        self.store.delete(self._name(number))


def lease_numbers(store: Store) -> list[int]:
    """Numbers of the lease files of a folder."""
    return [int(name[:-5]) for name in store.names(LEASE) if name.endswith(".json") and name[:-5].isdigit()]


def lease_name(number: int) -> str:
    """Name of a lease file, relative to the folder."""
    return f"{LEASE}/{number:08d}.json"


def read_lease(store: Store, number: int) -> dict[str, Any] | None:
    """What a lease file says, None where there is none or it is not one.

    A store may show a file that is being replaced as empty, or in part: HDFS does until it is closed. So what cannot be read
    is read again for UNREADABLE_SECONDS.
    """
    deadline = time.monotonic() + UNREADABLE_SECONDS
    while True:
        try:
            value = json.loads(store.read(lease_name(number)))
        except FileNotFoundError:
            return None
        except ValueError:
            value = None
        if isinstance(value, dict) and {"pid", "process_start", "token", "beats"} <= {*value}:
            return value
        if time.monotonic() >= deadline:
            return None
        time.sleep(UNREADABLE_SECONDS / 20)


def check_fence(store: Store, number: int, token: str = "") -> None:
    """LeaseLost unless the lease with this number and token is the folder's newest. number 0: written without one."""
    if not number:
        return
    newest = max(lease_numbers(store), default=0)
    if newest != number or (token and (read_lease(store, number) or {}).get("token") != token):
        raise LeaseLost(f"{store.url}: another driver has taken this folder over; this one publishes nothing more")
