"""Refuse a part whose compressed buffers would fill the memory: a zstd bomb.

Arrow allocates what a buffer's first eight bytes announce before it decompresses anything, and has no bound of
its own. So the announced sizes are added up first. They stand in the body of each record batch message, at
places that its flatbuffer gives (shards/message.py). Arrow reads the messages that the footer at the file's end names,
so these are the ones that count, unless a reader finds them by the commit record.
"""

import struct

import pyarrow as pa

from shards.manifest import Manifest
from shards.message import buffers, record_batch_messages


def announced_bytes(message: pa.ipc.Message) -> int:
    """Bytes that the buffers of a record batch message have once they are decompressed."""
    body, total = memoryview(message.body), 0
    for offset, length in buffers(memoryview(message.metadata)):
        if length >= 8:
            announced = struct.unpack_from("<q", body, offset)[0]
            if announced < -1:
                raise struct.error(f"a buffer announces {announced} bytes")
            total += length if announced == -1 else announced
    return total


def bytes_per_token(schema: pa.Schema) -> float:
    """Upper bound: every list of a row is at most as long as the row."""
    total = 0.0
    for field in schema:
        value = field.type.value_type if pa.types.is_list(field.type) else field.type
        entries = 1
        if pa.types.is_fixed_size_list(value):
            entries, value = value.list_size, value.value_type
        total += entries * (value.bit_width / 8 + 1 / 8) + 8  # values, validity, offsets
    return total


def check_message(message: pa.ipc.Message, manifest: Manifest, where: str) -> None:
    """ValueError unless a message is a record batch and announces no more than its rows can need.

    struct.error where it cannot be read.
    """
    if message.type != "record batch":
        raise struct.error(f"a {message.type} stands in the place of a record batch")
    tokens = manifest.rows_per_batch * manifest.seq_len
    bound = int(bytes_per_token(manifest.schema) * (tokens + manifest.rows_per_batch)) + (1 << 16)
    announced = announced_bytes(message)
    if announced > bound:
        raise ValueError(
            f"{where}: a record batch would decompress to {announced:,} bytes, {manifest.rows_per_batch} rows of "
            f"{manifest.seq_len} tokens need at most {bound:,}; this is no part that remit wrote"
        )


def check_count(batches: int, manifest: Manifest, where: str) -> None:
    """ValueError where there are more record batches than a part has."""
    most = -(-manifest.rows_per_part // manifest.rows_per_batch)
    if batches > most:
        raise ValueError(
            f"{where}: has more than {most} record batches, which {manifest.rows_per_part} rows of a part need; "
            "this is no part that remit wrote"
        )


def check_decompressed_size(data: pa.Buffer, manifest: Manifest, where: str) -> None:
    """ValueError where `data`, an Arrow file, has more record batches than a part, or one announces more than its
    rows can need."""
    try:
        for index, message in enumerate(record_batch_messages(data)):
            check_message(message, manifest, where)
            check_count(index + 1, manifest, where)
    except (struct.error, pa.ArrowException, OSError, EOFError) as error:
        raise ValueError(f"{where}: its messages cannot be read ({error}); this is no part that remit wrote") from None
