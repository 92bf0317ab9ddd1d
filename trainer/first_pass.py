"""Objectives that weigh the tokens of the whole global batch together: a first pass takes the losses.

Micro-batches are forwarded without gradients, losses and stored columns of all ranks are gathered, every rank computes
the same weights of the same tokens in the same order, and keeps those of its own rows.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from trainer.batch import MicroBatch, Row
from trainer.distributed import World
from trainer.gate import gate_rows
from trainer.objectives.objective import Objective, Tokens, Weighted
from trainer.statistics import StepStatistics

WEIGHTS = "weights"
CLIPS = ("clipped_low", "clipped_high")


def given_weights(tokens: Tokens) -> Weighted:
    """The weights that `global_weights` has put among the columns."""
    return Weighted(tokens.columns[WEIGHTS], None, *(tokens.columns.get(name) for name in CLIPS))


def first_pass(
    model: nn.Module,
    objective: Objective,
    micro_batches: list[list[Row]],
    collate: Callable[[list[Row]], MicroBatch],
    world: World,
) -> tuple[list[list[Row]], Objective]:
    """Micro-batches and objective of the training pass: the given ones, unless the objective has "global" scope or a gate."""
    if objective.gate is not None:
        return gate_rows(objective, micro_batches, world), replace(objective, scope="row")
    if objective.scope != "global":
        return micro_batches, objective
    if len(micro_batches) * world.size == 1:
        return micro_batches, replace(objective, scope="micro")  # the micro-batch is the global batch
    weighted = global_weights(model, objective, micro_batches, collate, world)
    return weighted, replace(objective, weigh=given_weights, scope="row")


@torch.no_grad()
def global_weights(
    model: nn.Module,
    objective: Objective,
    micro_batches: list[list[Row]],
    collate: Callable[[list[Row]], MicroBatch],
    world: World,
) -> list[list[Row]]:
    """The rows of this rank's micro-batches with a column of weights.

    The choice is the same for any number of ranks and micro-batches, as far as the losses are the same bits. Every
    process holds the losses and columns of the whole global batch in CPU memory.
    """
    seen = own_tokens(model, objective, micro_batches, collate, world)
    rows = [row for rows in micro_batches for row in rows]
    counts = torch.tensor([int(row.predicted.sum()) for row in rows], dtype=torch.int64)
    row_N, order_N = global_order(counts, world)

    def together(values: list[Tensor]) -> Tensor:
        return world.gather(torch.cat(values) if values else torch.zeros(0))[order_N]

    tokens = Tokens(
        together([tokens.losses_N for tokens in seen]),
        row_N,
        together([tokens.document_N for tokens in seen]),
        {name: together([tokens.columns[name] for tokens in seen]) for name in objective.columns},
    )
    seen.clear()
    assert objective.weigh is not None
    found = objective.weigh(tokens)
    columns = {WEIGHTS: found.weights_N, **{name: getattr(found, f"{name}_N") for name in CLIPS}}
    mine_N = row_N % world.size == world.rank
    own = {name: values[mine_N].float().numpy() for name, values in columns.items() if values is not None}
    remaining = iter(with_columns(rows, counts.tolist(), own))
    return [[next(remaining) for _ in rows] for rows in micro_batches]


def own_tokens(
    model: nn.Module,
    objective: Objective,
    micro_batches: list[list[Row]],
    collate: Callable[[list[Row]], MicroBatch],
    world: World,
) -> list[Tokens]:
    """Losses and stored columns of this rank's predicted tokens, on the CPU, from a forward of each micro-batch."""
    seen: list[Tokens] = []

    def record(tokens: Tokens) -> Weighted:
        columns = {name: values.cpu() for name, values in tokens.columns.items()}
        seen.append(Tokens(tokens.losses_N.cpu(), tokens.row_N, tokens.document_N.int().cpu(), columns))
        return Weighted(torch.ones_like(tokens.losses_N))

    recording = replace(objective, weigh=record, scope="row", z_loss=0.0)
    for rows in micro_batches:
        model(collate(rows), recording, 1, 1, StepStatistics(world.device))
    return seen


def global_order(counts: Tensor, world: World) -> tuple[Tensor, Tensor]:
    """Of the predicted tokens of the global batch, row after row: the row, and the place among the gathered tokens.

    counts: int64, predicted tokens of each row of this rank. Both int64 [N], N over all ranks.
    """
    everyones = world.gather(counts)
    if world.size > 1:  # rank r has the rows r, r + size, ... of the global batch, and its tokens come together
        sizes = [int(size) for size in world.gather(torch.tensor([len(counts)]))]
        place = torch.cat([rank + world.size * torch.arange(size) for rank, size in enumerate(sizes)])
    else:
        place = torch.arange(len(counts))
    in_order = place.argsort()
    starts = (everyones.cumsum(0) - everyones)[in_order]
    ordered = everyones[in_order]
    row_N = torch.arange(len(ordered)).repeat_interleave(ordered)
    first_N = (starts - (ordered.cumsum(0) - ordered)).repeat_interleave(ordered)
    return row_N, first_N.add_(torch.arange(len(first_N)))


def with_columns(rows: list[Row], counts: list[int], values: dict[str, np.ndarray]) -> list[Row]:
    """The rows with more columns. counts: predicted tokens of each; values: of these tokens, row after row."""
    extended, first = [], 0
    for row, count in zip(rows, counts):
        columns = {name: np.zeros(len(row.input_ids), dtype=np.float32) for name in values}
        for name, column in columns.items():
            column[row.predicted] = values[name][first : first + count]
        first += count
        extended.append(replace(row, columns={**row.columns, **columns}))
    return extended
