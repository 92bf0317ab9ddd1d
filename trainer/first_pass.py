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


def given_weights(tokens: Tokens) -> Weighted:
    """The weights that `global_weights` has put among the columns."""
    logprobs_N = tokens.columns.get("logprobs")
    return Weighted(tokens.columns[WEIGHTS], None if logprobs_N is None else tokens.losses_N + logprobs_N)


def second_pass(objective: Objective) -> Objective:
    """What the training pass over rows with given weights minimises."""
    return replace(objective, weigh=given_weights, scope="row")


@torch.no_grad()
def global_weights(
    model: nn.Module, objective: Objective, micro_batches: list[list[Row]], context: str, world: World
) -> list[list[Row]]:
    """The rows of this rank's micro-batches with a column of weights.

    The choice is the same for any number of ranks and micro-batches, as far as the losses are the same bits. Holds
    the losses and columns of the whole global batch in CPU memory, some 30 bytes a token.
    """
    seen: list[Tokens] = []

    def record(tokens: Tokens) -> Weighted:
        columns = {name: values.cpu() for name, values in tokens.columns.items()}
        seen.append(Tokens(tokens.losses_N.cpu(), tokens.row_N, tokens.document_N.cpu(), columns))
        return Weighted(torch.ones_like(tokens.losses_N))

    recording = replace(objective, weigh=record, scope="row")
    for rows in micro_batches:
        model(collate(rows, context, world.device), recording, 1, 1, StepStatistics(world.device))

    rows = [row for rows in micro_batches for row in rows]
    counts = torch.tensor([int(row.predicted.sum()) for row in rows], dtype=torch.int64)
    place = world.rank + world.size * torch.arange(len(rows))  # of each row in the global batch
    own_row_N = place.repeat_interleave(counts)
    gathered_row_N = world.gather(own_row_N)
    order_N = gathered_row_N.argsort(stable=True)

    def together(values: list[torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        return world.gather(torch.cat(values) if values else like)[order_N]

    tokens = Tokens(
        together([tokens.losses_N for tokens in seen], torch.zeros(0)),
        gathered_row_N[order_N],
        together([tokens.document_N for tokens in seen], torch.zeros(0, dtype=torch.int64)),
        {name: together([tokens.columns[name] for tokens in seen], torch.zeros(0)) for name in objective.columns},
    )
    assert objective.weigh is not None
    weights_N = objective.weigh(tokens).weights_N
    own_N = weights_N[tokens.row_N % world.size == world.rank].numpy()

    weighted, first = [], 0
    for row, count in zip(rows, counts.tolist()):
        values = np.zeros(len(row.input_ids), dtype=np.float32)
        values[row.predicted] = own_N[first : first + count]
        first += count
        weighted.append(replace(row, columns={**row.columns, WEIGHTS: values}))
    remaining = iter(weighted)
    return [[next(remaining) for _ in rows] for rows in micro_batches]
