"""Rows, and micro-batches of them. B rows of at most T tokens, K most probable tokens stored for each."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

GATED = "gated"  # column that trainer/gate.py adds


@dataclass(frozen=True)
class Row:
    """One row. where: part and row for messages; source: index of its corpus file; input_ids: int32 [T]; doc_lengths:
    int32 [pieces]; predicted: bool [T], of what precedes and is to be predicted; columns: stored columns of the reference without its name, 0 where not
    predicted: "logprobs" float32 [T], "topk_ids" int32 [T, K], "topk_logprobs" float32 [T, K]."""

    where: str
    source: int
    input_ids: np.ndarray
    doc_lengths: np.ndarray
    predicted: np.ndarray
    columns: Mapping[str, np.ndarray]

    def silent(self) -> "Row":
        """The same tokens, none of them predicted: the row keeps its place and trains on nothing."""
        columns = {name: np.zeros_like(values) for name, values in self.columns.items()}
        return replace(self, predicted=np.zeros_like(self.predicted), columns=columns)


@dataclass(frozen=True)
class MicroBatch:
    """Rows padded on the right. predicted_BT: bool, true where x_t counts (never at t = 0), on the CPU so that a GPU need
    not be waited for. gated_BT: bool, likewise on the CPU, of an objective with a gate. columns: as of a Row, [B, T] or [B, T, K]. document_BT: int64, which document piece of the row;
    None: it is one. position_ids_BT: None in packed context, else they restart with each document. sources: corpus file
    of each row, for the figures of a step. lengths: tokens of each row, without the padding. doc_lengths: in document
    context of each document, row after row, the padding included."""

    input_ids_BT: Tensor
    predicted_BT: Tensor
    columns: Mapping[str, Tensor] = field(default_factory=dict)
    document_BT: Tensor | None = None
    position_ids_BT: Tensor | None = None
    sources: tuple[int, ...] | None = None
    lengths: tuple[int, ...] = ()
    gated_BT: Tensor | None = None
    doc_lengths: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Of all rows, without the padding."""
        return sum(self.lengths)


def collate(rows: list[Row], context: str, device: torch.device | str, length: int | None = None) -> MicroBatch:
    """Pad rows on the right to `length` tokens, default the longest one, and move them to `device`; no rows: one that
    predicts nothing."""
    length = length or max((len(row.input_ids) for row in rows), default=2)
    shape = (max(1, len(rows)), length)
    input_ids = np.zeros(shape, dtype=np.int64)
    predicted = np.zeros(shape, dtype=bool)
    document = np.zeros(shape, dtype=np.int64)
    positions = np.tile(np.arange(length), (shape[0], 1))
    columns = {
        name: np.zeros((*shape, *values.shape[1:]), dtype=values.dtype)
        for name, values in (rows[0].columns if rows else {}).items()
    }
    for index, row in enumerate(rows):
        tokens = len(row.input_ids)
        input_ids[index, :tokens] = row.input_ids
        predicted[index, :tokens] = row.predicted
        for name, values in row.columns.items():
            columns[name][index, :tokens] = values
        starts = np.cumsum(row.doc_lengths) - row.doc_lengths
        positions[index, :tokens] -= np.repeat(starts, row.doc_lengths)
        positions[index, tokens:] -= tokens  # the padding is a document of its own
        document[index, :tokens] = np.repeat(np.arange(len(starts)), row.doc_lengths)
        document[index, tokens:] = len(starts)

    gated = columns.pop(GATED, None)

    def move(values: np.ndarray) -> Any:
        tensor = torch.from_numpy(values)
        # pinned memory lets the copy run beside the computation
        return tensor.pin_memory().to(device, non_blocking=True) if torch.device(device).type == "cuda" else tensor

    return MicroBatch(
        move(input_ids),
        torch.from_numpy(predicted),
        {name: move(values) for name, values in columns.items()},
        move(document),
        move(positions) if context == "document" else None,
        tuple(row.source for row in rows) or (0,),
        tuple(len(row.input_ids) for row in rows) or (0,),
        torch.zeros(shape, dtype=torch.bool) if gated is None else torch.from_numpy(gated),
        _doc_lengths(rows, length) if context == "document" else None,
    )


def _doc_lengths(rows: list[Row], length: int) -> tuple[int, ...]:
    """Of the documents in rows that are padded to `length`; the padding of a row is one."""
    lengths = [[*row.doc_lengths.tolist(), length - len(row.input_ids)] for row in rows] or [[length]]
    return tuple(own for of_row in lengths for own in of_row if own)
