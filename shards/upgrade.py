"""Bring a folder of format 1 to what format 2 can: sums beside its commit records, from parts that are checked whole once.

Manifest, records and parts keep their bytes, so that whatever refers to the folder still finds it, runs that were begun with
it go on, and releases that know format 1 alone read it as before. The sums stand in `_sums/`.
"""

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from shards.crash import crash_point
from shards.folder import ShardFolder
from shards.lease import Lease
from shards.manifest import PartPlan
from shards.record import SUMS, CommitRecord, encode_record, read_record, record_name, summed_record
from shards.sums import sums_of
from shards.whole_part import checked_part

WORKERS = 4  # hashing needs a core each, reading from a store more of them


def upgrade(
    folder: ShardFolder,
    lease: Lease,
    on_part: Callable[[PartPlan], object] = lambda plan: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> int:
    """Add the sums of each committed part that has none; returns of how many. on_part: called after each part.

    A part that has sound ones is passed over, so that the same call again goes on. ValueError for a part that is damaged;
    LeaseLost where another process has taken the folder over.
    """
    if folder.manifest.format_version != 1:
        return 0
    known = {f"{SUMS}/{name}" for name in folder.store.names(SUMS)}
    parts = folder.manifest.parts
    added = 0
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="upgrade") as pool:
        for first in range(0, len(parts), WORKERS):
            if should_stop():
                break
            plans = parts[first : first + WORKERS]
            for plan, is_new in zip(plans, pool.map(lambda plan: _add_sums(folder, plan.name, known, lease), plans)):
                added += is_new
                on_part(plan)
    return added


def _add_sums(folder: ShardFolder, part: str, known: set[str], lease: Lease) -> bool:
    """Whether the sums of a part were added."""
    store, record = folder.store, read_record(folder.store, part)
    if record is None or _has_sums(folder, record, known):
        return False
    record = folder.record_alone(part)
    data = checked_part(store, record, folder.manifest, folder.part_metadata(part))
    sums = sums_of(data, folder.schema)
    summed = replace(record, manifest_sha256=folder.manifest.checksum, batches=sums)
    lease.check()
    store.replace(record_name(part, SUMS), encode_record(summed))
    crash_point("driver.committed")
    return True


def _has_sums(folder: ShardFolder, record: CommitRecord, known: set[str]) -> bool:
    if record_name(record.part, SUMS) in known:
        with contextlib.suppress(ValueError):  # those of another part, or altered: made again
            return summed_record(folder.store, record).manifest_sha256 == folder.manifest.checksum
    return False
