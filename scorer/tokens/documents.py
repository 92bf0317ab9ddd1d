"""Blocks of documents as they were found, made ready for the rows: ids checked, EOS at each end, BOS where the rows put it.

In: blocks of a source. Out: ids of the documents that are packed, with EOS and, where the rows begin with BOS, without their
own. What was found is counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from scorer.documents import TokenDocument, as_found
from scorer.faults import BadFile
from scorer.tokens.blocks import TokenBlock
from scorer.tokens.npy import other_dtypes


@dataclass(frozen=True)
class Rules:
    """What to make of the documents of a source.

    where: what messages call it. vocabulary: one more than the largest id. unknown: ids below it that the tokenizer has not
    got. eos: ends documents. bos: with which rows' pieces begin, None for none. own_bos: the id with which documents may
    begin, None where the tokenizer names none. bos_option: --bos. missing_eos: append or stop. bad_documents: stop or reject.
    is_raw: whether the numbers are bare, so that another dtype may be the cause of a wrong id.
    """

    where: str
    vocabulary: int
    unknown: np.ndarray
    eos: int
    bos: int | None
    own_bos: int | None
    bos_option: str
    missing_eos: str
    bad_documents: str
    is_raw: bool = False


@dataclass
class Found:
    """What was found in a source: documents by kind, those with BOS at their beginning, those that got an EOS."""

    read: int = 0
    packed: int = 0
    empty: int = 0
    rejected: list[str] = field(default_factory=list)
    with_bos: int = 0
    eos_added: int = 0

    def counts(self) -> dict[str, int]:
        """Documents by kind, as a manifest counts them."""
        return {"read": self.read, "packed": self.packed, "empty": self.empty, "rejected": len(self.rejected)}


@dataclass
class Ready:
    """Documents to pack: their ordinals int64 [D], ids int32 [T], lengths int64 [D], predict bool [T] or None."""

    doc_ids: np.ndarray
    ids: np.ndarray
    lengths: np.ndarray
    predict: np.ndarray | None = None
    fields: list[tuple[Any, ...]] | None = None


def make_ready(block: TokenBlock, rules: Rules, found: Found) -> Ready:
    """The documents of a block that are packed. BadFile, or the BadDocument, where one cannot be."""
    first = found.read
    if rules.bad_documents == "stop" and block.bad:
        raise block.bad[min(block.bad)]
    found.read += len(block.lengths)
    found.rejected += [str(fault) for _, fault in sorted(block.bad.items())]
    lengths = block.lengths
    ends = np.cumsum(lengths)
    require_ids(block.ids, ends, first, rules)
    ids, predict = block.ids.astype(np.int32, copy=False), block.predict
    is_full = lengths > 0
    has_eos, has_bos = np.zeros(len(lengths), dtype=bool), np.zeros(len(lengths), dtype=bool)
    has_eos[is_full] = ids[ends[is_full] - 1] == rules.eos
    starts = ends - lengths
    if rules.own_bos is not None:
        has_bos[is_full] = ids[starts[is_full]] == rules.own_bos
    has_text = lengths > has_eos.astype(np.int64) + has_bos  # more than the tokens around a text
    found.with_bos += int(np.count_nonzero(has_bos & has_text))
    found.packed += int(np.count_nonzero(has_text))
    found.empty += int(np.count_nonzero(~has_text)) - len(block.bad)
    doc_ids = np.arange(first, first + len(lengths))
    refuse_mixed_bos(has_bos, has_text, doc_ids, rules)
    lacks_eos = has_text & ~has_eos
    if lacks_eos.any():
        if rules.missing_eos == "stop":
            raise BadFile(rules.where, missing_eos(int(doc_ids[np.argmax(lacks_eos)]), rules))
        found.eos_added += int(np.count_nonzero(lacks_eos))
    # the rows put a BOS of their own there; one that a mask speaks of stays
    drops_bos = has_bos & has_text if rules.bos is not None and predict is None else np.zeros_like(has_bos)
    if lacks_eos.any() or drops_bos.any() or not has_text.all():
        keeps = np.repeat(has_text, lengths)
        keeps[starts[drops_bos]] = False
        # where the new tokens stand among those that are kept
        places = np.cumsum(keeps)[ends[lacks_eos] - 1]
        ids = np.insert(ids[keeps], places, rules.eos)
        if predict is not None:
            predict = np.insert(predict[keeps], places, predict[ends[lacks_eos] - 1])
        lengths = (lengths - drops_bos + lacks_eos)[has_text]
        doc_ids = doc_ids[has_text]
    fields = block.fields
    if fields is not None:
        fields = [row for row, kept in zip(fields, has_text.tolist()) if kept]
    return Ready(doc_ids, ids, lengths, predict, fields)


def one_by_one(ready: Ready, bos: int | None) -> Iterator[tuple[int, TokenDocument]]:
    """Documents whose mask says what is to be predicted, with their ordinals. bos: with which the pieces of rows begin."""
    assert ready.predict is not None
    for doc_id, end, length in zip(ready.doc_ids.tolist(), np.cumsum(ready.lengths).tolist(), ready.lengths.tolist()):
        here = slice(end - length, end)
        yield doc_id, as_found(ready.ids[here], ready.predict[here], bos)


def require_ids(ids: np.ndarray, ends: np.ndarray, first: int, rules: Rules) -> None:
    """BadFile where one of the ids is none of the tokenizer's."""
    if not len(ids):
        return
    beyond = int(ids.max()) >= rules.vocabulary or (ids.dtype.kind == "i" and int(ids.min()) < 0)
    if not beyond and not len(rules.unknown):
        return
    is_wrong = (ids >= rules.vocabulary) | (ids < 0)
    if len(rules.unknown):
        is_wrong |= np.isin(ids, rules.unknown)
    if not is_wrong.any():
        return
    place = int(np.argmax(is_wrong))
    document = int(np.searchsorted(ends, place, side="right"))
    before = int(ends[document - 1]) if document else 0
    expected = f"expected ids 0 to {rules.vocabulary - 1:,}" if beyond else "which is none of the tokenizer's ids"
    hint = other_dtypes(ids, rules.vocabulary) if rules.is_raw else "; was it written with another tokenizer?"
    raise BadFile(
        rules.where, f"document {first + document}: token {place - before} has id {int(ids[place]):,}, {expected}{hint}"
    )


def refuse_mixed_bos(has_bos: np.ndarray, has_text: np.ndarray, doc_ids: np.ndarray, rules: Rules) -> None:
    """BadFile where a document has a BOS and others have none, and --bos does not say what to do."""
    if rules.bos_option != "auto" or rules.own_bos is None:
        return
    is_other = has_text & (has_bos != (rules.bos is not None))
    if is_other.any():
        one, others = ("begins with BOS", "without") if rules.bos is None else ("begins without BOS", "with it")
        raise BadFile(
            rules.where,
            f"document {doc_ids[np.argmax(is_other)]} {one} (id {rules.own_bos}), others begin {others}; --bos always puts it in front of "
            "each that lacks it, --bos never takes all as they are",
        )


def missing_eos(document: int, rules: Rules) -> str:
    return (
        f"document {document} does not end in EOS (id {rules.eos}); is the file whole, and of this tokenizer? --on-missing-eos append "
        "puts one there"
    )


def first_ids(blocks: Iterator[TokenBlock]) -> int | None:
    """The first token of the first document that has one, None where none has."""
    return next((int(block.ids[0]) for block in blocks if len(block.ids)), None)
