"""Columns beside one of token ids that say which tokens are padding, and which are to be predicted.

attention_mask: 0 for padding, which is refused. labels: -100 where a token is not to be predicted, else its id. loss_mask: 1
where it is, 0 where not. A document without any of them, or with null for them, is predicted whole.

In: the ids of some documents and these columns. Out: what is to be predicted of them. D = documents, T = their tokens.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from scorer.faults import BadFile
from scorer.fields import Fields

PADDING, LABELS, LOSS = "attention_mask", "labels", "loss_mask"
KINDS = (PADDING, LABELS, LOSS)
NOT_PREDICTED = -100  # in labels, as transformers' losses read them


@dataclass(frozen=True)
class IdFields(Fields):
    """Fields whose text is the one with the ids: what stands beside it is read too."""

    def columns(self, present: Iterable[str]) -> list[str]:
        there = set(present)
        names = (name for kind in KINDS for name in self.beside(kind))
        return list(dict.fromkeys([*super().columns(there), *(name for name in names if name in there)]))

    def beside(self, kind: str) -> list[str]:
        """Names that a column of this kind may have, the likeliest first: that of ids in an object stands in it too."""
        folder, dot, _ = self.text.rpartition(".")
        return [name for name in dict.fromkeys((folder + dot + kind, kind)) if name != self.text]


@dataclass(frozen=True)
class Beside:
    """A column beside the ids. values: [T] of all documents; lengths: int64 [D]; is_null: bool [D], of documents without it,
    whose length is 0."""

    name: str
    values: np.ndarray
    lengths: np.ndarray
    is_null: np.ndarray


def predicted(
    ids: np.ndarray, lengths: np.ndarray, beside: Mapping[str, Beside], where: list[str] | str, first: int = 0
) -> np.ndarray | None:
    """What is to be predicted of documents, bool [T]; None where nothing beside them says it.

    beside: by kind. where: what messages call the documents, one for each, or what stands before their number, from `first`
    on. BadFile where they have padding, or where a mask cannot be one of these ids.
    """
    found: np.ndarray | None = None
    for kind in KINDS:
        if kind not in beside:
            continue
        column = beside[kind]
        other = (column.lengths != lengths) & ~column.is_null
        if other.any():
            row = int(np.argmax(other))
            raise BadFile(
                _name(where, first, row),
                f"{column.name} has {column.lengths[row]} values for {lengths[row]} ids; write one for each",
            )
        is_told = np.repeat(~column.is_null, lengths)
        own, reason = _own(kind, column, ids[is_told])
        if reason is not None:
            place = int(np.flatnonzero(is_told)[reason[0]])
            row = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise BadFile(_name(where, first, row), reason[1])
        if kind == PADDING or column.is_null.all():
            continue
        mask = np.ones(len(ids), dtype=bool)
        mask[is_told] = own
        if found is not None and (found != mask).any():
            row = int(np.searchsorted(np.cumsum(lengths), int(np.argmax(found != mask)), side="right"))
            raise BadFile(
                _name(where, first, row),
                f"{LABELS} and {LOSS} disagree on what is to be predicted; leave one of them out",
            )
        found = mask
    return found


def _own(kind: str, column: Beside, ids: np.ndarray) -> tuple[np.ndarray, tuple[int, str] | None]:
    """Where the values of a column say yes; the place of one that is wrong, and why."""
    values = column.values
    if kind == LABELS:
        own = values != NOT_PREDICTED
        wrong = own & (values != ids)
        if wrong.any():
            at = int(np.argmax(wrong))
            text = (
                f"{column.name} is {values[at]} where the id is {ids[at]}, expected the id or {NOT_PREDICTED}; labels are not "
                "shifted, drop the column if it is something else"
            )
            return own, (at, text)
        return own, None
    own = values == 1
    if kind == PADDING and not own.all():
        at = int(np.argmin(own))
        text = f"{column.name} is {values[at]} somewhere, so it has padding among its ids; write it without padding"
        return own, (at, text)
    wrong = ~own & (values != 0)
    if wrong.any():
        at = int(np.argmax(wrong))
        return own, (at, f"{column.name} is {values[at]}, expected 0 or 1; it is no mask")
    return own, None


def _name(where: list[str] | str, first: int, row: int) -> str:
    return f"{where} {first + row}" if isinstance(where, str) else where[row]


def no_list(where: str, name: str, what: str) -> BadFile:
    """Of a column called like a mask that has no list for the ids."""
    return BadFile(where, f"{name} is {what}, expected a list with a number for each id; write that, or drop it")
