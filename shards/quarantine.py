"""What is set aside instead of being filled with a number or left out in silence: `_quarantine/` of a folder.

rows/part-00003.json      rows of that part without log-probs of a reference, each with its reason and tokens
failed/part-00003.json    why a part could not be scored; a rerun tries it again
damaged/part-00003.arrow  a part, and damaged/part-00003.json its record, that verify --repair took out
"""

import json
from collections.abc import Mapping
from typing import Any

from shards.record import REMEDY, SUMS, CommitRecord, encode_json, record_name
from shards.store import Store

QUARANTINE = "_quarantine"


def _stem(part: str) -> str:
    return part.removesuffix(".arrow")


def rows_name(part: str) -> str:
    """Side file with the quarantined rows of a part."""
    return f"{QUARANTINE}/rows/{_stem(part)}.json"


def failed_name(part: str) -> str:
    """File that says why a part failed."""
    return f"{QUARANTINE}/failed/{_stem(part)}.json"


def write_quarantined_rows(store: Store, part: str, rows: list[dict[str, Any]]) -> None:
    """Keep rows that have no log-probs: each {reference, row, reason, input_ids}, row counted in the part."""
    if rows:
        store.replace(rows_name(part), encode_json({"part": part, "rows": rows}))
    elif store.size(rows_name(part)) is not None:
        store.delete(rows_name(part))  # of an attempt that was not committed


def read_quarantined_rows(store: Store, part: str) -> list[dict[str, Any]]:
    """The quarantined rows of a part; ValueError for a damaged side file."""
    try:
        value = json.loads(store.read(rows_name(part)))
        rows = value["rows"]
        if value["part"] != part or any({"reference", "row", "reason", "input_ids"} != {*row} for row in rows):
            raise ValueError("not the rows of this part")
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{store.where(rows_name(part))}: damaged ({error}); run remit verify --repair") from None
    return rows


def require_listed_rows(store: Store, record: CommitRecord) -> None:
    """ValueError unless the side file has the rows that a commit record lists.

    Where the record has a checksum, that the file is there is enough.
    """
    where = store.where(rows_name(record.part))
    if record.quarantined and store.size(rows_name(record.part)) is None:
        raise ValueError(
            f"{where}: missing, and the commit record of {record.part} lists rows that could not be scored; copy the folder "
            f"again, with its {QUARANTINE}"
        )
    if not record.batches:
        require_same_rows(store, record.part, record.quarantined)


def require_same_rows(store: Store, part: str, quarantined: Mapping[str, list[int]]) -> None:
    """ValueError unless the side file of a part has just these rows. quarantined: per reference, as in the commit record."""
    listed = {(entry["reference"], entry["row"]) for entry in read_quarantined_rows(store, part)}
    if listed != {(name, row) for name, rows in quarantined.items() for row in rows}:
        raise ValueError(
            f"{store.where(rows_name(part))}: its rows are not those that the commit record lists; {REMEDY}"
        )


def write_failure(store: Store, part: str, reason: str, attempts: int) -> None:
    """Say why a part is not there."""
    store.replace(failed_name(part), encode_json({"part": part, "reason": reason, "attempts": attempts}))


def clear_failures(store: Store) -> None:
    """Forget what failed before: it is tried again."""
    for name in store.names(f"{QUARANTINE}/failed"):
        store.delete(f"{QUARANTINE}/failed/{name}")


def failure_reason(store: Store, part: str) -> str:
    """` (failed 3 times: ...)` where a part has failed, else nothing."""
    try:
        value = json.loads(store.read(failed_name(part)))
        return f" (failed {value['attempts']} times: {value['reason']})"
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return ""


def take_out(store: Store, part: str) -> None:
    """Move a damaged part and its record aside; without its record first, it is gone for every reader."""
    for name, to in ((record_name(part), f"{_stem(part)}.json"), (part, part)):
        if store.size(name) is not None:
            store.move(name, f"{QUARANTINE}/damaged/{to}")
    store.delete(record_name(part, SUMS))
    store.delete(rows_name(part))
