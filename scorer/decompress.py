"""The bytes inside a compressed file, read in pieces: all its frames, none of them taken for whole when it is cut off.

In: a file of gzip members, zstd frames, bzip2 or xz streams. Out: a stream to read from. The readers that come with
the libraries stop early without an error (zstandard's at a cut, Python's bz2 at a damaged second stream) or know no
long windows (pyarrow's: 128 MiB), so the frames are followed here.
"""

import bz2
import io
import lzma
import os
import zlib
from typing import Any

import zstandard

MAX_WINDOW = 1 << 31  # of a zstd frame; the most that zstd --long=31 makes
PLAIN_WINDOW = 1 << 27  # what zstd itself decompresses without being asked
READ_BYTES = 1 << 14
PIECE_BYTES = {"zstd": 1 << 10}  # given to it at once: zstd may make 32 MiB of that, and cannot be told to stop
OUTPUT_BYTES = 1 << 20
PADDED = ("gzip", "xz")  # zero bytes may follow the last frame, as tapes and xz leave them


def window_of_each(threads: int) -> int:
    """The largest window, in bytes, for each of the files that are read at once on this machine, with so many threads
    each: together at most half of its memory, and always what zstd decompresses without being asked."""
    files = max(1, (os.cpu_count() or 1) // threads)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(PLAIN_WINDOW, min(MAX_WINDOW, memory // 2 // files))


class Damaged(ValueError):
    """A compressed file cannot be read to its end; the message says why, without its name."""


class _Zstd:
    def __init__(self, max_window: int) -> None:
        self._frame = zstandard.ZstdDecompressor(max_window_size=max_window).decompressobj()

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._frame.decompress(data)

    @property
    def eof(self) -> bool:
        return self._frame.eof

    @property
    def unused_data(self) -> bytes:
        return self._frame.unused_data


class _Gzip:
    def __init__(self) -> None:
        self._member = zlib.decompressobj(wbits=31)

    def decompress(self, data: bytes, max_length: int) -> bytes:
        return self._member.decompress(self._member.unconsumed_tail + data, max_length)

    @property
    def eof(self) -> bool:
        return self._member.eof

    @property
    def unused_data(self) -> bytes:
        return self._member.unused_data


class Decompressed(io.RawIOBase):
    """What the compressed file `raw` holds. codec: gzip, zstd, bzip2 or xz.

    max_window: bytes that a frame may make its reader keep. Reading raises Damaged where the file is cut off, damaged
    or wants more, and what `raw` raises where that cannot be read.
    """

    def __init__(self, raw: Any, codec: str, max_window: int = MAX_WINDOW) -> None:
        self._raw, self._codec, self._max_window = raw, codec, max_window
        self._piece_bytes = PIECE_BYTES.get(codec, READ_BYTES)
        self._input, self._position = b"", 0
        self._output = memoryview(b"")
        self._frame: Any = None  # None: between two frames
        self._more = False  # the last answer was as long as allowed, so there may be more without further input

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._output:
            self._output = memoryview(self._next())
        count = min(len(buffer), len(self._output))
        buffer[:count] = self._output[:count]
        self._output = self._output[count:]
        return count

    def _new_frame(self) -> Any:
        if self._codec == "zstd":
            return _Zstd(self._max_window)
        if self._codec == "gzip":
            return _Gzip()
        if self._codec == "bzip2":
            return bz2.BZ2Decompressor()
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=self._max_window)

    def _piece(self) -> bytes:
        """The next bytes of the file, b"" at its end."""
        if self._position >= len(self._input):
            self._input, self._position = self._raw.read(READ_BYTES), 0
        piece = self._input[self._position : self._position + self._piece_bytes]
        self._position += len(piece)
        return piece

    def _next(self) -> bytes:
        """The next bytes that come out, b"" after the last frame."""
        while True:
            data = b"" if self._more else self._piece()
            if not data and not self._more:
                if self._frame is None:
                    return b""
                raise Damaged(f"the file ends in the middle of its {self._codec} data; it was cut off, write it again")
            if self._frame is None:
                if self._codec in PADDED and not (data := data.lstrip(b"\0")):
                    continue
                self._frame = self._new_frame()
            try:
                out = self._frame.decompress(data, OUTPUT_BYTES)
            except (zlib.error, zstandard.ZstdError, lzma.LZMAError, OSError, EOFError) as error:
                raise Damaged(self._fault(str(error))) from None
            self._more = len(out) >= OUTPUT_BYTES and self._codec != "zstd"
            if self._frame.eof:
                unused = self._frame.unused_data
                self._position -= len(unused)
                self._frame, self._more = None, False
            if out:
                return out

    def _fault(self, reason: str) -> str:
        if "too much memory" in reason or "limit" in reason:
            window = f"more than {self._max_window >> 20:,} MiB"
            how = "zstd --long=31 -d" if self._codec == "zstd" else "xz -d"
            return (
                f"a long window: its {self._codec} data need {window} to decompress, the most that each of the files "
                f"read at once may have here; decompress it with {how}, or pass a smaller --num-workers"
            )
        return f"{reason}: its {self._codec} data are damaged; write the file again"
