"""Which corpus files are still those that a folder was packed from, without reading them all again.

In: the sources of a corpus and the hashes in a manifest. Out: the hash of each. What a filesystem or store says of a
file that changes with every write (its stamp) is kept in the user's cache, not in the folder, whose bytes depend on
the corpus alone. A file is read again where its stamp is another or nothing is known.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import time

from scorer.sources import Source
from shards.store import is_remote, temporary_name

RACY_SECONDS = 2  # a file may be written twice within one tick of its filesystem's clock
HASHED_AT_ONCE = 8


def stamp(source: Source) -> str:
    """What changes with every write to a file; empty where nothing does, or where it was written just now.

    Of a local file size, inode and the times of the last change of its bytes and of its inode: the last one follows
    the clock and cannot be set, unlike the other.
    """
    if source.location is None:
        return ""
    if is_remote(source.location):
        return source.listed_version or ""
    status = os.stat(source.location)
    if time() - status.st_ctime <= RACY_SECONDS:
        return ""
    return f"{status.st_size}-{status.st_ino}-{status.st_mtime_ns}-{status.st_ctime_ns}"


def stamps(sources: Sequence[Source]) -> list[str]:
    """The stamps of all sources, to take before they are read."""
    return [stamp(source) for source in sources]


def remember(out: str, sources: Sequence[Source], before: Sequence[str], hashes: Sequence[str | None]) -> None:
    """Keep the stamps of the sources of the folder `out` that are still what they were before they were hashed."""
    kept = {
        source.where: [seen, sha256]
        for source, seen, sha256 in zip(sources, before, hashes)
        if seen and sha256 and stamp(source) == seen
    }
    file = _file(out)
    if file is None or not kept:
        return
    temporary = temporary_name(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        temporary.write_text(json.dumps(kept, indent=0), encoding="utf-8")
        os.replace(temporary, file)
    except OSError:  # then they are read again next time
        temporary.unlink(missing_ok=True)


def hashes_now(out: str, sources: Sequence[Source], packed: Sequence[str | None]) -> list[str | None]:
    """sha256 of each source, `packed` being those that the folder `out` was packed from; None for one of the hub."""
    known = _read(out)
    before = stamps(sources)

    def sha256(index: int) -> str | None:
        source, expected = sources[index], packed[index]
        # what is remembered may confirm a file, never refuse it
        if before[index] and known.get(source.where) == [before[index], expected]:
            return expected
        return source.sha256()

    with ThreadPoolExecutor(min(HASHED_AT_ONCE, os.cpu_count() or 1)) as pool:
        found = list(pool.map(sha256, range(len(sources))))
    if any(seen and known.get(source.where) != [seen, sha256] for source, seen, sha256 in zip(sources, before, found)):
        remember(out, sources, before, found)
    return found


def remembered(out: str, sources: Sequence[Source]) -> list[str | None]:
    """sha256 of each source as it is remembered for `out`, to be confirmed by hashes_now; None where nothing is."""
    known = _read(out)
    return [known[source.where][1] if source.where in known else None for source in sources]


def _file(out: str) -> Path | None:
    """Where the stamps of a folder's corpus are kept, None for a user without a home."""
    try:
        cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remit"
    except RuntimeError:
        return None
    cache = Path(os.environ.get("REMIT_CACHE") or cache)
    return cache / "corpus" / f"{hashlib.sha256(os.fsencode(out)).hexdigest()[:32]}.json"


def _read(out: str) -> dict[str, list[str]]:
    file = _file(out)
    try:
        known = json.loads(file.read_bytes()) if file else {}
    except (OSError, ValueError):
        known = {}
    return known if isinstance(known, dict) else {}
