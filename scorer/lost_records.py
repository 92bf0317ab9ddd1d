"""Parts that were committed and are not any more.

An engine that was given up, because its node did not answer, may go on. It deletes a record that does not fit what it has
written (shards/part.py), and writes its own. If it ends in between, nobody writes the part again: so the driver looks.
"""

from collections.abc import Collection

from scorer.health import MAX_ATTEMPTS
from shards.folder import ShardFolder
from shards.record import record_name


class LostRecords:
    """Asked when a run has nothing left to do, a few times at most."""

    def __init__(self, folder: ShardFolder) -> None:
        self._folder, self._asked = folder, 0

    def find(self, failed: Collection[str]) -> list[str]:
        """Parts without a record, but those that failed."""
        if self._asked == MAX_ATTEMPTS:
            return []
        self._asked += 1
        store = self._folder.store
        missing = (part for part in self._folder.missing_parts() if part not in failed)
        return [part for part in missing if store.size(record_name(part)) is None]  # a list of files may be late
