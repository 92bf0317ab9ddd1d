"""A row as compressed bytes: how rows wait in memory for the step that they train in, and travel between processes.

A third of what its arrays take; and once a row is taken, no record batch stays in memory because of it.
"""

import json
import struct
from collections.abc import Iterable

import numpy as np
import zstandard

from trainer.batch import Row

LEVEL = 1  # 300 MB/s and more on one core, where a GPU trains half a megabyte a second
_HEAD = struct.Struct("<I")


def pack_rows(rows: Iterable[Row]) -> list[bytes]:
    """Each row as bytes."""
    compressor = zstandard.ZstdCompressor(level=LEVEL, write_content_size=True)
    packed = []
    for row in rows:
        columns = [
            (name, values.dtype.str, values.shape[1:], np.ascontiguousarray(values))
            for name, values in row.columns.items()
        ]
        head = json.dumps(
            [row.where, row.source, len(row.input_ids), len(row.doc_lengths), [column[:3] for column in columns]]
        ).encode()
        arrays = (row.input_ids.astype("<i4"), row.doc_lengths.astype("<i4"), np.packbits(row.predicted))
        body = b"".join(array.tobytes() for array in (*arrays, *(column[3] for column in columns)))
        packed.append(_HEAD.pack(len(head)) + head + compressor.compress(body))
    return packed


def unpack_rows(packed: Iterable[bytes]) -> list[Row]:
    """The rows that these are."""
    decompressor = zstandard.ZstdDecompressor()
    return [_unpack(data, decompressor) for data in packed]


def _unpack(data: bytes, decompressor: zstandard.ZstdDecompressor) -> Row:
    (length,) = _HEAD.unpack_from(data)
    start = _HEAD.size + length
    where, source, tokens, pieces, columns = json.loads(data[_HEAD.size : start])
    body, offset = decompressor.decompress(memoryview(data)[start:]), 0

    def take(dtype: str, *shape: int) -> np.ndarray:
        nonlocal offset
        count = int(np.prod(shape))
        values = np.frombuffer(body, dtype, count, offset).reshape(shape)
        offset += values.nbytes
        return values

    input_ids, doc_lengths = take("<i4", tokens), take("<i4", pieces)
    predicted = np.unpackbits(take("u1", -(-tokens // 8)), count=tokens).astype(bool)
    return Row(
        where, source, input_ids, doc_lengths, predicted,
        {name: take(dtype, tokens, *shape) for name, dtype, shape in columns},
    )  # fmt: skip
