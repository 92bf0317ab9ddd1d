"""Rows from the process that read them to the one that trains them: an exchange of bytes over the CPU, step by step.

A group of its own, because it runs in a thread beside the training and must not meet its collectives. All processes make the
same exchanges in the same order. An error of one is raised in all of them, as the same message.
"""

import struct
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

from trainer.distributed import World

_ROW = struct.Struct("<IQ")  # place in the global batch, bytes
ERRORS = {kind.__name__: kind for kind in (ValueError, OSError, RuntimeError)}


class Exchange(Protocol):
    """rank and size: of this process among those that take part."""

    rank: int
    size: int

    def swap(self, parcels: Sequence[bytes], error: Exception | None = None) -> list[bytes]:
        """Give each process its parcel; returns what this one gets from each of them. error: raised in all instead."""
        ...


class Alone:
    """One process: what it gives is what it gets."""

    rank, size = 0, 1

    def swap(self, parcels: Sequence[bytes], error: Exception | None = None) -> list[bytes]:
        if error:
            raise error
        return list(parcels)


class Processes:
    """Those of a world, over gloo."""

    def __init__(self, world: World) -> None:
        self.rank, self.size = world.rank, world.size
        self._group = dist.new_group(backend="gloo", timeout=world.timeout)

    def swap(self, parcels: Sequence[bytes], error: Exception | None = None) -> list[bytes]:
        sizes = torch.tensor([len(parcel) for parcel in parcels])
        if error:  # told by the sizes, so that nobody sends rows then
            parcels = [encode_error(error)] * self.size
            sizes = -torch.tensor([len(parcel) for parcel in parcels])
        incoming = torch.empty_like(sizes)
        dist.all_to_all_single(incoming, sizes, group=self._group)
        # an error goes to all, so what this process gets from each says who has one
        failed = bool((incoming < 0).any())
        received = torch.where(incoming < 0, -incoming, 0) if failed else incoming
        sent = (-sizes if error else torch.zeros_like(sizes)) if failed else sizes
        data = b"".join(parcels) if bool(sent.any()) else b""
        out = torch.empty(int(received.sum()), dtype=torch.uint8)
        given = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        dist.all_to_all_single(out, given, received.tolist(), sent.tolist(), group=self._group)
        everyones = [piece.numpy().tobytes() for piece in out.split(received.tolist())]
        if failed:
            raise decode_error(next(piece for piece in everyones if piece))
        return everyones


def encode_error(error: Exception) -> bytes:
    """Kind and message of an error; of other kinds than the known ones a RuntimeError that names it."""
    kind = next((name for name, known in ERRORS.items() if isinstance(error, known)), None)
    text = str(error) if kind else f"{type(error).__name__}: {error}"
    return f"{kind or 'RuntimeError'}\n{text}".encode(errors="replace")


def decode_error(data: bytes) -> Exception:
    """The error again."""
    kind, _, text = data.decode().partition("\n")
    return ERRORS[kind](text)


def make_parcels(places: Sequence[int], rows: Sequence[bytes], size: int) -> list[bytes]:
    """Rows of a global batch for each of `size` processes: the row at place p goes to process p modulo size."""
    parcels: list[list[bytes]] = [[] for _ in range(size)]
    for place, row in zip(places, rows):
        parcels[place % size] += [_ROW.pack(place, len(row)), row]
    return [b"".join(parcel) for parcel in parcels]


def open_parcels(parcels: Sequence[bytes]) -> dict[int, bytes]:
    """The rows of parcels by their place in the global batch."""
    found: dict[int, bytes] = {}
    for parcel in parcels:
        offset = 0
        while offset < len(parcel):
            place, length = _ROW.unpack_from(parcel, offset)
            offset += _ROW.size
            found[place] = parcel[offset : offset + length]
            offset += length
    return found
