"""The files of a corpus: what paths, globs, folders, URLs and names of Hugging Face datasets stand for."""

import glob
import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from scorer.streamed import HUB, Shard, find_shards
from shards.store import is_remote, open_store

SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")


@dataclass(frozen=True)
class Source:
    """One corpus file. location: its path or URL, or None where it is the hub's; name: what the manifest calls it.

    listed_size: as an object store listed it, which saves a request for each of many files. shard: what `datasets`
    reads; None for a file that is read by itself.
    """

    name: str
    location: str | None
    listed_size: int | None = None
    shard: Shard | None = None

    def open(self) -> pa.NativeFile:
        """The file's bytes, to read from front to back or at any place."""
        assert self.location is not None
        if is_remote(self.location):
            folder, _, name = self.location.rpartition("/")
            return open_store(folder).open(name)
        return pa.OSFile(self.location)

    def size(self) -> int | None:
        """Bytes of the file; None for one of the hub."""
        if self.location is None or self.listed_size is not None:
            return self.listed_size
        with self.open() as file:
            return file.size()

    def sha256(self) -> str | None:
        """sha256 of the file's bytes; None for one of the hub."""
        if self.location is None:
            return None
        digest = hashlib.sha256()
        with self.open() as file:
            while data := file.read(1 << 22):
                digest.update(data)
            if self.listed_size not in (None, file.tell()):
                raise ValueError(f"{self.location}: changed since it was listed; run again when nothing writes to it")
        return digest.hexdigest()

    def version(self) -> str:
        """What a store changes with every write to the file; empty where only the bytes can tell."""
        if self.location is None or not is_remote(self.location):
            return ""
        folder, _, name = self.location.rpartition("/")
        return open_store(folder).version(name)


def find_sources(corpus: list[str]) -> list[Source]:
    """Resolve `corpus` to sources, sorted within each glob and folder, in the order given.

    Raises ValueError for a path without a match, an unknown suffix or a file named twice.
    """
    found: list[str] = []
    sizes: dict[str, int] = {}
    streamed: list[Source] = []
    for entry in corpus:
        matches: list[str] | None
        if is_remote(entry):
            listed = _remote_files(entry)
            sizes |= listed
            matches = list(listed)
        else:
            matches = _files(entry)
        if matches is None:
            streamed += [Source(shard.name, location, shard=shard) for shard, location in find_shards(entry)]
        found += matches or []
    for location in found:
        if not location.endswith(SUFFIXES):
            raise ValueError(f"{location}: not a corpus file; expected one of {', '.join(SUFFIXES)}")
    for location in found:
        if location not in sizes:
            Source("", location).open().close()  # an unreadable file is better found now than after hours
    named = Counter(found + [source.location or source.name for source in streamed])
    if named and max(named.values()) > 1:
        raise ValueError(f"{max(named, key=lambda name: named[name])}: is in the corpus twice; name it once")
    root = _common_folder(found)
    return [Source(location[len(root) :].lstrip("/"), location, sizes.get(location)) for location in found] + streamed


def _files(entry: str) -> list[str] | None:
    """Absolute paths that an entry of --corpus stands for, or None where it must be a dataset."""
    path = Path(entry)
    if entry.startswith(HUB):
        return None
    if path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.name.endswith(SUFFIXES) and file.is_file())
        found = [file for file in found if not any(p.startswith((".", "_")) for p in file.relative_to(path).parts)]
        if not found:
            raise ValueError(
                f"{entry}: folder without corpus files; expected some of {', '.join(SUFFIXES)}, or {entry}:CONFIG:SPLIT "
                "for one that `datasets` opens"
            )
        return [str(file.resolve()) for file in found]
    if path.exists():
        return [str(path.resolve())]
    if Path(entry.partition(":")[0]).is_dir():  # with a config or split: what `datasets` finds in the folder
        return None
    if glob.has_magic(entry):
        matches = sorted(Path(match) for match in glob.glob(entry, recursive=True))
        if not matches:
            raise ValueError(f"{entry}: no file matches this pattern; check --corpus")
        return [str(match.resolve()) for match in matches]
    # `name` or `user/name` without a file suffix may be a dataset; everything else is a missing file
    if entry.endswith(SUFFIXES) or entry.startswith((".", "/", "~")) or entry.count("/") > 1:
        raise ValueError(f"{entry}: no such file; check --corpus")
    return None


def _remote_files(entry: str) -> dict[str, int]:
    """URLs that an entry of --corpus in an object store stands for, with the size of each file."""
    from shards.remote import asked_again, filesystem

    fs, path = filesystem(entry)
    protocol = entry.partition("://")[0]
    if glob.has_magic(path):
        found = asked_again(lambda: fs.glob(path, detail=True), entry)
        literal = next(index for index, part in enumerate(path.split("/")) if glob.has_magic(part))
        hidden: tuple[str, ...] = () if "/." in path else (".",)
    else:
        found = asked_again(lambda: fs.find(path, detail=True), entry)  # the file itself, or all below a folder
        if list(found) != [path]:
            found = {name: entry for name, entry in found.items() if name.endswith(SUFFIXES)}
        literal, hidden = len(path.split("/")), (".", "_")
    # the same files in the same order as from a local folder
    names = [name for name in found if not any(part.startswith(hidden) for part in name.split("/")[literal:])]
    if not names:
        raise ValueError(f"{entry}: no corpus file there; expected some of {', '.join(SUFFIXES)}")
    return {f"{protocol}://{name}": found[name]["size"] for name in sorted(names, key=lambda name: name.split("/"))}


def _common_folder(locations: list[str]) -> str:
    """The longest folder that all locations begin with; empty where paths and URLs are mixed."""
    folder = locations[0].rpartition("/")[0] if locations else ""
    while folder and not all(location.startswith(folder + "/") for location in locations):
        folder = folder.rpartition("/")[0]
    return folder
