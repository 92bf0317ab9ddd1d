"""A folder in an object store or on HDFS, through fsspec: s3:// needs s3fs, gs:// gcsfs, hdfs:// libhdfs.

Not replacing what is there is a conditional put where the store has one (S3 If-None-Match, GCS generation
match) and a rename on HDFS, which refuses to rename onto a file; other stores may replace the file, so they are only read. What is asked of a store that does not
answer is asked again for REMIT_STORE_RETRY_SECONDS (600); the libraries below ask once, or the waiting would multiply.
"""

import contextlib
import io
import os
import secrets
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import fsspec
import pyarrow as pa

from shards.asking import asked_again
from shards.crash import crash_point
from shards.store import NO_SPACE, TEMPORARY_SUFFIX, Store
from shards.store_errors import NoTemporarySpace, OtherBytes, answer_of, exists_already, retry_seconds, text_of
from shards.writable import require_writable

CONDITIONAL_PUT = {"s3", "s3a", "gs", "gcs"}
PACKAGES = {"s3": "pip install s3fs", "gs": "pip install gcsfs", "hdfs": "it needs Java and Hadoop's libhdfs"}
PACKAGES |= {"s3a": PACKAGES["s3"], "gcs": PACKAGES["gs"]}
READ_BYTES = 8 << 20  # a request for the bytes of an open file asks for at least as many
PART_BYTES = 8 << 20  # of a large file that is uploaded
UPLOADS = 5  # of one file, where they break off
T = TypeVar("T")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it; ValueError where its package is missing."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1},
            "connect_timeout": min(10, retry_seconds()),
            "read_timeout": min(60, retry_seconds()),
        }
    try:
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError, OSError) as error:
        remedy = PACKAGES.get(protocol, "install the fsspec package of that protocol")
        raise ValueError(f"{url}: {protocol}:// cannot be used here ({text_of(error)}); {remedy}") from None
    if protocol in ("s3", "s3a"):
        fs.retries = 1
    return fs, path.rstrip("/")


class _Pieces(io.RawIOBase):
    """The bytes of a remote file, each piece asked for on its own: a connection that breaks costs only that piece."""

    def __init__(self, store: "RemoteStore", name: str, size: int) -> None:
        self._store, self._name, self._size, self._position = store, name, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = offset + (0, self._position, self._size)[whence]
        return self._position

    def readinto(self, buffer: Any) -> int:
        data = self._store.read_piece(self._name, self._position, min(self._size, self._position + len(buffer)))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class RemoteStore(Store):
    """A folder of an object store; parts are read whole, and written from a local temporary file.

    piece_options: for the filesystem, where a piece of a file is asked for.
    """

    piece_options: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        self._protocol = url.partition("://")[0]
        self._fs, self._root = filesystem(self.url)

    def __reduce__(self) -> tuple:
        return RemoteStore, (self.url,)  # a filesystem's threads and connections stay in their process

    def path(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"{self.url}: {name!r} is not a name inside this folder")
        return f"{self._root}/{name}" if name else self._root

    def _ask(self, name: str, call: Callable[[str], T], may_ask: Callable[[], None] = lambda: None) -> T:
        """may_ask: before each try, since the tries may outlast a lease."""
        path = self.path(name)
        return asked_again(lambda: call(path), self.where(name), may_ask)

    def read(self, name: str) -> bytes:
        return self._ask(name, self._fs.cat_file)

    def buffer(self, name: str) -> pa.Buffer:
        return pa.py_buffer(self.read(name))

    def open(self, name: str) -> pa.NativeFile:
        size = self.size(name)
        if size is None:
            raise FileNotFoundError(f"{self.where(name)}: no such file")
        return pa.PythonFile(io.BufferedReader(_Pieces(self, name, size), READ_BYTES), mode="r")

    def fill(self, name: str, pieces: list[tuple[int, memoryview]]) -> None:
        def read(piece: tuple[int, memoryview]) -> None:
            offset, into = piece
            into[:] = self.read_piece(name, offset, offset + len(into))

        if len(pieces) == 1:
            read(pieces[0])
        else:
            with ThreadPoolExecutor(8) as pool:  # the answers are waited for side by side
                list(pool.map(read, pieces))

    def read_piece(self, name: str, start: int, stop: int) -> bytes:
        """Bytes start .. stop - 1 of a file."""

        def piece(path: str) -> bytes:
            data = self._fs.cat_file(path, start=start, end=stop, **self.piece_options)
            if len(data) != stop - start:
                raise OSError(f"{len(data)} bytes came instead of {stop - start}")
            return data

        return self._ask(name, piece) if start < stop else b""

    def _list(self, folder: str, kind: str) -> list[dict]:
        """What is directly in a folder of one kind, file or directory."""

        def entries(path: str) -> list[dict]:
            try:
                return self._fs.ls(path, detail=True, **self._refresh())
            except FileNotFoundError as error:
                if answer_of(error)[0] == "NoSuchBucket":
                    raise
                return []

        return [entry for entry in self._ask(folder, entries) if entry["type"] == kind]

    def sizes(self, folder: str = "") -> dict[str, int]:
        files = {entry["name"]: entry["size"] for entry in self._list(folder, "file")}
        return {name.rsplit("/", 1)[-1]: size for name, size in files.items() if not name.endswith("/")}

    def names(self, folder: str = "") -> list[str]:
        return sorted(self.sizes(folder))

    def folders(self, folder: str = "") -> list[str]:
        found = {entry["name"].rstrip("/") for entry in self._list(folder, "directory")}
        found -= {self.path(folder)}  # which consoles of stores put into it
        return sorted(name.rsplit("/", 1)[-1] for name in found)

    def used_bytes(self) -> int:
        return sum(self.sizes().values())

    def version(self, name: str) -> str:
        return self._ask(name, self._fs.ukey)

    def _refresh(self) -> dict[str, bool]:
        return {"refresh": True} if self._protocol in ("s3", "s3a") else {}

    def size(self, name: str) -> int | None:
        def size(path: str) -> int | None:
            try:
                entry = self._fs.info(path, **self._refresh())
            except FileNotFoundError as error:
                if answer_of(error)[0] == "NoSuchBucket":
                    raise
                return None
            return None if entry["type"] == "directory" else entry["size"]

        return self._ask(name, size)

    def create(self, name: str, data: bytes, kind: str = "") -> None:
        require_writable(self.url)
        try:
            if self._protocol in CONDITIONAL_PUT:
                self._ask(name, lambda path: self._fs.pipe_file(path, data, mode="create"))
            else:
                self._create_by_rename(name, data)
        except Exception as error:
            if not exists_already(error):
                raise
            # an answer that was lost makes us ask for what we have done already
            if self._read_if_there(name) != data:
                raise FileExistsError(f"{self.where(name)}: exists already") from None
        if kind:
            crash_point(f"{kind}.published")

    def _create_by_rename(self, name: str, data: bytes) -> None:
        folder, slash, last = name.rpartition("/")
        temporary = f"{folder}{slash}.{last}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"

        def rename(path: str) -> None:
            if self._fs.exists(path):
                raise FileExistsError(self.where(name))
            try:
                self._fs.mv(self.path(temporary), path)
            except Exception:
                if self._fs.exists(path):  # refused, or done by us and the answer lost
                    raise FileExistsError(self.where(name)) from None
                raise

        self._ask(folder, lambda path: self._fs.makedirs(path, exist_ok=True))
        try:
            self.replace(temporary, data)
            self._ask(name, rename)
        finally:
            self.delete(temporary)

    def replace(self, name: str, data: bytes) -> None:
        require_writable(self.url)
        self._ask(name, lambda path: self._fs.pipe_file(path, data))

    @contextlib.contextmanager
    def space_errors(self, name: str, needed: int) -> Iterator[None]:
        """What is full is not the store but the folder of local temporary files, on this machine."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE:
                raise
            folder = tempfile.gettempdir()
            raise NoTemporarySpace(
                error.errno,
                f"{folder} on {socket.gethostname()}: no room for the temporary file of {self.where(name)} "
                f"({os.strerror(error.errno or 0)}): needs about {needed:,} bytes, {shutil.disk_usage(folder).free:,} are free; "
                "nothing was committed; free some, or set TMPDIR to a larger folder there",
            ) from None

    def temporary(self, name: str) -> Path:
        return Path(tempfile.gettempdir()) / f"{_local_prefix()}{os.getpid()}-{secrets.token_hex(4)}-{Path(name).name}"

    def publish(self, temporary: Path, name: str, kind: str = "part") -> str:
        try:
            data = temporary.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)
        self.create(name, data, kind)
        with contextlib.suppress(FileNotFoundError):  # another process has deleted it
            version = self.version(name)  # asked for first: these bytes, or later ones, are what it says
            if self.read(name) == data:  # what the store keeps is what was hashed here
                return version
        # not deleted: it may be another driver's by now; without a record the next attempt replaces it
        raise OtherBytes(f"{self.where(name)}: the store gives back other bytes than were written; run again")

    def _read_if_there(self, name: str) -> bytes | None:
        try:
            return self.read(name)
        except FileNotFoundError:
            return None

    def delete(self, name: str, may_delete: Callable[[], None] = lambda: None) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(name, self._fs.rm_file, may_delete)

    def move(self, name: str, to: str) -> None:
        self.replace(to, self.read(name))
        self.delete(name)

    def put(self, temporary: Path, name: str) -> None:
        try:
            require_writable(self.url)
            self._ask(name, lambda path: self._fs.put_file(str(temporary), path))
        finally:
            temporary.unlink(missing_ok=True)

    def upload(self, path: Path, name: str, may_write: Callable[[], None] = lambda: None) -> None:
        """Copy a local file, never whole in memory, replacing what is there. may_write: raises where this process must not."""
        require_writable(self.url)
        options: dict[str, int] = {}
        if self._protocol in ("s3", "s3a"):  # ten parts at a time are in memory, and there are at most 10,000
            options["chunksize"] = max(PART_BYTES, -(-path.stat().st_size // 9000))
        target = self.path(name)
        asked_again(lambda: self._fs.put_file(str(path), target, **options), self.where(name), may_write, UPLOADS)

    def remove(self, folder: str = "", may_delete: Callable[[], None] = lambda: None) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._ask(folder, lambda path: self._fs.rm(path, recursive=True), may_delete)

    def clean(self, folder: str = "") -> None:
        super().clean(folder)
        for path in Path(tempfile.gettempdir()).glob(f"{_local_prefix()}*"):
            pid = path.name.removeprefix(_local_prefix()).partition("-")[0]
            if pid.isdigit() and not _alive(int(pid)):
                with contextlib.suppress(PermissionError):
                    path.unlink(missing_ok=True)


def _local_prefix() -> str:
    """What the local temporary files of this machine, or container, begin with: process ids are its own."""
    try:
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        namespace = socket.gethostname()
    return f"remit-{os.getuid()}-{''.join(filter(str.isalnum, namespace))}-"


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True
