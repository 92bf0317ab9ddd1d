"""Token weights of whole micro-batches, for loops that keep batches as rectangles.

The same weights as trainer.objectives gives, without picking tokens out of a batch: shapes never depend on the data, so a GPU is
never waited for and CUDA graphs can record it. B rows of T positions.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from shards.keep_ratio import keep_count
from trainer.objectives.remit import MAPS
from trainer.objectives.settings import ObjectiveSettings


def row_objective(objective: str = "remit", **settings: Any) -> ObjectiveSettings:
    """Settings of an objective that weighs the tokens of a row by their losses and stored log-probs: remit, ntp or rho1.

    ValueError for one that needs more than that: top k, entropies, documents of a row, or all rows of a step.
    """
    if objective == "rho1":
        settings = {"scope": "row"} | settings
    chosen = ObjectiveSettings(objective=objective, **settings)  # type: ignore[arg-type]
    if objective not in ("remit", "ntp", "rho1") or chosen.centring == "document" or (
        objective == "rho1" and chosen.scope != "row"
    ):  # fmt: skip
        raise ValueError(
            f"objective {objective!r} with {settings} needs more than the losses and log-probs of a row, expected remit "
            "(centring row or none), ntp, or rho1 (scope row); remit train has the others"
        )
    return chosen


def row_weights(losses_BT: Tensor, logprobs_BT: Tensor, predicted_BT: Tensor, settings: ObjectiveSettings) -> Tensor:
    """Weight of each token in the loss, float32 [B, T], 0 where nothing is predicted; without gradient.

    losses_BT: -log p of the model for the token that a position predicts; logprobs_BT: stored log p of the reference for that
    same token; predicted_BT: bool, where it counts. Row means are taken over T, so T must be the whole row. What stands
    where nothing is predicted has no effect, NaN included.
    """
    count_B1 = predicted_BT.sum(dim=1, keepdim=True)
    if settings.objective == "ntp":
        return predicted_BT.float()
    excess_BT = (losses_BT.detach().float() + logprobs_BT.float()).masked_fill(~predicted_BT, 0.0)  # Eq. 3
    if settings.objective == "rho1":
        return _top_share(excess_BT, predicted_BT, count_B1, settings.keep_ratio)
    centre_B1: Tensor | float = 0.0
    if settings.centring == "row":
        centre_B1 = excess_BT.sum(dim=1, keepdim=True) / count_B1.clamp(min=1)
    weights_BT = MAPS[settings.weight_map](excess_BT - centre_B1)  # Eq. 4 and 5
    weights_BT = weights_BT.clamp(1 - settings.epsilon, 1 + settings.epsilon)
    return weights_BT.masked_fill(~predicted_BT, 0.0)


def _top_share(excess_BT: Tensor, predicted_BT: Tensor, count_B1: Tensor, ratio: float) -> Tensor:
    """RHO-1 within each row: 1 / ratio for the tokens with the largest excess, the earlier ones among equals."""
    order_BT = excess_BT.masked_fill(~predicted_BT, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank_BT = order_BT.argsort(dim=1)
    kept_B1 = _kept_counts(excess_BT.shape[1], ratio).to(excess_BT.device)[count_B1]
    return ((rank_BT < kept_B1) & predicted_BT).float() / ratio


@lru_cache(maxsize=8)
def _kept_counts(length: int, ratio: float) -> Tensor:
    """How many of 0..length tokens are kept, int64 [length + 1]."""
    return torch.tensor([0, *(keep_count(n, ratio) for n in range(1, length + 1))])
