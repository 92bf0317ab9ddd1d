"""What is read of the files of a folder, counted where its bytes come from."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pyarrow as pa

from shards.store import Store


class Reads:
    """Bytes by file, of all that is read of a store from now on."""

    def __init__(self, store: Store) -> None:
        self.bytes: Counter[str] = Counter()
        self.requests: Counter[str] = Counter()
        inner: dict[str, Callable[..., Any]] = {name: getattr(store, name) for name in ("read", "buffer", "fill")}

        def read(name: str) -> bytes:
            data: bytes = inner["read"](name)
            return self._count(name, data, len(data))

        def buffer(name: str) -> pa.Buffer:
            data = inner["buffer"](name)
            return self._count(name, data, data.size)

        def fill(name: str, pieces: list[tuple[int, memoryview]]) -> None:
            inner["fill"](name, pieces)
            self._count(name, None, sum(len(into) for _, into in pieces))
            self.requests[name] += len(pieces) - 1

        def refuse(name: str) -> None:
            raise AssertionError(f"{name} is opened for reads that nobody counts")

        vars(store).update(read=read, buffer=buffer, fill=fill, open=refuse)

    def _count(self, name: str, data: Any, size: int) -> Any:
        self.bytes[name] += size
        self.requests[name] += 1
        return data

    def of(self, suffix: str) -> int:
        """Bytes of the files whose names end so."""
        return sum(size for name, size in self.bytes.items() if name.endswith(suffix))
