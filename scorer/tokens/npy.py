"""OLMo-core's token files: X.npy is bare numbers, without numpy's header, though a file with one is read too.

Documents end with EOS, or where X.csv.gz beside it says: gzip, a line per document that begins with the token at which it
begins and the one behind its last.
"""

import io
from collections.abc import Iterator
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
FEW = 64  # tokens, which tell nothing about a dtype


def numpy_header(where: str, file: pa.NativeFile) -> tuple[str, int, int] | None:
    """Dtype, first byte and number of the numbers of a file with numpy's header; None for one without.

    BadFile where they are no token ids: of another kind, big-endian, of several dimensions, more than the file has.
    """
    size = file.size()
    head = file.read_at(min(size, HEADER_BYTES), 0)
    if not head.startswith(NUMPY_MARK):
        return None
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read: Any = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise BadFile(
            where, f"its numpy header cannot be read ({str(error).splitlines()[0][:120]}); write it again"
        ) from None
    if dtype.hasobject or dtype.kind not in "ui":
        raise BadFile(where, f"holds numbers of dtype {dtype}, expected integers, which token ids are")
    if dtype.itemsize > 1 and dtype.str[0] == ">":
        raise BadFile(
            where, f"is big-endian ({dtype.str}), expected little-endian; array.astype('{dtype.name}') makes that of it"
        )
    if len(shape) != 1:
        raise BadFile(where, f"has shape {shape}, expected one dimension, with an EOS behind each document")
    first, bytes_of_all = stream.tell(), shape[0] * dtype.itemsize
    if size - first != bytes_of_all:
        raise BadFile(
            where, f"{size - first:,} bytes behind its header, which counts {shape[0]:,} of {dtype.itemsize}; {CUT_OFF}"
        )
    return dtype.name, first, shape[0]


def mask_header(where: str, file: pa.NativeFile) -> tuple[int, int]:
    """First byte and number of the values of a mask, a byte each, with numpy's header or without."""
    size = file.size()
    head = file.read_at(min(size, HEADER_BYTES), 0)
    if not head.startswith(NUMPY_MARK):
        return 0, size
    stream = io.BytesIO(head)
    try:
        np.lib.format.read_magic(stream)
        shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    except (ValueError, SyntaxError, TypeError, OverflowError, MemoryError, RecursionError) as error:
        raise BadFile(
            where, f"its numpy header cannot be read ({str(error).splitlines()[0][:120]}); write it again"
        ) from None
    if dtype.itemsize != 1 or len(shape) != 1 or size - stream.tell() != shape[0]:
        raise BadFile(where, f"has shape {shape} of {dtype} in {size:,} bytes, expected one byte a token; {CUT_OFF}")
    return stream.tell(), shape[0]


def smallest_dtype(vocabulary: int) -> str:
    """The unsigned dtype that OLMo-core takes for a tokenizer of so many ids."""
    return next(name for name in ("uint8", "uint16", "uint32", "uint64") if vocabulary - 1 <= np.iinfo(name).max)


def require_plausible(numbers: Numbers, vocabulary: int) -> None:
    """BadFile where numbers whose dtype only follows from the tokenizer could be of twice the size as well."""
    size = numbers.dtype.itemsize
    wide = next((name for name in ("uint16", "uint32", "uint64") if np.dtype(name).itemsize == 2 * size), None)
    sample = numbers.read(0, min(numbers.count, SAMPLE_TOKENS))
    if wide is None or len(sample) < FEW or numbers.count % 2:
        return
    if (sample[: len(sample) // 2 * 2].view(np.dtype(wide).newbyteorder("<")) < vocabulary).all():
        raise BadFile(
            numbers.where,
            f"could be {numbers.dtype.name}, which the tokenizer's {vocabulary:,} ids fit in, or {wide}: every second number is "
            f"0; say which with --tokens-dtype",
        )


def other_dtypes(sample: np.ndarray, vocabulary: int) -> str:
    """What else the numbers of a file may be, of which one is no id: a hint for the message, or nothing."""
    data = sample.tobytes()
    swapped = sample.byteswap()
    if sample.dtype.itemsize > 1 and (swapped < vocabulary).all() and (swapped >= 0).all():
        return "; all would be ids if they were big-endian, so write the file again as little-endian"
    for name in ("uint16", "uint32", "uint64"):
        dtype = np.dtype(name)
        if dtype.itemsize == sample.dtype.itemsize or len(data) % dtype.itemsize:
            continue
        if (np.frombuffer(data, dtype.newbyteorder("<")) < vocabulary).all():
            return f"; all would be ids as {name}: pass --tokens-dtype {name}"
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


def open_numbers(
    where: str, file: pa.NativeFile, asked: str, vocabulary: int, tokens: int | None
) -> tuple[Numbers, bool]:
    """The numbers of X.npy, and whether their dtype only follows from the tokenizer.

    asked: --tokens-dtype, or auto. tokens: how many there are, where a file beside it says so.
    """
    header = numpy_header(where, file)
    if header is not None:
        dtype, first, count = header
        if asked not in ("auto", dtype):
            raise BadFile(where, f"its header says {dtype}, --tokens-dtype {asked}; leave --tokens-dtype out")
        return Numbers(where, file, dtype, first, count), False
    size = file.size()
    if not size:
        raise BadFile(where, f"0 bytes, expected token ids; {CUT_OFF}")
    if asked != "auto":
        return Numbers(where, file, asked, 0, whole_numbers(where, size, asked)), False
    if tokens:
        each = size / tokens
        dtype = next((name for name in DTYPES[:4] if np.dtype(name).itemsize == each), "")
        if not dtype:
            raise BadFile(
                where, f"{size:,} bytes, the mask beside it is of {tokens:,} tokens; they do not belong together"
            )
        return Numbers(where, file, dtype, 0, tokens), False
    dtype = smallest_dtype(vocabulary)
    return Numbers(where, file, dtype, 0, whole_numbers(where, size, dtype)), True
