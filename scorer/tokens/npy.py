"""OLMo-core's token files: X.npy is bare numbers, without numpy's header, though a file with one is read too.

Documents end with EOS, or where X.csv.gz beside it says: gzip, a line per document that begins with the token at which it
begins and the one behind its last.
"""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from scorer.decompress import Damaged, Decompressed
from scorer.faults import BadFile
from scorer.tokens.blocks import (
    BLOCK_DOCUMENTS,
    BLOCK_TOKENS,
    CUT_OFF,
    DTYPES,
    Numbers,
    TokenBlock,
    require_length,
    whole_numbers,
)
from scorer.tokens.heads import NUMPY_MARK

HEADER_BYTES = 1 << 16  # of numpy's, at most
LINE_BYTES = 1 << 16
SAMPLE_TOKENS = 1 << 16


def numpy_header(where: str, file: pa.NativeFile) -> tuple[str, int, int] | None:
    """Dtype, first byte and number of the numbers of a file with numpy's header; None for one without.

    BadFile where they are no token ids: of another kind, big-endian, of several dimensions, more than the file has.
    """
    size = file.size()
    head = file.read_at(min(size, HEADER_BYTES), 0)
    if not head.startswith(NUMPY_MARK):
        return None
    shape, dtype, first = _read_header(where, head)
    if dtype.hasobject or dtype.kind not in "ui":
        raise BadFile(where, f"holds numbers of dtype {dtype}, expected integers, which token ids are")
    if dtype.itemsize > 1 and dtype.str[0] == ">":
        raise BadFile(
            where, f"is big-endian ({dtype.str}), expected little-endian; array.astype('{dtype.name}') makes that of it"
        )
    if len(shape) != 1:
        raise BadFile(where, f"has shape {shape}, expected one dimension, with an EOS behind each document")
    bytes_of_all = shape[0] * dtype.itemsize
    if size - first != bytes_of_all:
        raise BadFile(
            where, f"{size - first:,} bytes behind its header, which counts {shape[0]:,} of {dtype.itemsize}; {CUT_OFF}"
        )
    return dtype.name, first, shape[0]


def _read_header(where: str, head: bytes) -> tuple[tuple[int, ...], np.dtype, int]:
    """Shape and dtype by numpy's header, and the byte at which it ends; BadFile where it cannot be read."""
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise BadFile(
            where, f"its numpy header cannot be read ({str(error).splitlines()[0][:120]}); write it again"
        ) from None
    return shape, dtype, stream.tell()


def mask_header(where: str, file: pa.NativeFile) -> tuple[int, int]:
    """First byte and number of the values of a mask, a byte each, with numpy's header or without."""
    size = file.size()
    head = file.read_at(min(size, HEADER_BYTES), 0)
    if not head.startswith(NUMPY_MARK):
        return 0, size
    shape, dtype, first = _read_header(where, head)
    if dtype.itemsize != 1 or len(shape) != 1 or size - first != shape[0]:
        raise BadFile(where, f"has shape {shape} of {dtype} in {size:,} bytes, expected one byte a token; {CUT_OFF}")
    return first, shape[0]


def smallest_dtype(vocabulary: int) -> str:
    """The unsigned dtype that OLMo-core takes for a tokenizer of so many ids."""
    return next(name for name in ("uint8", "uint16", "uint32", "uint64") if vocabulary - 1 <= np.iinfo(name).max)


def require_plausible(numbers: Numbers, vocabulary: int, eos: int, is_guess: bool) -> None:
    """BadFile where bare numbers could be of a larger size as well, of which this one would see the upper halves as ids 0.

    is_guess: whether their dtype only follows from the tokenizer. One that was given is doubted only where the numbers of
    the larger size have an EOS among them: documents of one token, with EOS 0, look like wider numbers without any.
    """
    sample = numbers.read(0, min(numbers.count, SAMPLE_TOKENS)).tobytes()
    wider = [
        name
        for name in fitting(sample, vocabulary, None if is_guess else eos)
        if np.dtype(name).itemsize > numbers.dtype.itemsize
        and not numbers.count * numbers.dtype.itemsize % np.dtype(name).itemsize
    ]
    if not wider:
        return
    own, widest = numbers.dtype.name, wider[0]
    say = f"--tokens-dtype {widest} if it is that" if is_guess else f"--tokens-dtype {widest}, by all appearance"
    raise BadFile(
        numbers.where,
        f"could be {', '.join(reversed(wider))} as well as {own}: its numbers are ids of the tokenizer's {vocabulary:,} either way; "
        f"pass {say}, or write it with numpy.save, whose header tells",
    )


def fitting(data: bytes, vocabulary: int, eos: int | None = None) -> list[str]:
    """The unsigned dtypes in which all of the numbers are ids, the widest first. eos: which must be among them, if any."""
    names = []
    for name in ("uint64", "uint32", "uint16", "uint8"):
        dtype = np.dtype(name).newbyteorder("<")
        numbers = np.frombuffer(data[: len(data) // dtype.itemsize * dtype.itemsize], dtype)
        if len(numbers) and (numbers < vocabulary).all() and (eos is None or (numbers == eos).any()):
            names.append(name)
    return names


def other_dtypes(sample: np.ndarray, vocabulary: int) -> str:
    """What else the numbers of a file may be, of which one is no id: a hint for the message, or nothing."""
    swapped = sample.byteswap()
    if sample.dtype.itemsize > 1 and (swapped < vocabulary).all() and (swapped >= 0).all():
        return "; all would be ids if they were big-endian, so write the file again as little-endian"
    others = [
        name
        for name in fitting(sample.tobytes(), vocabulary)
        # a dtype whose numbers are ids whatever they are says nothing
        if np.dtype(name).itemsize != sample.dtype.itemsize and vocabulary <= np.iinfo(name).max
    ]
    if others:  # numbers that are ids in a wide dtype are ids in each narrower one, with zeros between them
        return f"; all would be ids as {others[0]}: pass --tokens-dtype {others[0]}"
    return "; was the file written with another tokenizer, or in another dtype (--tokens-dtype)?"


def blocks_by_eos(ids: Numbers, eos: int, mask: Any = None) -> Iterator[TokenBlock]:
    """Documents of a file in which EOS ends each; what follows the last EOS is one too, without EOS."""
    held: list[np.ndarray] = []  # tokens of a document whose end is not found yet
    document = start = 0
    while start < ids.count:
        stop = min(ids.count, start + BLOCK_TOKENS)
        block = ids.read(start, stop)
        ends = np.flatnonzero(block == eos) + 1
        if stop == ids.count and (not len(ends) or ends[-1] < len(block)):
            ends = np.append(ends, len(block))
        if not len(ends):
            held.append(block)
            require_length(ids.where, document, sum(map(len, held)))
        else:
            last, before = int(ends[-1]), sum(map(len, held))
            lengths = np.diff(ends, prepend=0).astype(np.int64)
            lengths[0] += before
            tokens = np.concatenate([*held, block[:last]]) if held else block[:last]
            predict = None if mask is None else mask(start - before, start + last)
            yield TokenBlock(tokens, lengths, ids.end_byte(stop), predict)
            held, document = [block[last:]] if last < len(block) else [], document + len(lengths)
        start = stop


def document_lengths(where: str, file: pa.NativeFile, tokens: int, dtype: str) -> Iterator[np.ndarray]:
    """Tokens of each document as X.csv.gz says, int64, a chunk at a time. tokens: numbers of X.npy, read as `dtype`.

    BadFile where the documents do not follow one another from its first token to its last.
    """
    lines = io.BufferedReader(Decompressed(file, "gzip"), 1 << 20)
    lengths: list[int] = []
    last = number = 0
    while True:
        try:
            line = lines.readline(LINE_BYTES)
        except Damaged as error:
            raise BadFile(where, f"cannot be read beyond line {number}: {error}") from None
        if not line:
            break
        number += 1
        start, _, rest = line.partition(b",")
        end = rest.partition(b",")[0].strip()
        if not (start.isdigit() and end.isdigit() and len(start) < 19 and len(end) < 19 and len(line) < LINE_BYTES):
            raise BadFile(
                f"{where}:{number}", f"is {line[:40]!r}, expected the first token of a document, a comma and its end"
            )
        if int(start) != last or not last <= int(end) <= tokens:
            raise BadFile(
                f"{where}:{number}",
                f"document from token {int(start):,} to {int(end):,}, expected one from {last:,} on in {tokens:,} tokens of "
                f"{dtype}; it is not of this file, or the dtype is another (--tokens-dtype)",
            )
        lengths.append(int(end) - last)
        last = int(end)
        if len(lengths) == BLOCK_DOCUMENTS:
            yield np.array(lengths, dtype=np.int64)
            lengths = []
    if lengths:
        yield np.array(lengths, dtype=np.int64)
    if last != tokens:
        raise BadFile(
            where,
            f"ends at token {last:,}, the tokens at {tokens:,} as {dtype}; one of them was cut off, or the dtype is another "
            "(--tokens-dtype)",
        )


@dataclass(frozen=True)
class Opened:
    """The numbers of X.npy. by: what says their dtype: "header", "mask" (its size), "user", or "tokenizer", a guess."""

    numbers: Numbers
    by: str


def open_numbers(where: str, file: pa.NativeFile, asked: str, vocabulary: int, tokens: int | None) -> Opened:
    """The numbers of X.npy.

    asked: --tokens-dtype, or auto. tokens: how many there are, where a file beside it says so. BadFile where the file is
    empty, does not end with a number, or is not of so many.
    """
    header = numpy_header(where, file)
    if header is not None:
        return Opened(Numbers(where, file, *header), "header")
    size = file.size()
    if not size:
        raise BadFile(where, f"0 bytes, expected token ids; {CUT_OFF}")
    if asked != "auto":
        return Opened(Numbers(where, file, asked, 0, whole_numbers(where, size, asked, "--tokens-dtype")), "user")
    if tokens:
        each = size / tokens
        dtype = next((name for name in DTYPES[:4] if np.dtype(name).itemsize == each), "")
        if not dtype:
            raise BadFile(
                where, f"{size:,} bytes, the mask beside it is of {tokens:,} tokens; they do not belong together"
            )
        return Opened(Numbers(where, file, dtype, 0, tokens), "mask")
    dtype = smallest_dtype(vocabulary)
    return Opened(Numbers(where, file, dtype, 0, whole_numbers(where, size, dtype, "--tokens-dtype")), "tokenizer")
