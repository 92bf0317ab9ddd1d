"""Refuse a part whose compressed buffers would fill the memory: a zstd bomb.

Arrow allocates what a buffer's first eight bytes announce before it decompresses anything, and has no bound of
its own. So the announced sizes are added up first. They stand in the body of each record batch message, at
places that its flatbuffer header gives (format/Message.fbs of Apache Arrow: Message.header is field 2,
RecordBatch.buffers field 2, a Buffer is two int64, offset and length). Arrow reads the messages that the footer at
the file's end names (format/File.fbs: Footer.recordBatches is field 3, a Block begins with its int64 offset and
has 24 bytes), so these are the ones that count.
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

from shards.manifest import Manifest

END_BYTES = 10  # the footer's size, int32, and "ARROW1"
FOOTER_RECORD_BATCHES, BLOCK_BYTES = 3, 24
MESSAGE_HEADER = RECORD_BATCH_BUFFERS = 2


def _field(table: memoryview, position: int, field: int) -> int:
    """Position of a field of a flatbuffer table, 0 where it is absent."""
    vtable = position - struct.unpack_from("<i", table, position)[0]
    if 4 + 2 * field >= struct.unpack_from("<H", table, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", table, vtable + 4 + 2 * field)[0]
    return position + offset if offset else 0


def _follow(table: memoryview, position: int) -> int:
    return position + struct.unpack_from("<I", table, position)[0]


def record_batch_messages(data: pa.Buffer) -> Iterator[pa.ipc.Message]:
    """The messages that the footer of an Arrow file names as its record batches."""
    end = data.size - END_BYTES
    size = struct.unpack_from("<i", memoryview(data), end)[0]
    if not 0 < size <= end:
        raise struct.error("the footer is not inside the file")
    footer = memoryview(data)[end - size : end]
    blocks = _field(footer, _follow(footer, 0), FOOTER_RECORD_BATCHES)
    if not blocks:
        return
    vector = _follow(footer, blocks)
    for index in range(struct.unpack_from("<I", footer, vector)[0]):
        offset = struct.unpack_from("<q", footer, vector + 4 + BLOCK_BYTES * index)[0]
        if not 0 < offset < end:
            raise struct.error("a record batch is not inside the file")
        yield pa.ipc.read_message(pa.BufferReader(data.slice(offset)))


def announced_bytes(message: pa.ipc.Message) -> int:
    """Bytes that the buffers of a record batch message have once they are decompressed."""
    header, body = memoryview(message.metadata), memoryview(message.body)
    batch = _follow(header, _field(header, _follow(header, 0), MESSAGE_HEADER))
    vector = _follow(header, _field(header, batch, RECORD_BATCH_BUFFERS))
    count = struct.unpack_from("<I", header, vector)[0]
    total = 0
    for index in range(count):
        offset, length = struct.unpack_from("<qq", header, vector + 4 + 16 * index)
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


def check_decompressed_size(data: pa.Buffer, manifest: Manifest, schema: pa.Schema, where: str) -> None:
    """ValueError where `data`, an Arrow file, has more record batches than a part, or one announces more than its
    rows can need."""
    tokens = manifest.rows_per_batch * manifest.seq_len
    bound = int(bytes_per_token(schema) * (tokens + manifest.rows_per_batch)) + (1 << 16)
    most = -(-manifest.rows_per_part // manifest.rows_per_batch)
    try:
        for index, message in enumerate(record_batch_messages(data)):
            if message.type != "record batch":
                raise struct.error(f"its footer names a {message.type} as a record batch")
            announced = announced_bytes(message)
            if announced > bound:
                raise ValueError(
                    f"{where}: a record batch would decompress to {announced:,} bytes, {manifest.rows_per_batch} rows of "
                    f"{manifest.seq_len} tokens need at most {bound:,}; this is no part that remit wrote"
                )
            if index >= most:
                raise ValueError(
                    f"{where}: has more than {most} record batches, which {manifest.rows_per_part} rows of a part need; "
                    "this is no part that remit wrote"
                )
    except (struct.error, pa.ArrowException, OSError, EOFError) as error:
        raise ValueError(f"{where}: its messages cannot be read ({error}); this is no part that remit wrote") from None
