"""Where the bytes of an Arrow file are: its record batch messages, and the columns within each.

Arrow tells its readers nothing of this, so the flatbuffers are read here, by position. Their fields, from Apache Arrow's
format/File.fbs and format/Message.fbs: Footer.recordBatches is field 3, a Block has 24 bytes and begins with its int64
offset; Message.header is field 2, RecordBatch.buffers field 2, a Buffer is two int64, offset in the body and length. A
message is 0xFFFFFFFF, an int32 size, a flatbuffer of that size, and the body; the body is the buffers of the columns, one
after the other, each padded.
"""

import struct
from collections.abc import Iterator

import pyarrow as pa

END_BYTES = 10  # the footer's size, int32, and "ARROW1"
FOOTER_RECORD_BATCHES, BLOCK_BYTES = 3, 24
MESSAGE_HEADER = RECORD_BATCH_BUFFERS = 2
PREFIX = struct.Struct("<Ii")  # 0xFFFFFFFF and the size of the flatbuffer
CONTINUES = 0xFFFFFFFF


def field_at(table: memoryview, position: int, field: int) -> int:
    """Position of a field of the flatbuffer table at `position`, 0 where it is absent."""
    vtable = position - struct.unpack_from("<i", table, position)[0]
    if 4 + 2 * field >= struct.unpack_from("<H", table, vtable)[0]:
        return 0
    offset = struct.unpack_from("<H", table, vtable + 4 + 2 * field)[0]
    return position + offset if offset else 0


def follow(table: memoryview, position: int) -> int:
    """Position that the offset at `position` leads to."""
    return position + struct.unpack_from("<I", table, position)[0]


def batch_offsets(data: pa.Buffer) -> list[int]:
    """Offsets of the messages that the footer of an Arrow file names as its record batches; struct.error where it cannot be
    read."""
    end = data.size - END_BYTES
    size = struct.unpack_from("<i", memoryview(data), end)[0]
    if not 0 < size <= end:
        raise struct.error("the footer is not inside the file")
    footer = memoryview(data)[end - size : end]
    blocks = field_at(footer, follow(footer, 0), FOOTER_RECORD_BATCHES)
    if not blocks:
        return []
    vector = follow(footer, blocks)
    count = struct.unpack_from("<I", footer, vector)[0]
    offsets = [struct.unpack_from("<q", footer, vector + 4 + BLOCK_BYTES * index)[0] for index in range(count)]
    if not all(0 < offset < end for offset in offsets):
        raise struct.error("a record batch is not inside the file")
    return offsets


def record_batch_messages(data: pa.Buffer) -> Iterator[pa.ipc.Message]:
    """The messages that the footer of an Arrow file names as its record batches."""
    for offset in batch_offsets(data):
        yield pa.ipc.read_message(pa.BufferReader(data.slice(offset)))


def buffers(metadata: memoryview) -> list[tuple[int, int]]:
    """Offset in the body and length of each buffer of a record batch message, whose flatbuffer is `metadata`."""
    batch = follow(metadata, field_at(metadata, follow(metadata, 0), MESSAGE_HEADER))
    vector = follow(metadata, field_at(metadata, batch, RECORD_BATCH_BUFFERS))
    count = struct.unpack_from("<I", metadata, vector)[0]
    return [struct.unpack_from("<qq", metadata, vector + 4 + 16 * index) for index in range(count)]


def buffers_of(kind: pa.DataType) -> int:
    """Buffers that a column of this type has: validity and values, and offsets of its lists."""
    if pa.types.is_list(kind):
        return 2 + buffers_of(kind.value_type)
    if pa.types.is_fixed_size_list(kind):
        return 1 + buffers_of(kind.value_type)
    assert pa.types.is_primitive(kind), kind
    return 2


def column_ranges(metadata: memoryview, body_size: int, schema: pa.Schema) -> list[tuple[int, int]]:
    """Where in the body each column of `schema` begins and ends; together they are the whole body.

    struct.error where the message has other buffers than such columns, or not one after the other.
    """
    places, counts = buffers(metadata), [buffers_of(field.type) for field in schema]
    if sum(counts) != len(places):
        raise struct.error(f"a record batch has {len(places)} buffers, its columns have {sum(counts)}")
    end = 0
    for offset, length in places:
        if offset < end or length < 0:
            raise struct.error("its buffers do not stand one after the other")
        end = offset + length
    if end > body_size:
        raise struct.error("its buffers do not fit into its body")
    first, starts = 0, []
    for count in counts:
        starts.append(places[first][0])
        first += count
    if starts[0] != 0:
        raise struct.error("its first buffer is not at the start of its body")
    return list(zip(starts, [*starts[1:], body_size]))
