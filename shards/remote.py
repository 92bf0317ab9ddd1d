"""A folder in an object store or on HDFS, through fsspec: s3:// needs s3fs, gs:// gcsfs, hdfs:// libhdfs.

Not replacing what is there is a conditional put where the store has one (S3 If-None-Match, GCS generation
match) and a rename elsewhere (HDFS refuses to rename onto a file). What is asked of a store that does not
answer is asked again for RETRY_SECONDS.
"""

import os
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import fsspec
import pyarrow as pa
import tenacity

from shards.crash import crash_point
from shards.store import TEMPORARY_SUFFIX, Store

CONDITIONAL_PUT = {"s3", "s3a", "gs", "gcs"}
RETRY_SECONDS = float(os.environ.get("REMIT_STORE_RETRY_SECONDS", 600))
FINAL_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
T = TypeVar("T")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path in it; ValueError where its package is missing."""
    protocol = url.partition("://")[0]
    options: dict[str, Any] = {"use_listings_cache": False}
    try:
        if protocol in ("s3", "s3a"):
            # one endless retry loop, ours, is enough; adaptive ones below it would multiply the waiting
            options["config_kwargs"] = {"retries": {"max_attempts": 2}, "connect_timeout": 10, "read_timeout": 60}
        fs, path = fsspec.core.url_to_fs(url, **options)
    except (ImportError, ValueError) as error:
        package = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}.get(protocol, "the fsspec package of it")
        raise ValueError(
            f"{url}: {protocol}:// cannot be used here ({str(error).splitlines()[0]}); pip install {package}"
        ) from None
    return fs, path.rstrip("/")


def _exists_already(error: BaseException) -> bool:
    text = str(error)
    return isinstance(error, FileExistsError) or "PreconditionFailed" in text or "pre-condition" in text.lower()


def _may_pass(error: BaseException) -> bool:
    """Whether asking again may help: not where the store has answered."""
    if isinstance(error, FINAL_ERRORS) or _exists_already(error):
        return False
    return isinstance(error, Exception) and not isinstance(error, ValueError | TypeError | AssertionError | KeyError)


def asked_again(call: Callable[[], T], seconds: float = RETRY_SECONDS) -> T:
    """The result of `call`, which is made again, ever more slowly, while the store does not answer."""
    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(0.2, max=10),
        stop=tenacity.stop_after_delay(seconds),
        reraise=True,
    )
    return retry(call)


class RemoteStore(Store):
    """A folder of an object store; files are read whole, and written from a local temporary file."""

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

    def read(self, name: str) -> bytes:
        return asked_again(lambda: self._fs.cat_file(self.path(name)))

    def buffer(self, name: str) -> pa.Buffer:
        return pa.py_buffer(self.read(name))

    def open(self, name: str) -> pa.NativeFile:
        return pa.PythonFile(asked_again(lambda: self._fs.open(self.path(name), "rb", block_size=8 << 20)), mode="r")

    def names(self, folder: str = "") -> list[str]:
        def entries() -> list[dict]:
            try:
                return self._fs.ls(self.path(folder), detail=True, **self._refresh())
            except FileNotFoundError:
                return []

        names = [entry["name"] for entry in asked_again(entries) if entry["type"] == "file"]
        return sorted(name.rsplit("/", 1)[-1] for name in names if not name.endswith("/"))

    def _refresh(self) -> dict[str, bool]:
        return {"refresh": True} if self._protocol in ("s3", "s3a") else {}

    def size(self, name: str) -> int | None:
        def size() -> int | None:
            try:
                return self._fs.info(self.path(name), **self._refresh())["size"]
            except FileNotFoundError:
                return None

        return asked_again(size)

    def create(self, name: str, data: bytes, kind: str = "") -> None:
        try:
            if self._protocol in CONDITIONAL_PUT:
                asked_again(lambda: self._fs.pipe_file(self.path(name), data, mode="create"))
            else:
                self._create_by_rename(name, data)
        except Exception as error:
            if not _exists_already(error):
                raise
            # an answer that was lost makes us ask for what we have done already
            if self.read(name) != data:
                raise FileExistsError(f"{self.where(name)}: exists already") from None
        if kind:
            crash_point(f"{kind}.published")

    def _create_by_rename(self, name: str, data: bytes) -> None:
        folder, _, last = self.path(name).rpartition("/")
        temporary = f"{folder}/.{last}.{secrets.token_hex(8)}{TEMPORARY_SUFFIX}"
        asked_again(lambda: self._fs.makedirs(folder, exist_ok=True))
        asked_again(lambda: self._fs.pipe_file(temporary, data))
        try:
            if self.size(name) is not None:
                raise FileExistsError(self.where(name))
            self._fs.mv(temporary, self.path(name))
        except OSError:
            if self.size(name) is not None:
                raise FileExistsError(self.where(name)) from None
            raise
        finally:
            if self._fs.exists(temporary):
                self._fs.rm_file(temporary)

    def replace(self, name: str, data: bytes) -> None:
        asked_again(lambda: self._fs.pipe_file(self.path(name), data))

    def temporary(self, name: str) -> Path:
        return Path(tempfile.gettempdir()) / f"remit-{os.getpid()}-{secrets.token_hex(4)}-{Path(name).name}"

    def publish(self, temporary: Path, name: str, kind: str = "part") -> None:
        try:
            data = temporary.read_bytes()
        finally:
            temporary.unlink(missing_ok=True)
        self.create(name, data, kind)
        if self.read(name) != data:  # what the store keeps is what was hashed here
            self.delete(name)
            raise OSError(f"{self.where(name)}: the store gives back other bytes than were written; run again")

    def delete(self, name: str) -> None:
        def delete() -> None:
            try:
                self._fs.rm_file(self.path(name))
            except FileNotFoundError:
                pass

        asked_again(delete)

    def move(self, name: str, to: str) -> None:
        self.replace(to, self.read(name))
        self.delete(name)

    def put(self, temporary: Path, name: str) -> None:
        try:
            asked_again(lambda: self._fs.put_file(str(temporary), self.path(name)))
        finally:
            temporary.unlink(missing_ok=True)

    def remove(self, folder: str = "") -> None:
        try:
            asked_again(lambda: self._fs.rm(self.path(folder), recursive=True))
        except FileNotFoundError:
            pass
