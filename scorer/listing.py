"""The files that a path, glob, folder or URL of --corpus stands for, and what of them a corpus cannot have.

In: an entry of --corpus. Out: where its files are, in an order that is the same for a folder and its copy in an
object store; how many files were passed over, by kind.
"""

import glob
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

from scorer import formats
from scorer.formats import EXPECTED, HEAD_BYTES, HIDDEN, fault_of_name, format_of, suffix_of, text_of_path
from scorer.tokens.beside import MASK, kind_of, lacks_index, owner_of, stands_beside
from shards.asking import asked_again
from shards.store import open_store

CACHE = "cache-"  # files in which `datasets` keeps what it computed, beside those of the dataset
HIDDEN_KIND = "hidden"
HEADS_AT_ONCE = 16  # first bytes of .json files in an object store


@dataclass
class Listing:
    """sizes, versions: as an object store listed them. passed_over: files by kind; example: the first of each kind."""

    files: list[str] = field(default_factory=list)
    sizes: dict[str, int] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    passed_over: Counter[str] = field(default_factory=Counter)
    example: dict[str, str] = field(default_factory=dict)

    def leave(self, kind: str, name: str) -> None:
        self.passed_over[kind] += 1
        self.example.setdefault(kind, name)

    def summary(self) -> str:
        """What was passed over, the most frequent first: .txt (40), .csv (8), README."""
        kinds = sorted(self.passed_over, key=lambda kind: (-self.passed_over[kind], kind))
        parts = []
        for kind in kinds[:8]:
            count, name = self.passed_over[kind], text_of_path(self.example[kind])
            parts.append(f"{kind} ({name})" if count == 1 else f"{kind} ({count:,}, such as {name})")
        return ", ".join(parts) + (f" and {len(kinds) - 8} kinds more" if len(kinds) > 8 else "")


def list_local(entry: str, text_field: str, own: set[str]) -> Listing | None:
    """What a path or glob stands for, None where it is neither, but perhaps a dataset; paths are absolute, links in them as the user named
    them. own: folders of the output, which are no corpus. ValueError for a path that cannot be read."""
    listing = Listing()
    if os.path.isdir(entry):
        _walk(listing, absolute(entry), "", text_field, own, frozenset())
        what = "folder without corpus files"
    elif os.path.lexists(entry):
        path = absolute(entry)
        _require_readable(path)
        if stands_beside(path, os.path.exists):  # as a shell writes out ids/*: it goes with its file
            return listing
        _refuse_lone_mask(path)
        if format_of(path) is None and format_of(os.path.realpath(path)) is None:
            raise ValueError(f"{text_of_path(path)}: {fault_of_name(path)}")
        fault = _json_fault(path, None)
        if fault:
            raise ValueError(f"{text_of_path(path)}: {fault}")
        listing.files.append(path)
    elif os.path.isdir(entry.partition(":")[0]):  # with a config or split: what `datasets` finds in the folder
        return None
    elif glob.has_magic(entry):
        matches = sorted(glob.glob(entry, recursive=True), key=lambda match: Path(match).parts)
        if not matches:
            raise ValueError(f"{text_of_path(entry)}: no file matches this pattern; check --corpus")
        for match in matches:
            path = absolute(match)
            if os.path.isdir(path):
                listing.leave("folder", match)
            else:
                _take(listing, path, match, text_field)
        what = f"{len(matches):,} files match" if len(matches) != 1 else "1 file matches"
        what += ", none of them a corpus file"
    else:
        return None
    if not listing.files:
        has = f" (there are {listing.summary()})" if listing.passed_over else ""
        config = (
            f", or {text_of_path(entry)}:CONFIG:SPLIT for one that `datasets` opens" if os.path.isdir(entry) else ""
        )
        raise ValueError(f"{text_of_path(entry)}: {what}{has}; expected some of {EXPECTED}{config}")
    return listing


def _refuse_lone_mask(name: str) -> None:
    """ValueError for a mask that was named, with no file of tokens beside it: its bytes are no ids."""
    if kind_of(name) == MASK:
        raise ValueError(
            f"{text_of_path(name)}: is a mask of what is to be predicted, by its name, and "
            f"{' or '.join(one.rpartition('/')[2] for one in map(text_of_path, owner_of(name)))} with the ids is not there; fetch that "
            "and name it, or give this file another name if it has ids"
        )


def absolute(path: str) -> str:
    """An absolute path without `..` that keeps the names of links: what they point to may be called otherwise."""
    parts = Path(path).absolute().parts
    last = max((index for index, part in enumerate(parts) if part == ".."), default=0)
    # `..` after a link is not the folder before it, so what is up to there is resolved
    above = os.path.realpath(os.path.join(*parts[: last + 1])) if last else parts[0]
    return os.path.join(above, *parts[last + 1 :])


def _walk(
    listing: Listing, folder: str, below: str, text_field: str, own: set[str], above: frozenset[tuple[int, int]]
) -> None:
    """Add the files of `folder`, called `below` from where the walk began. above: folders on the way to it, by
    device and inode, since links may lead back to one."""
    status = os.stat(folder)
    above |= {(status.st_dev, status.st_ino)}
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ValueError(f"{text_of_path(folder)}: cannot be listed ({error.strerror}); make it readable") from None
    for name in names:
        path, shown = os.path.join(folder, name), f"{below}{name}"
        if os.path.isdir(path) and os.path.realpath(path) in own:
            continue
        if name.startswith(HIDDEN):
            listing.leave(HIDDEN_KIND, shown)
        elif os.path.isdir(path):
            status = os.stat(path)
            if (status.st_dev, status.st_ino) in above:
                listing.leave("link to a folder above it", shown)
            else:
                _walk(listing, path, f"{shown}/", text_field, own, above)
        else:
            _take(listing, path, shown, text_field)


def _take(listing: Listing, path: str, shown: str, text_field: str) -> None:
    """Add a file of a folder or glob, or say why not."""
    kind = _kind_left(path, os.path.exists)
    if kind is not None:
        if kind:
            listing.leave(kind, shown)
        return
    _require_readable(path)
    fault = _json_fault(path, text_field)
    if fault:
        listing.leave(".json without an object a line", shown)
    else:
        listing.files.append(path)


def _kind_left(name: str, exists: Callable[[str], bool]) -> str | None:
    """As what a file of a folder or glob is passed over, "" where it belongs to another file, None where it is taken."""
    if stands_beside(name, exists):
        return ""
    if format_of(name) is None:
        return suffix_of(name)
    if kind_of(name) == MASK:
        return "mask without token ids"
    if lacks_index(name, exists):
        return ".bin without .idx"
    is_cache = name.rpartition("/")[2].startswith(CACHE) and name.endswith(".arrow")
    return "cache of datasets" if is_cache else None


def _require_readable(path: str) -> None:
    """ValueError or OSError where `path` is not a file that can be opened: better now than after hours."""
    if os.path.islink(path) and not os.path.exists(path):
        raise ValueError(
            f"{text_of_path(path)}: is a link to {text_of_path(os.readlink(path))}, which does not exist; fetch that "
            "file, or remove the link"
        )
    if not os.path.isfile(path):
        raise ValueError(f"{text_of_path(path)}: is not a regular file; write its content to one")
    try:
        open(path, "rb").close()
    except OSError as error:
        raise ValueError(f"{text_of_path(path)}: cannot be opened ({error.strerror}); make it readable") from None


def _json_fault(path: str, text_field: str | None) -> str | None:
    if format_of(path) != (".json", ""):
        return None
    with open(path, "rb") as file:
        head = file.read(HEAD_BYTES)
        return _fault(head, not file.read(1), text_field)


def _fault(head: bytes, whole: bool, text_field: str | None) -> str | None:
    """text_field: what one object alone must have, since folders of a corpus also hold .json with figures."""
    fault = formats.fault_of_json(head, whole)
    if fault is None and text_field is not None and whole and formats.lacks_field(head, text_field):
        return f"has no field {text_field!r}"
    return fault


# --- object stores ---------------------------------------------------------------------------------------


def list_remote(entry: str, text_field: str, own: set[str]) -> Listing:
    """What a URL or a glob of one stands for: the same files in the same order as of a local folder."""
    from shards.remote import filesystem

    fs, path = filesystem(entry)
    protocol = entry.partition("://")[0]
    listing = Listing()
    if glob.has_magic(path):
        found = asked_again(lambda: fs.glob(path, detail=True), entry)
        literal = next(index for index, part in enumerate(path.split("/")) if glob.has_magic(part))
        # a glob says nothing of names with a dot, as in a shell, and takes those with _
        found = {name: what for name, what in found.items() if "/." in path or not _hidden(name, literal, (".",))}
        folder = False
    else:
        found = asked_again(lambda: fs.find(path, detail=True), entry)  # the file itself, or all below a folder
        literal, folder = len(path.split("/")), list(found) != [path]
        if not folder:
            if stands_beside(path, _names_there(fs, [])):
                return listing
            _refuse_lone_mask(path)
            if format_of(path) is None:
                raise ValueError(f"{entry}: {fault_of_name(path)}")
    owned = tuple(url.partition("://")[2] + "/" for url in own if url.startswith(f"{protocol}://"))
    names = [
        name
        for name in found
        if found[name]["type"] == "file" and not name.endswith("/") and not name.startswith(owned)
    ]
    shown = {name: "/".join(name.split("/")[literal:]) or name.rpartition("/")[2] for name in names}
    hidden = {_hidden(name, literal, HIDDEN) for name in names if folder} - {""}
    for name in sorted(hidden):
        listing.leave(HIDDEN_KIND, "/".join(name.split("/")[literal:]))
    names = [name for name in names if not folder or not _hidden(name, literal, HIDDEN)]
    there = _names_there(fs, names if folder or glob.has_magic(path) else [])
    for name in sorted(names, key=lambda name: name.split("/")):
        kind = _kind_left(name, there) if folder or glob.has_magic(path) else None
        if kind is not None:
            if kind:
                listing.leave(kind, shown[name])
        else:
            url = f"{protocol}://{name}"
            listing.files.append(url)
            listing.sizes[url] = found[name]["size"]
            listing.versions[url] = str(found[name].get("ETag") or "")
    for url in _without_lines(listing, text_field if folder or glob.has_magic(path) else None, entry):
        listing.files.remove(url)
        listing.leave(".json without an object a line", shown[url.partition("://")[2]])
    for name in (name for name in found if found[name]["type"] == "directory" and not folder):
        listing.leave("folder", name)
    if not listing.files:
        has = f" (there are {listing.summary()})" if listing.passed_over else ""
        raise ValueError(f"{entry}: no corpus file there{has}; expected some of {EXPECTED}")
    return listing


def _names_there(fs: Any, names: list[str]) -> Callable[[str], bool]:
    """Says whether a file of an object store is there; the folder of one that is not among `names` is listed once."""
    known = set(names)

    @lru_cache(maxsize=256)
    def in_folder(folder: str) -> frozenset[str]:
        return frozenset(asked_again(lambda: fs.ls(folder, detail=False), folder))

    return lambda name: name in known or name in in_folder(name.rpartition("/")[0])


def _hidden(name: str, literal: int, first: tuple[str, ...]) -> str:
    """The part of `name` up to the first folder or file below place `literal` that is hidden, "" where none is."""
    parts = name.split("/")
    for index in range(literal, len(parts)):
        if parts[index].startswith(first):
            return "/".join(parts[: index + 1])
    return ""


def _without_lines(listing: Listing, text_field: str | None, entry: str) -> Iterator[str]:
    """URLs of .json files without an object a line; ValueError where one was named (text_field None)."""

    def fault(url: str) -> str | None:
        folder, _, name = url.rpartition("/")
        size = listing.sizes[url]
        head = open_store(folder).read_piece(name, 0, min(size, HEAD_BYTES))  # type: ignore[attr-defined]
        return _fault(head, size <= HEAD_BYTES, text_field)

    urls = [url for url in listing.files if format_of(url) == (".json", "")]
    with ThreadPoolExecutor(HEADS_AT_ONCE) as pool:
        for url, found in zip(urls, list(pool.map(fault, urls))):
            if found and text_field is None:
                raise ValueError(f"{url}: {found}")
            if found:
                yield url
