"""Files between a folder here and one in a store: in pieces, so that none is whole in memory.

`send` runs in a thread that a process does not wait for as it ends, so it has no pool of threads, for which Python would wait;
large files go up in several parts at a time anyway.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath
from typing import TypeVar

from shards.part import sha256_file
from shards.publish import fsync_folder
from shards.store import LocalStore, Store

THREADS = 8
PIECE_BYTES = 16 << 20
Piece = tuple[str, int, int]
"""Name of a file, offset, bytes."""
Item = TypeVar("Item")
T = TypeVar("T")


def send(store: Store, files: Mapping[str, Path], go_on: Callable[[], None] = lambda: None) -> None:
    """Copy local files to `store`, each to the name that it has there, replacing what is there.

    go_on: asked before each try of each file; raises to end it. OSError where the store has not as many bytes afterwards.
    """
    for name, path in files.items():
        upload(store, path, name, go_on)
        size, sent = path.stat().st_size, store.size(name)
        if sent != size:
            raise OSError(f"{store.where(name)}: has {sent} bytes after {size} were written")


def upload(store: Store, path: Path, name: str, may_write: Callable[[], None] = lambda: None) -> None:
    """Copy a local file, never whole in memory, replacing what is there.

    may_write: asked before each try; raises where this process must not.
    """
    if not isinstance(store, LocalStore):
        from shards.remote import RemoteStore  # fsspec takes a while to import

        assert isinstance(store, RemoteStore)
        store.upload(path, name, may_write)
        return
    temporary = store.temporary(name)
    try:
        shutil.copyfile(path, temporary)
        may_write()
        store.put(temporary, name)
    finally:
        temporary.unlink(missing_ok=True)


def receive(
    store: Store,
    folder: str,
    files: Mapping[str, str],
    to: Path,
    told: Callable[[int, int], None] = lambda done, total: None,
) -> str | None:
    """Copy files of `folder` of the store into the local folder `to`; what is wrong with one of them, or None.

    files: the sha256 of each by its name, "" where it is not known. told: the bytes that are here, and all. StoreSilent and
    the like where the store does not give them.
    """
    below = f"{folder}/" if folder else ""
    sizes: dict[str, int] = {}
    for name in files:
        size = store.size(below + name) if is_inside(name) else None
        if size is None:
            return f"{store.where(below + name)}: no such file"
        sizes[name] = size
    pieces: list[Piece] = []
    for name, size in sizes.items():
        path = to / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            file.truncate(size)
        pieces += [(name, offset, min(PIECE_BYTES, size - offset)) for offset in range(0, size, PIECE_BYTES)]

    def fetch(piece: Piece) -> int:
        name, offset, count = piece
        data = bytearray(count)
        store.fill(below + name, [(offset, memoryview(data))])
        with open(to / name, "r+b", buffering=0) as file:
            written = 0
            while written < count:
                written += os.pwrite(file.fileno(), memoryview(data)[written:], offset + written)
        return count

    done, total = 0, sum(sizes.values())
    try:
        for count in _side_by_side(fetch, pieces):
            done += count
            told(done, total)
    except (FileNotFoundError, EOFError) as error:  # it went, or became shorter, meanwhile
        return f"{store.where(folder)}: {error}"

    def check(name: str) -> str:
        return name if _is_other(to / name, files[name]) else ""

    wrong = sorted(filter(None, _side_by_side(check, files)))
    return f"{store.where(below + wrong[0])}: sha256 differs from what was written down" if wrong else None


def is_inside(name: str) -> bool:
    """Whether a relative name leads to a file below its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _is_other(path: Path, sha256: str) -> bool:
    """Bring a file to the disk; whether it has another hash than it should have."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    fsync_folder(path.parent)
    return bool(sha256) and sha256_file(path) != sha256


def _side_by_side(work: Callable[[Item], T], items: Iterable[Item]) -> Iterator[T]:
    """What `work` makes of each item, as it comes; where one fails, those that have not begun are left."""
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="transfer")
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)
