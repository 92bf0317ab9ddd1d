"""The files of a corpus: what paths, globs, folders, URLs and names of Hugging Face datasets stand for."""

import glob
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from scorer.formats import TOKENS, format_of, text_of_path
from scorer.hf_datasets import HUB, Shard, find_shards
from scorer.listing import Listing, list_local, list_remote
from scorer.tokens.beside import find_beside
from shards.store import is_remote, open_store

TEXT_BYTES_PER_STAGED_BYTE = 2.5  # plain text against its token ids in zstd; for the estimate of the disk's need
INFLATION = {"gzip": 3.0, "zstd": 3.5, "bzip2": 4.0, "xz": 4.5, ".parquet": 2.5}


@dataclass(frozen=True)
class Source:
    """One corpus file. location: its path or URL, or None where it is the hub's; name: what the manifest calls it.

    listed_size, listed_version: as an object store listed them, which saves a request for each of many files. shard:
    what `datasets` reads; None for a file that is read by itself. beside: files that say more about one of tokens.
    """

    name: str
    location: str | None
    listed_size: int | None = None
    shard: Shard | None = None
    listed_version: str | None = None
    beside: tuple[str, ...] = ()

    @property
    def where(self) -> str:
        """What messages call it."""
        return text_of_path(self.location or self.name)

    @property
    def format(self) -> tuple[str, str]:
        """Format and codec, as format_of gives them."""
        assert self.location is not None
        found = format_of(self.location) or format_of(os.path.realpath(self.location))  # a link may have no suffix
        assert found is not None
        return found

    def open(self) -> pa.NativeFile:
        """The file's bytes, to read from front to back or at any place."""
        assert self.location is not None
        if is_remote(self.location):
            folder, _, name = self.location.rpartition("/")
            return open_store(folder).open(name)
        return pa.OSFile(os.fsencode(self.location))

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
                raise ValueError(f"{self.where}: changed since it was listed; run again when nothing writes to it")
        return digest.hexdigest()

    def sha256_beside(self) -> dict[str, str] | None:
        """sha256 of each file beside it, by its name without the folder; None where there are none."""
        found = {}
        for location in self.beside:
            sha256 = Source(location, location).sha256()
            assert sha256 is not None
            found[text_of_path(location.rpartition("/")[2])] = sha256
        return found or None

    def version(self) -> str:
        """What a store changes with every write to the file; empty where only the bytes can tell."""
        if self.location is None or not is_remote(self.location):
            return ""
        folder, _, name = self.location.rpartition("/")
        return open_store(folder).version(name)


@dataclass(frozen=True)
class Corpus:
    """The files of a corpus in order. passed_over: by kind, how many others were found; note: a line about them."""

    sources: list[Source]
    passed_over: dict[str, int]
    note: str


def find_sources(corpus: list[str]) -> list[Source]:
    """The files of `corpus`, as find_corpus finds them."""
    return find_corpus(corpus).sources


def find_corpus(corpus: list[str], text_field: str = "text", own: tuple[str, ...] = ()) -> Corpus:
    """Resolve `corpus` to sources, sorted within each glob and folder, in the order given.

    own: folders of the output, which a folder of the corpus may hold. Raises ValueError for a path without a match, an
    unknown suffix, a file that cannot be opened or is there twice.
    """
    listings: list[tuple[str, Listing]] = []
    streamed: list[Source] = []
    ours = {folder if is_remote(folder) else os.path.realpath(folder) for folder in own}
    for entry in corpus:
        if entry.startswith(HUB) and is_remote(entry):
            raise ValueError(
                f"{entry}: is a folder of a dataset, expected the dataset, OWNER/NAME[@REVISION][:CONFIG[:SPLIT]], which pins its "
                "commit and reads its files one by one"
            )
        listing = list_remote(entry, text_field, ours) if is_remote(entry) else list_word(entry, text_field, ours)
        if listing is None:
            streamed += [Source(shard.name, location, shard=shard) for shard, location in find_shards(entry)]
        else:
            listings.append((entry, listing))
    found = [location for _, listing in listings for location in listing.files]
    if listings and not found and not streamed:
        raise ValueError(
            f"{text_of_path(corpus[0])}: only says more about a file of token ids beside it; name that one, and this goes along"
        )
    root, beside = _common_folder(found), find_beside(found)
    sources = [
        Source(
            text_of_path(file[len(root) :].lstrip("/")),
            file,
            listing.sizes.get(file),
            None,
            listing.versions.get(file),
            beside.get(file, ()),
        )
        for _, listing in listings
        for file in listing.files
    ] + streamed
    _require_once(sources)
    left = [(entry, listing) for entry, listing in listings if listing.passed_over]
    total = sum((listing.passed_over for _, listing in left), Counter())
    note = "; ".join(f"{text_of_path(entry)}: {listing.summary()}" for entry, listing in left)
    return Corpus(sources, dict(total), f"passed over {total.total():,} in {note}" if left else "")


def list_word(entry: str, text_field: str, own: set[str]) -> Listing | None:
    """The files on this machine that a word of --corpus stands for, unless it is a URL of an object store.

    None for a dataset: NAME[@REVISION][:CONFIG[:SPLIT]] of the hub, which is not asked, or FOLDER:[CONFIG][:SPLIT].
    own: as of `list_local`. ValueError for a word that is neither.
    """
    if not entry.startswith(HUB):
        listing = list_local(entry.removeprefix("file://"), text_field, own)
        if listing is not None:
            return listing
        _require_dataset(entry)
    return None


def require_known_path(entry: str) -> None:
    """ValueError where a word of --corpus is a path to nothing; globs, folders, URLs and datasets are not looked into."""
    if is_remote(entry) or entry.startswith(HUB) or glob.has_magic(entry):
        return
    path = entry.removeprefix("file://")
    if not os.path.lexists(path):
        if path.endswith("/"):  # no name of a dataset does
            raise ValueError(f"{text_of_path(path)}: no such file or folder; check --corpus")
        list_word(entry, "text", set())


def _require_dataset(entry: str) -> None:
    """ValueError where an entry that is neither file nor pattern cannot be a dataset either."""
    if Path(entry.partition(":")[0]).is_dir():
        return
    # `name` or `user/name` without a file suffix may be a dataset; everything else is a missing file
    if format_of(entry) or entry.startswith((".", "/", "~")) or entry.count("/") > 1:
        raise ValueError(f"{text_of_path(entry)}: no such file; check --corpus")


def _require_once(sources: list[Source]) -> None:
    """ValueError where two sources are one file, if by other names: links to it, or hard links."""
    seen: dict[Any, Source] = {}
    for source in sources:
        identity: Any = source.location or source.name
        if source.location and not is_remote(source.location):
            status = os.stat(source.location)
            # some network filesystems number no files
            identity = (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(source.location)
        other = seen.setdefault(identity, source)
        if other is source:
            continue
        if other.where == source.where:
            raise ValueError(f"{source.where}: is in the corpus twice; name it once")
        raise ValueError(
            f"{other.where} and {source.where}: are one file by two names, which so is in the corpus twice; leave one "
            "of the names out of --corpus, which also takes the files of a folder one by one"
        )


def _common_folder(locations: list[str]) -> str:
    """The longest folder that all locations begin with; empty where paths and URLs are mixed."""
    folder = locations[0].rpartition("/")[0] if locations else ""
    while folder and not all(location.startswith(folder + "/") for location in locations):
        folder = folder.rpartition("/")[0]
    return folder


def staged_estimate(sources: list[Source]) -> float:
    """Bytes that the sources take as token ids on the disk, about."""
    estimate = 0.0
    for source in sources:
        form, codec = format_of(source.location or "") or ("", "")
        if form in TOKENS:  # staged as they are, in 4 bytes
            estimate += 2.0 * (source.size() or 0) * TEXT_BYTES_PER_STAGED_BYTE
        else:
            estimate += (source.size() or 0) * INFLATION.get(codec or form, 1.0)
    return estimate / TEXT_BYTES_PER_STAGED_BYTE
