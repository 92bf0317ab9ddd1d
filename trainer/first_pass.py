"""Objectives that weigh the tokens of the whole global batch together: a first pass takes the losses.

Micro-batches are forwarded without gradients, losses and stored columns of all ranks are gathered, every rank computes
the same weights of the same tokens in the same order, and keeps those of its own rows.
"""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from trainer.batch import Row, collate
from trainer.distributed import World
from trainer.objectives.objective import Objective, Tokens, Weighted
from trainer.statistics import StepStatistics

WEIGHTS = "weights"
CLIPS = ("clipped_low", "clipped_high")


def given_weights(tokens: Tokens) -> Weighted:
    """The weights that `global_weights` has put among the columns."""
    return Weighted(tokens.columns[WEIGHTS], None, *(tokens.columns.get(name) for name in CLIPS))


def second_pass(objective: Objective) -> Objective:
    """What the training pass over rows with given weights minimises."""
    return replace(objective, weigh=given_weights, scope="row")


@torch.no_grad()
def global_weights(
    model: nn.Module,
    objective: Objective,
    micro_batches: list[list[Row]],
    context: str,
    world: World,
    pad_to: int | None = None,
) -> list[list[Row]]:
    """The rows of this rank's micro-batches with a column of weights. pad_to: tokens, as of `collate`.

    The choice is the same for any number of ranks and micro-batches, as far as the losses are the same bits. Every
    process holds the losses and columns of the whole global batch in CPU memory.
    """
    seen: list[Tokens] = []

    def record(tokens: Tokens) -> Weighted:
        columns = {name: values.cpu() for name, values in tokens.columns.items()}
        seen.append(Tokens(tokens.losses_N.cpu(), tokens.row_N, tokens.document_N.int().cpu(), columns))
        return Weighted(torch.ones_like(tokens.losses_N))

    recording = replace(objective, weigh=record, scope="row")
    for rows in micro_batches:
        model(collate(rows, context, world.device, pad_to), recording, 1, 1, StepStatistics(world.device))

    rows = [row for rows in micro_batches for row in rows]
    counts = torch.tensor([int(row.predicted.sum()) for row in rows], dtype=torch.int64)
    everyones = world.gather(counts)
    if world.size > 1:  # rank r has the rows r, r + size, ... of the global batch, and its tokens come together
        sizes = [int(size) for size in world.gather(torch.tensor([len(rows)]))]
        place = torch.cat([rank + world.size * torch.arange(size) for rank, size in enumerate(sizes)])
    else:
        place = torch.arange(len(rows))
    in_order = place.argsort()
    starts = (everyones.cumsum(0) - everyones)[in_order]
    ordered = everyones[in_order]
    row_N = torch.arange(len(ordered)).repeat_interleave(ordered)
    first_N = (starts - (ordered.cumsum(0) - ordered)).repeat_interleave(ordered)
    order_N = first_N.add_(torch.arange(len(first_N)))  # place of each token among the gathered ones
    del first_N

    def together(values: list[torch.Tensor]) -> torch.Tensor:
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

    weighted, first = [], 0
    for row, count in zip(rows, counts.tolist()):
        values = {name: np.zeros(len(row.input_ids), dtype=np.float32) for name in own}
        for name in own:
            values[name][row.predicted] = own[name][first : first + count]
        first += count
        weighted.append(replace(row, columns={**row.columns, **values}))
    remaining = iter(weighted)
    return [[next(remaining) for _ in rows] for rows in micro_batches]
