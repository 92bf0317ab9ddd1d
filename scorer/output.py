"""What the drivers of pack, score and select do alike with the folder they write: refuse, clean, begin, stop."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from time import monotonic

from scorer.config import Stopped
from shards.crash import crash_point
from shards.folder import TOKENIZER, ShardFolder
from shards.lease import LEASE, Lease, LeaseLost
from shards.manifest import MANIFEST, Manifest
from shards.part import COMMITS
from shards.quarantine import QUARANTINE
from shards.store import Store, is_remote


def absolute(folder: str | Path) -> str:
    """The same folder for processes with another working directory."""
    return str(folder) if is_remote(folder) else str(Path(folder).absolute())


def require_empty(out: Store) -> None:
    """ValueError where `out` holds something that no earlier run of this stage can have left."""
    foreign = [name for name in out.names() if not name.startswith((".", "_"))]
    if out.size(MANIFEST) is None and foreign:
        raise ValueError(
            f"{out.url}: is not empty and not a shard folder (it has {foreign[0]}); choose another --out or empty it"
        )


class StopGuard:
    """Tells a driver loop when to start nothing more, and when to wait no longer."""

    def __init__(self, should_stop: Callable[[], bool], grace_seconds: float) -> None:
        self._should_stop, self._grace_seconds = should_stop, grace_seconds
        self._deadline: float | None = None

    def requested(self) -> bool:
        """Whether a signal came; from the first True on the grace period runs."""
        if self._deadline is None and self._should_stop():
            self._deadline = monotonic() + self._grace_seconds
        return self._deadline is not None

    def check(self, running: int) -> None:
        """Stopped where a signal came and nothing runs any more, or the grace period is over."""
        if self.requested() and (not running or monotonic() > (self._deadline or 0)):
            raise Stopped("stopped by a signal")


def clean(out: Store) -> None:
    """Remove the temporary files of drivers and workers that died."""
    for folder in ("", COMMITS, LEASE, TOKENIZER, f"{QUARANTINE}/rows", f"{QUARANTINE}/failed"):
        out.clean(folder)


def begin_output(shards: ShardFolder, out: Store, manifest: Manifest) -> ShardFolder:
    """Freeze `manifest` in `out`, with a copy of the tokenizer of `shards` and of its list of ids, unless it is frozen there."""
    if out.size(MANIFEST) is None:
        out.remove(TOKENIZER)  # of a run that died while it copied one
        shards.copy_tokenizer_to(out)
        crash_point("output.begun")
        manifest.write(out)
    return ShardFolder(out)


def leave(out: Store, lease: Lease) -> None:
    """Give the folder back, without the temporary files of workers that died."""
    with contextlib.suppress(LeaseLost, OSError):
        lease.check()
        clean(out)
    lease.release()
