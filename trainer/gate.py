"""Which tokens of a step are gated: those whose stored entropy is at most a quantile of the entropies of their scope.

Entropies are stored, so nothing has to be computed by a model: those of the whole global batch are gathered before the first
forward, and every rank finds the same threshold, however the batch is divided.

The threshold is the entropy of rank floor(q (N - 1)), counted from 0 in ascending order, of the N predicted tokens of the
scope: the lower of the two between which the q-th quantile lies. All tokens with this entropy or less are gated, ties
included. A gated token of which no top k is stored (remit score --top-k-below-entropy) trains on its next-token loss like one
that is not gated, and is counted.
"""

from dataclasses import replace
from fractions import Fraction

import numpy as np
import torch

from trainer.batch import GATED, Row
from trainer.distributed import World
from trainer.objectives.objective import Gate, Objective


def quantile(values_N: np.ndarray, share: float) -> float:
    """The value of rank floor(share (N - 1)), N >= 1; the share is taken as the decimal number that was typed."""
    rank = int(Fraction(str(share)) * (len(values_N) - 1))
    return float(np.partition(values_N, rank)[rank])


def gate_rows(objective: Objective, micro_batches: list[list[Row]], world: World) -> list[list[Row]]:
    """The rows of this rank's micro-batches with what `objective.loss` and `.ungated_loss` read of the gate.

    Columns: "gated" bool; "weight", of a token's own loss, so that the sum over the scope divided by its predicted tokens is
    the mean over the gated and the mean over the others, added up; "gate_entropy", the threshold; "gate_without_topk", 1
    where a token is below it and has no top k.
    """
    gate = objective.gate
    assert gate is not None
    if objective.scope == "global":
        rows = [row for rows in micro_batches for row in rows]
        remaining = iter(_gated(rows, gate, world))
        return [[next(remaining) for _ in rows] for rows in micro_batches]
    alone = World(world.device)  # of one forward pass
    return [_gated(rows, gate, alone) for rows in micro_batches]


def _gated(rows: list[Row], gate: Gate, world: World) -> list[Row]:
    own = [row.columns[gate.column][row.predicted] for row in rows]
    entropies_N = world.gather(torch.from_numpy(np.concatenate([np.zeros(0, np.float32), *own]))).numpy()
    if not len(entropies_N):
        return [
            _with_gate(row, np.zeros(len(row.input_ids), bool), np.zeros(len(row.input_ids), bool), 0, 0, 0)
            for row in rows
        ]
    threshold = quantile(entropies_N, gate.quantile)
    below = [row.predicted & (row.columns[gate.column] <= threshold) for row in rows]
    gated = [mask & (row.columns["topk_ids"][:, 0] >= 0) for row, mask in zip(rows, below)]
    count = int(world.sum(torch.tensor([sum(int(mask.sum()) for mask in gated)])))
    total = len(entropies_N)
    weight, other = (total / count if count else 0.0), (total / (total - count) if count < total else 0.0)
    return [
        _with_gate(row, mask, wanted & ~mask, weight, other, threshold) for row, mask, wanted in zip(rows, gated, below)
    ]


def _with_gate(row: Row, gated: np.ndarray, lacking: np.ndarray, weight: float, other: float, threshold: float) -> Row:
    columns = {
        GATED: gated,
        "weight": np.where(gated, np.float32(weight), np.float32(other)),
        "gate_entropy": np.full(len(gated), threshold, np.float32),
        "gate_without_topk": lacking.astype(np.float32),
    }
    return replace(row, columns={**row.columns, **columns})
