"""Write a safetensors file piece by piece, where the library's own save_file wants all of its tensors in memory.

The format (https://github.com/huggingface/safetensors): the length of a header, 8 bytes little-endian; the header, JSON with
type, shape and place of each tensor; the values.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from trainer.layout import DTYPES

NAMES = {dtype: name for name, dtype in DTYPES.items()}


class SafetensorsWriter:
    """A file of tensors whose dtypes and shapes are known; their values come in any order, and in pieces."""

    def __init__(
        self, path: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str]
    ) -> None:
        self._dtypes = {name: dtype for name, (dtype, _) in tensors.items()}
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": dict(metadata)}
        self.nbytes = 0
        # as the library orders them: wide types first, so that each value is aligned
        for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
            dtype, shape = tensors[name]
            self._offsets[name] = self.nbytes
            self.nbytes += math.prod(shape) * dtype.itemsize
            place = [self._offsets[name], self.nbytes]
            header[name] = {"dtype": NAMES[dtype], "shape": list(shape), "data_offsets": place}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._begin = 8 + len(text)
        self._file = open(path, "xb")  # noqa: SIM115 - closed in close
        self._file.write(len(text).to_bytes(8, "little") + text)
        self._file.truncate(self._begin + self.nbytes)

    def write(self, name: str, values: Tensor, first: int = 0) -> None:
        """values: those from number `first` on in the order of memory, in the dtype of the tensor, on the CPU."""
        assert values.dtype == self._dtypes[name], (name, values.dtype)
        if values.numel():
            self._file.seek(self._begin + self._offsets[name] + first * values.dtype.itemsize)
            self._file.write(values.contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def close(self) -> None:
        """All values are there; they reach the disk before this returns."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
