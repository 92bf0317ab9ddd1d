"""Blocks of documents as they were found, made ready for the rows: ids checked, EOS at each end, BOS where the rows put it.

In: blocks of a source. Out: ids of the documents that are packed, with EOS and, where the rows begin with BOS, without their
own. What was found is counted.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from scorer.documents import TokenDocument, as_found
from scorer.faults import BadDocument, BadFile
from scorer.tokens.blocks import TokenBlock
from scorer.tokens.npy import other_dtypes


@dataclass(frozen=True)
class Rules:
    """What to make of the documents of a source.

    where: what messages call it. vocabulary: one more than the largest id. unknown: ids below it that the tokenizer has not
    got. eos: ends documents. bos: with which rows' pieces begin, None for none. own_bos: the id with which documents may
    begin, None where the tokenizer names none. bos_option: --bos. missing_eos: append, stop, or auto: append but where the
    documents look like rows that were cut out of a stream. bad_documents: stop or reject.
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
    block = without_unknown(block, first, rules)
    found.read += len(block.lengths)
    found.rejected += [str(fault) for _, fault in sorted(block.bad.items())]
    lengths = block.lengths
    ends = np.cumsum(lengths)
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
        if rules.missing_eos == "auto":
            refuse_cut_rows(ids, lengths, lacks_eos, doc_ids, rules)
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


def without_unknown(block: TokenBlock, first: int, rules: Rules) -> TokenBlock:
    """A block in which documents with an id that is none of the tokenizer's are bad ones. BadFile where these stop packing,
    or where the numbers of the whole block are ids in another dtype."""
    ids = block.ids
    if not len(ids):
        return block
    beyond = int(ids.max()) >= rules.vocabulary or (ids.dtype.kind == "i" and int(ids.min()) < 0)
    if not beyond and not len(rules.unknown):
        return block
    is_wrong = (ids >= rules.vocabulary) | (ids < 0)
    if len(rules.unknown):
        is_wrong |= np.isin(ids, rules.unknown)
    if not is_wrong.any():
        return block
    ends = np.cumsum(block.lengths)
    places = np.flatnonzero(is_wrong)
    owners, firsts = np.unique(np.searchsorted(ends, places, side="right"), return_index=True)
    expected = f"expected ids 0 to {rules.vocabulary - 1:,}"
    hint = other_dtypes(ids, rules.vocabulary) if rules.is_raw else "; was it written with another tokenizer?"
    bad = dict(block.bad)
    for document, place in zip(owners.tolist(), places[firsts].tolist()):
        value = int(ids[place])
        what = "which is none of the tokenizer's ids" if 0 <= value < rules.vocabulary else expected
        at = place - int(ends[document] - block.lengths[document])
        told = f"document {first + document}: token {at} has id {value:,}, {what}"
        if rules.bad_documents == "stop" or "all would be ids" in hint:
            raise BadFile(rules.where, told + hint)
        bad[document] = BadDocument(f"{rules.where}: {told}")
    lengths = block.lengths.copy()
    keeps = np.ones(len(lengths), dtype=bool)
    keeps[owners] = False
    kept = np.repeat(keeps, lengths)
    lengths[owners] = 0
    predict = None if block.predict is None else block.predict[kept]
    return replace(block, ids=ids[kept], lengths=lengths, predict=predict, bad=bad)


def refuse_cut_rows(
    ids: np.ndarray, lengths: np.ndarray, lacks_eos: np.ndarray, doc_ids: np.ndarray, rules: Rules
) -> None:
    """BadFile where rows look like pieces of a stream of documents, cut to one length: an EOS at the end of each would stand
    in the middle of a text."""
    ends = np.cumsum(lengths)
    is_inside = ids == rules.eos
    is_inside[(ends - lengths)[lengths > 0]] = False  # with which documents of some tokenizers begin
    has_eos = np.zeros(len(lengths), dtype=bool)
    has_eos[np.searchsorted(ends, np.flatnonzero(is_inside), side="right")] = True
    own = lengths[lengths > 0]
    same = own[:-1] if len(own) > 3 and own[-1] < own[0] else own  # the last one may be what was left
    if (lacks_eos & has_eos).any():
        what = f"document {doc_ids[np.argmax(lacks_eos & has_eos)]} has EOS (id {rules.eos}) inside and none at its end"
    elif len(same) > 1 and same[0] > 1 and (same == same[0]).all():
        document = doc_ids[np.argmax(lacks_eos)]
        what = f"document {document} does not end in EOS (id {rules.eos}), and all have {same[0]:,} tokens"
    else:
        return
    raise BadFile(
        rules.where,
        f"{what}, as rows that were cut out of a stream, where EOS would be put in the middle of text; give whole documents, or "
        "pass --on-missing-eos append if they are",
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


def begins_with(blocks: Iterator[TokenBlock], bos: int, eos: int) -> bool | None:
    """Whether the first document that has text begins with BOS; None where none has text."""
    for block in blocks:
        starts = np.cumsum(block.lengths) - block.lengths
        for start, length in zip(starts.tolist(), block.lengths.tolist()):
            if length:
                has_bos, has_eos = int(block.ids[start]) == bos, int(block.ids[start + length - 1]) == eos
                if length > has_bos + has_eos:
                    return has_bos
    return None
