"""Files of a folder, on a local or shared filesystem or (shards/remote.py) in an object store.

In: the folder's path or URL. Out: reads, and writes that are durable and whole: a file is there with all of
its bytes or not at all, and `create` and `publish` never replace what is there.
"""

import errno
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pyarrow as pa

from shards.crash import crash_point
from shards.publish import TEMPORARY_SUFFIX, fsync_folder, give_name, temporary_name

NO_SPACE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
HUB = "hf://"
HUB_IS_READ = "{}: the hub is only read; write to a folder here or in an object store, then remit push it"


def open_store(folder: "str | Path | Store") -> "Store":
    """The store of a path or URL (s3://, gs://, hdfs:// and whatever else fsspec knows; hf:// to read)."""
    if isinstance(folder, Store):
        return folder
    if str(folder).startswith(HUB):
        from shards.hub import HubStore

        return HubStore(str(folder))
    if is_remote(folder):
        from shards.remote import RemoteStore

        return RemoteStore(str(folder))
    return LocalStore(folder)


def is_remote(folder: "str | Path") -> bool:
    """Whether a --corpus, --shards or --out is a URL rather than a path; hf://NAME of a --corpus is a dataset."""
    return "://" in str(folder) and not str(folder).startswith("file://") and not is_dataset(folder)


def is_dataset(word: "str | Path") -> bool:
    """Whether hf:// stands in front of a dataset's name, and not of a folder in one (hf://datasets/)."""
    return str(word).startswith(HUB) and not str(word).startswith(f"{HUB}datasets/")


def absolute(folder: "str | Path") -> str:
    """The same folder for processes with another working directory."""
    path = str(folder).removeprefix("file://")
    return path if is_remote(folder) or is_dataset(folder) else str(Path(path).absolute())


class Store:
    """A folder. Names are relative to it, with `/` between folders; url is what messages call it."""

    url: str
    local: Path | None = None

    def where(self, name: str) -> str:
        """Full name of a file, for messages."""
        return f"{self.url}/{name}"

    def read(self, name: str) -> bytes:
        """All bytes of a file; FileNotFoundError where there is none."""
        raise NotImplementedError

    def buffer(self, name: str) -> pa.Buffer:
        """All bytes of a file, mapped where it is local, else in memory; FileNotFoundError."""
        raise NotImplementedError

    def open(self, name: str) -> pa.NativeFile:
        """A file for reads at random places; FileNotFoundError."""
        raise NotImplementedError

    def fill(self, name: str, pieces: list[tuple[int, memoryview]]) -> None:
        """Read into each of these places in memory, from the offset beside it on, and nothing else of the file.

        FileNotFoundError, and EOFError where the file ends before. Any number of threads may read at once.
        """
        raise NotImplementedError

    def names(self, folder: str = "") -> list[str]:
        """Sorted names of the files directly in `folder`, without it; none where it does not exist."""
        raise NotImplementedError

    def folders(self, folder: str = "") -> list[str]:
        """The same of the folders in it."""
        raise NotImplementedError

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Names and sizes in bytes of the files directly in `folder`, where one request tells all; else nothing."""
        return {}

    def size(self, name: str) -> int | None:
        """Bytes of a file, None where there is none."""
        raise NotImplementedError

    def used_bytes(self) -> int:
        """Bytes of the files directly in the folder."""
        return sum(self.size(name) or 0 for name in self.names())

    def version(self, name: str) -> str:
        """What changes with every write to a file, empty where there is no such thing; FileNotFoundError."""
        return ""

    def create(self, name: str, data: bytes, kind: str = "") -> None:
        """A new file; FileExistsError where there is one already. kind: names its crash points."""
        raise NotImplementedError

    def replace(self, name: str, data: bytes) -> None:
        """A new file, or new content at once for an old one."""
        raise NotImplementedError

    def temporary(self, name: str) -> Path:
        """A local file to write before `publish`; no reader looks at it and no other process uses it."""
        raise NotImplementedError

    def publish(self, temporary: Path, name: str, kind: str = "part") -> str:
        """Give a finished temporary file its name; FileExistsError where it is taken. The temporary file goes.

        Returns what `version` says of the file that has these bytes.
        """
        raise NotImplementedError

    def put(self, temporary: Path, name: str) -> None:
        """Give a finished temporary file its name, replacing what is there."""
        raise NotImplementedError

    def sha256(self, name: str) -> str:
        """Hexadecimal sha256 of a file, read in pieces."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while data := file.read(1 << 22):
                digest.update(data)
        return digest.hexdigest()

    def delete(self, name: str, may_delete: Callable[[], None] = lambda: None) -> None:
        """Remove a file; nothing happens where there is none. may_delete: raises where this process must not."""
        raise NotImplementedError

    def move(self, name: str, to: str) -> None:
        """Rename a file, replacing what is there."""
        raise NotImplementedError

    def remove(self, folder: str = "", may_delete: Callable[[], None] = lambda: None) -> None:
        """Remove a folder with all that is in it, or everything. may_delete: raises where this process must not."""
        raise NotImplementedError

    def clean(self, folder: str = "") -> None:
        """Remove temporary files that dead processes left."""
        for name in self.names(folder):
            if name.startswith(".") and name.endswith(TEMPORARY_SUFFIX):
                self.delete(f"{folder}/{name}" if folder else name)

    def free_bytes(self) -> int | None:
        """Free bytes, None where there is no such bound."""
        return None

    def require_free(self, needed: int, what: str) -> None:
        """OSError unless `needed` bytes are free."""
        free = self.free_bytes()
        if free is not None and free < needed:
            raise OSError(
                errno.ENOSPC,
                f"{self.url}: {what} needs about {needed:,} bytes, {free:,} are free; free some or choose another --out",
            )

    @contextmanager
    def space_errors(self, name: str, needed: int) -> Iterator[None]:
        """Turn "no space left" into a message with path, needed and free bytes."""
        try:
            yield
        except OSError as error:
            if error.errno not in NO_SPACE or "are free" in str(error):
                raise
            free = self.free_bytes()
            raise OSError(
                errno.ENOSPC,
                f"{self.where(name)}: could not be written ({os.strerror(error.errno or 0)}): needs about {needed:,} "
                f"bytes, {'an unknown number of' if free is None else format(free, ',')} are free; nothing was "
                "committed; free some and run the same command again",
            ) from None


class LocalStore(Store):
    """A folder of a local or shared filesystem."""

    def __init__(self, folder: Path | str) -> None:
        self.local = Path(str(folder).removeprefix("file://")).absolute()
        self.url = str(folder)

    def path(self, name: str) -> Path:
        """Path of a file; ValueError where it, or a folder on the way to it, is a symbolic link."""
        assert self.local is not None
        path = self.local
        for piece in Path(name).parts:
            path = path / piece
            if path.is_symlink():
                raise ValueError(
                    f"{path}: is a symbolic link, which a shard folder must not hold; replace it by the file it means"
                )
        return path

    def read(self, name: str) -> bytes:
        return self.path(name).read_bytes()

    def buffer(self, name: str) -> pa.Buffer:
        with pa.memory_map(str(self.path(name))) as file:
            return file.read_buffer()

    def open(self, name: str) -> pa.NativeFile:
        return pa.OSFile(str(self.path(name)))

    def fill(self, name: str, pieces: list[tuple[int, memoryview]]) -> None:
        with open(self.path(name), "rb", buffering=0) as file:
            for offset, into in pieces:
                while len(into):
                    count = os.preadv(file.fileno(), [into], offset)
                    if not count:
                        raise EOFError(f"the file ends at byte {offset:,}, {len(into):,} bytes too early")
                    into, offset = into[count:], offset + count

    def names(self, folder: str = "") -> list[str]:
        return self._entries(folder, are_folders=False)

    def folders(self, folder: str = "") -> list[str]:
        return self._entries(folder, are_folders=True)

    def _entries(self, folder: str, are_folders: bool) -> list[str]:
        try:
            with os.scandir(self.path(folder)) as entries:
                return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False) == are_folders)
        except FileNotFoundError:
            return []

    def size(self, name: str) -> int | None:
        try:
            return self.path(name).stat().st_size
        except FileNotFoundError:
            return None

    def create(self, name: str, data: bytes, kind: str = "") -> None:
        temporary = self._write(self.path(name), data)
        if kind:
            crash_point(f"{kind}.written")
        self.publish(temporary, name, kind)

    def replace(self, name: str, data: bytes) -> None:
        final = self.path(name)
        temporary = self._write(final, data)
        os.replace(temporary, final)
        fsync_folder(final.parent)

    def _write(self, final: Path, data: bytes) -> Path:
        temporary = self.temporary(str(final))
        try:
            with self.space_errors(str(final), len(data)), self._new(temporary) as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        return temporary

    def _new(self, temporary: Path) -> IO[bytes]:
        try:
            return open(temporary, "wb")
        except FileNotFoundError:  # a driver that ended just now took its empty folder away
            temporary.parent.mkdir(parents=True, exist_ok=True)
            return open(temporary, "wb")

    def temporary(self, name: str) -> Path:
        assert self.local is not None
        final = self.local / name
        final.parent.mkdir(parents=True, exist_ok=True)
        return temporary_name(final)

    def publish(self, temporary: Path, name: str, kind: str = "part") -> str:
        final = self.path(name)
        try:
            give_name(temporary, final)
            if kind:
                crash_point(f"{kind}.linked")
        finally:
            temporary.unlink(missing_ok=True)
        fsync_folder(final.parent)
        if kind:
            crash_point(f"{kind}.published")
        return self.version(name)

    def delete(self, name: str, may_delete: Callable[[], None] = lambda: None) -> None:
        may_delete()
        self.path(name).unlink(missing_ok=True)

    def move(self, name: str, to: str) -> None:
        source, target = self.path(name), self.path(to)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(source, target)
        fsync_folder(source.parent)
        fsync_folder(target.parent)

    def put(self, temporary: Path, name: str) -> None:
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, self.path(name))
        fsync_folder(self.path(name).parent)

    def remove(self, folder: str = "", may_delete: Callable[[], None] = lambda: None) -> None:
        may_delete()
        shutil.rmtree(self.path(folder), ignore_errors=True)

    def free_bytes(self) -> int | None:
        assert self.local is not None
        existing = next(path for path in (self.local, *self.local.parents) if path.exists())
        return shutil.disk_usage(existing).free
