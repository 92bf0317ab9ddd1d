"""The documents of a corpus of token ids: which sources are one, and their blocks, whatever their format.

In: a source and how to read it. Out: blocks of documents (scorer/tokens/blocks.py), in the order of the file.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from scorer.faults import BadFile
from scorer.formats import TOKENS
from scorer.sources import Source
from scorer.tokens import datatrove, npy
from scorer.tokens.beside import DOCUMENTS, INDEX, LOSS, MASK, METADATA, kind_of
from scorer.tokens.blocks import CUT_OFF, Numbers, TokenBlock, indexed_blocks, whole_numbers
from scorer.tokens.columns import column_blocks
from scorer.tokens.heads import fault_of_numbers
from scorer.tokens.masks import IdFields
from scorer.tokens.megatron import Index

HEAD_BYTES = 64


@dataclass(frozen=True)
class Reading:
    """How to read token ids. field: name of the column with them, in tables and JSON lines. dtype: --tokens-dtype. vocabulary:
    one more than the tokenizer's largest id. eos: the id that ends documents."""

    field: str | None
    dtype: str
    vocabulary: int
    eos: int
    kept: tuple[str, ...] = ()


def holds_tokens(source: Source, field: str | None) -> bool:
    """Whether a source is one of token ids. field: of --tokens-field, None where it is not given."""
    return field is not None or is_token_file(source)


def is_token_file(source: Source) -> bool:
    """Whether a source is a file of a format that has nothing but token ids."""
    return source.shard is None and source.format[0] in TOKENS


def marks_ends(source: Source) -> bool:
    """Whether something beside EOS says where the documents of a source end."""
    return not is_token_file(source) or any(kind_of(name) in (INDEX, DOCUMENTS) for name in source.beside)


def may_have_mask(source: Source) -> bool:
    """Whether something beside the ids of a source may say which of them are to be predicted: a file, or columns, of which
    one knows once they are read."""
    return not is_token_file(source) or any(kind_of(name) in (MASK, LOSS) for name in source.beside)


def read_tokens(source: Source, reading: Reading, max_window: int) -> Iterator[TokenBlock]:
    """Blocks of the documents of a source. Raises BadFile where it cannot be read to its end, is damaged, or is not what its
    name says. max_window: as of scorer.corpus.read_documents."""
    if not is_token_file(source):
        assert reading.field is not None
        yield from column_blocks(source, IdFields(reading.field, kept=reading.kept), max_window)
        return
    with ExitStack() as opened:
        yield from _file_blocks(source, reading, opened)


def _file_blocks(source: Source, reading: Reading, opened: ExitStack) -> Iterator[TokenBlock]:
    where, form = source.where, source.format[0]
    beside = {kind_of(name): Source(name, name) for name in source.beside}
    file = opened.enter_context(source.open())
    size = file.size()
    head = file.read_at(min(size, HEAD_BYTES), 0)
    fault = fault_of_numbers(head, npy=form == ".npy", given=reading.dtype != "auto") if size else None
    if fault:
        raise BadFile(where, fault)
    require_side_files(source)
    sides = {kind: opened.enter_context(side.open()) for kind, side in beside.items()}

    mask_kind = MASK if form == ".npy" else LOSS
    mask = None
    if mask_kind in sides:
        mask = Mask(beside[mask_kind].where, sides[mask_kind])

    if form == ".bin":
        index = Index(beside[INDEX].where, sides[INDEX], where, size)
        ids = Numbers(where, file, _agreed(where, index.dtype, reading), 0, index.tokens)
        lengths = index.document_lengths()
    elif form == ".ds":
        ends_at = sides[INDEX]
        ends = Numbers(
            beside[INDEX].where, ends_at, "uint64", 0, whole_numbers(beside[INDEX].where, ends_at.size(), "uint64")
        )
        last_end = int(ends.read(ends.count - 1, ends.count)[0]) if ends.count else 0
        metadata = (
            sides[METADATA].read_at(min(sides[METADATA].size(), datatrove.METADATA_BYTES), 0)
            if METADATA in sides
            else None
        )
        dtype = _agreed(where, datatrove.dtype_of(where, metadata, size, last_end), reading)
        ids = Numbers(where, file, dtype, 0, whole_numbers(where, size, dtype))
        lengths = datatrove.document_lengths(ends, ids.count)
    else:
        opened_ids = npy.open_numbers(where, file, reading.dtype, reading.vocabulary, mask.count if mask else None)
        ids = opened_ids.numbers
        if opened_ids.by in ("header", "mask"):
            _agreed(where, ids.dtype.name, reading, "its header" if opened_ids.by == "header" else "its mask")
        if DOCUMENTS not in sides:
            if opened_ids.by in ("user", "tokenizer") and mask is None:
                npy.require_plausible(ids, reading.vocabulary, reading.eos, opened_ids.by == "tokenizer")
            if mask:
                mask.require(ids.count)
            yield from npy.blocks_by_eos(ids, reading.eos, mask)
            return
        lengths = npy.document_lengths(beside[DOCUMENTS].where, sides[DOCUMENTS], ids.count, ids.dtype.name)
    if mask:
        mask.require(ids.count)
    yield from indexed_blocks(ids, lengths, mask)


def _agreed(where: str, found: str, reading: Reading, by: str = "its index") -> str:
    """The dtype that the file says, unless it contradicts --tokens-dtype, or cannot hold the ids of the tokenizer."""
    if reading.dtype not in ("auto", found):
        raise BadFile(where, f"is {found} by {by}, --tokens-dtype says {reading.dtype}; leave --tokens-dtype out")
    most = int(np.iinfo(found).max)
    if reading.dtype == "auto" and most < reading.vocabulary - 1:
        raise BadFile(
            where,
            f"is {found}, which ends at {most:,}, and the tokenizer's ids at {reading.vocabulary - 1:,}; was it written with "
            f"another tokenizer? --tokens-dtype {found} takes it",
        )
    return found


def require_side_files(source: Source) -> None:
    """BadFile where a file that says where documents end is missing."""
    kinds = {kind_of(name) for name in source.beside}
    form = source.format[0]
    if form in (".bin", ".ds") and INDEX not in kinds:
        name = ".idx" if form == ".bin" else ".ds.index"
        raise BadFile(source.where, f"has no {name} beside it, which says where its documents end; fetch that too")


class Mask:
    """A file with one byte per token, 1 where it is to be predicted."""

    def __init__(self, where: str, file: object) -> None:
        header = npy.mask_header(where, file)
        self._numbers = Numbers(where, file, "uint8", *header)  # type: ignore[arg-type]
        self.count = self._numbers.count

    def require(self, tokens: int) -> None:
        """BadFile unless it is of so many tokens."""
        if self.count != tokens:
            raise BadFile(
                self._numbers.where, f"is of {self.count:,} tokens, the file beside it has {tokens:,}; {CUT_OFF}"
            )

    def __call__(self, start: int, stop: int) -> np.ndarray:
        values = self._numbers.read(start, stop)
        if (values > 1).any():
            at = start + int(np.argmax(values > 1))
            raise BadFile(self._numbers.where, f"byte {at:,} is {values[at - start]}, expected 0 or 1; it is no mask")
        return values.astype(bool)


MaskReader = Callable[[int, int], np.ndarray]
