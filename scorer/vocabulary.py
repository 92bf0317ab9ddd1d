"""Which token ids the rows of a corpus have, put together from what the tasks of pack counted."""

import base64
import hashlib
import zlib
from collections import Counter

import numpy as np

from shards.tokens import encode_token_ids


class Vocabulary:
    """Which ids the rows of all sources have, and how often the added tokens occur."""

    def __init__(self, size: int) -> None:
        self._occurs_V = np.zeros(size, dtype=bool)
        self._added: Counter[str] = Counter()

    def add(self, record: dict) -> None:
        """Take these counts out of a source's record, and what only its rerun needs: of many files they take much memory."""
        for name in ("key", "settings"):
            record.pop(name)
        self._occurs_V |= unpack_bits(record.pop("occurs"), len(self._occurs_V))
        self._added.update(record.pop("added_tokens"))

    def token_ids(self) -> bytes:
        """Content of _tokenizer/token_ids.json."""
        return encode_token_ids(self._occurs_V)

    def added_tokens(self) -> dict[str, int]:
        """How often each of the added tokens that occur does."""
        return dict(sorted(self._added.items()))


def hashes(files: dict[str, bytes]) -> dict[str, str]:
    """sha256 of each file's content, by name."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in sorted(files.items())}


def pack_bits(values: np.ndarray) -> str:
    """A bool array as text for a JSON record."""
    return base64.b64encode(zlib.compress(np.packbits(values).tobytes())).decode()


def unpack_bits(text: str, length: int) -> np.ndarray:
    """The inverse, bool [length]."""
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.unpackbits(packed, count=length).astype(bool)
