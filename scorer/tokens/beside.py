"""The files beside those of tokens: indexes, masks, what says how they were written.

In: names of files. Out: which belong to which.
"""

import os
from collections.abc import Callable, Iterable
from functools import lru_cache

from scorer.formats import TOKENS, format_of
from shards.store import is_remote, open_store

INDEX, DOCUMENTS, METADATA, MASK, LOSS = "index", "documents", "metadata", "mask", "loss"
ENDINGS = {".idx": INDEX, ".ds.index": INDEX, ".ds.metadata": METADATA, ".ds.loss": LOSS, ".csv.gz": DOCUMENTS}
IDS_NAME, MASK_NAME = (
    "token_ids",
    "labels_mask",
)  # token_ids_part_0000.npy and labels_mask_part_0000.npy, of open-instruct
MASK_ENDINGS = ("_labels_mask.npy", "_label_mask.npy")


def kind_of(name: str) -> str | None:
    """What a file beside one of tokens is, None for another."""
    base = name.rpartition("/")[2].lower()
    if base.endswith(".npy") and (base.startswith(MASK_NAME) or base.endswith(MASK_ENDINGS)):
        return MASK
    return next((kind for ending, kind in ENDINGS.items() if base.endswith(ending)), None)


def candidates(location: str) -> list[str]:
    """Where the files beside a file of tokens would be."""
    folder, slash, name = location.rpartition("/")
    stem, suffix = os.path.splitext(name)
    if suffix.lower() == ".bin":
        names = [f"{stem}.idx"]
    elif suffix.lower() == ".ds":
        names = [f"{name}.{ending}" for ending in ("index", "metadata", "loss")]
    else:
        names = [f"{stem}.csv.gz", *(stem + ending for ending in MASK_ENDINGS)]
        if name.startswith(IDS_NAME):
            names.append(MASK_NAME + name.removeprefix(IDS_NAME))
    return [folder + slash + one for one in names]


def owner_of(name: str) -> list[str]:
    """Names of the files of tokens that a file may stand beside."""
    folder, slash, base = name.rpartition("/")
    owners = []
    for ending in MASK_ENDINGS:
        if base.endswith(ending):
            owners.append(base.removesuffix(ending) + ".npy")
    if base.startswith(MASK_NAME) and base.endswith(".npy"):
        owners.append(IDS_NAME + base.removeprefix(MASK_NAME))
    for ending in (".idx", ".csv.gz"):
        if base.endswith(ending):
            owners.append(base.removesuffix(ending) + (".bin" if ending == ".idx" else ".npy"))
    for ending in (".index", ".metadata", ".loss"):
        if base.endswith(".ds" + ending):
            owners.append(base.removesuffix(ending))
    return [folder + slash + one for one in owners]


def stands_beside(name: str, exists: Callable[[str], bool]) -> bool:
    """Whether a file only says more about a file of tokens that is there."""
    return any(map(exists, owner_of(name)))


def lacks_index(name: str, exists: Callable[[str], bool]) -> bool:
    """Whether a .bin has no .idx: then it may be anything."""
    form = format_of(name)
    return form is not None and form[0] == ".bin" and not any(map(exists, candidates(name)))


def find_beside(locations: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """The files beside each of the files of tokens among `locations`, by its location."""

    @lru_cache(maxsize=256)
    def names(folder: str) -> frozenset[str]:
        return frozenset(open_store(folder).names())

    def exists(location: str) -> bool:
        if is_remote(location):
            folder, _, name = location.rpartition("/")
            return name in names(folder)
        return os.path.exists(location)

    found = {}
    for location in locations:
        form = format_of(location)
        if form is not None and form[0] in TOKENS:
            found[location] = tuple(filter(exists, candidates(location)))
    return found
