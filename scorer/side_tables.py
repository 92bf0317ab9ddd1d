"""Second half of the fields that remit pack keeps: the tables beside the rows, made of what was staged.

In: the staging files of all sources, once they are there. Out: a table for each corpus file in the output folder.
"""

from collections import deque
from typing import Any

import ray

from scorer.cluster import cause
from scorer.kept_fields import field_types, write_table
from shards.lease import Lease
from shards.manifest import MANIFEST
from shards.side_table import FIELDS
from shards.store import Store


def write_tables(
    names: tuple[str, ...], staging: Store, staged: list[dict], out: Store, lease: Lease
) -> dict[str, str]:
    """Write the tables of the kept fields, a task for each corpus file, and note their hashes; returns the fields' types."""
    if out.size(MANIFEST) is None:
        out.remove(FIELDS)  # of a run that died, perhaps with other fields
    if not names:
        return {}
    types = field_types(names, [record["field_kinds"] for record in staged])
    task: Any = ray.remote(write_table).options(max_retries=2)
    todo = deque(index for index, record in enumerate(staged) if record["file"]["documents_packed"])
    running: dict[Any, int] = {}
    limit = 2 * int(ray.cluster_resources().get("CPU", 1))
    while todo or running:
        lease.check()
        while todo and len(running) < limit:
            index = todo.popleft()
            running[task.remote(staging, out, index, types)] = index
        ready, _ = ray.wait(list(running), num_returns=1)
        for reference in ready:
            try:
                sha256 = ray.get(reference)
            except Exception as error:
                raise cause(error) from None
            staged[running.pop(reference)]["file"]["fields_sha256"] = sha256
    return types
