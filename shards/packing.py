"""Which document pieces share a row under `--packing best-fit`: the rule of the format, for what writes it and what checks it.

In: lengths of the pieces of a window, in the order of the documents. Out: the rows, each a list of places of these pieces.

A document is cut only where it is longer than a row: every piece but its last has seq_len tokens and is a row by itself, at
once. Pieces of less wait for a window, in the order of the documents, until there are `window_pieces` of them or they have
`window_tokens` tokens; then their rows are made by best-fit decreasing and the next window begins. The end of a corpus file
ends its last window. So a row holds pieces of one window alone, and windows follow each other in the order of the documents.
"""

import heapq
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

METHOD = "best-fit"
WINDOW_PIECES = 1 << 16
WINDOW_TOKENS = 1 << 23


@dataclass(frozen=True)
class Window:
    """When a window is full: at this many pieces, or tokens of them together."""

    pieces: int = WINDOW_PIECES
    tokens: int = WINDOW_TOKENS

    def is_full(self, pieces: int, tokens: int) -> bool:
        return pieces >= self.pieces or tokens >= self.tokens

    def entry(self) -> dict[str, Any]:
        """As the manifest has it, under `packing`."""
        return {"method": METHOD, "window_pieces": self.pieces, "window_tokens": self.tokens}

    @classmethod
    def of(cls, entry: dict[str, Any]) -> "Window":
        """That of a manifest; ValueError where it is of another method, or no window."""
        sizes = [entry.get("window_pieces"), entry.get("window_tokens")]
        if entry.get("method") != METHOD or not all(type(size) is int and size > 0 for size in sizes):
            raise ValueError(f"packing is {entry!r}, expected method {METHOD} with window_pieces and window_tokens")
        return cls(*sizes)  # type: ignore[arg-type]


def best_fit(lengths: Sequence[int], seq_len: int) -> list[list[int]]:
    """Rows of at most seq_len tokens by best-fit decreasing, as places in `lengths`, each 1..seq_len.

    The longest piece first, the earlier one of two that are equal: each goes to the row with the least room that it fits
    in (the one that was begun first where several have it), and begins a row where it fits in none. The places in a row
    ascend, and rows stand in the order of their last places: the row with the window's last piece is the last one.
    """
    rows: list[list[int]] = []
    free: list[int] = []  # the different amounts of room that rows have, ascending
    begun: dict[int, list[int]] = {}  # by room: a heap of the rows that have it
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        length = lengths[place]
        index = bisect_left(free, length)
        if index == len(free):
            row, room = len(rows), seq_len
            rows.append([])
        else:
            room = free[index]
            row = heapq.heappop(begun[room])
            if not begun[room]:
                del begun[room], free[index]
        rows[row].append(place)
        left = room - length
        if left:
            if left not in begun:
                begun[left] = []
                insort(free, left)
            heapq.heappush(begun[left], row)
    return sorted(map(sorted, rows), key=lambda row: row[-1])
