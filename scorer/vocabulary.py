"""Which token ids the rows of a corpus have, put together from what the tasks of pack counted."""

import base64
import hashlib
import zlib
from collections import Counter
from typing import Any

import numpy as np

from shards.tokens import encode_token_ids


class Vocabulary:
    """Which ids the rows of all sources have, and how often the added tokens occur."""

    def __init__(self, size: int) -> None:
        self._occurs_V = np.zeros(size, dtype=bool)
        self._added: Counter[str] = Counter()

    def add(self, record: dict) -> None:
        """Take these counts out of a source's record: of many files they take much memory."""
        self._occurs_V |= unpack_bits(record.pop("occurs"), len(self._occurs_V))
        self._added.update(record.pop("added_tokens"))

    def token_ids(self) -> bytes:
        """Content of _token_ids.json."""
        return encode_token_ids(self._occurs_V)

    def description(self) -> dict[str, Any]:
        """What the manifest records of them."""
        sha256 = hashlib.sha256(self.token_ids()).hexdigest()
        return {"token_ids_sha256": sha256, "added_tokens": dict(sorted(self._added.items()))}


def pack_bits(values: np.ndarray) -> str:
    """A bool array as text for a JSON record."""
    return base64.b64encode(zlib.compress(np.packbits(values).tobytes())).decode()


def unpack_bits(text: str, length: int) -> np.ndarray:
    """The inverse, bool [length]."""
    packed = np.frombuffer(zlib.decompress(base64.b64decode(text)), dtype=np.uint8)
    return np.unpackbits(packed, count=length).astype(bool)
