"""ReMiT: clip(2 sigmoid(delta - mean delta), 1 - epsilon, 1 + epsilon), Eq. 3-5 of arXiv 2602.03075, and its variants."""

from collections.abc import Callable

import torch
from torch import Tensor

from trainer.objectives.objective import Objective, Tokens, Weighted
from trainer.objectives.settings import ObjectiveSettings

MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": lambda x_N: 2 * torch.sigmoid(x_N),
    "exp": lambda x_N: torch.exp(x_N / 2),
    "linear": lambda x_N: (1 + x_N / 2).clamp(min=0),
}


def remit_weights(
    losses_N: Tensor,
    reference_logprobs_N: Tensor,
    epsilon: float,
    segment_N: Tensor | None = None,
    centred: bool = True,
    weight_map: str = "sigmoid",
) -> Weighted:
    """Weights of the N predicted tokens of one sequence.

    losses_N: float32, -log p of the base; reference_logprobs_N: float32, log p of the reference for the same tokens.
    segment_N: int64, ascending: tokens of one number have a mean of their own; None: one mean over all N, so N must
    be the whole sequence. epsilon: inf does not clip.
    """
    delta_N = losses_N + reference_logprobs_N  # Eq. 3: L_base - L_ref, and L_ref = -log p_ref
    if not centred:
        centre: Tensor | float = 0.0
    elif segment_N is None:
        centre = delta_N.mean()
    else:
        _, index_N, count_S = segment_N.unique_consecutive(return_inverse=True, return_counts=True)
        sum_S = torch.zeros(len(count_S), dtype=torch.float64, device=delta_N.device)
        centre = (sum_S.index_add_(0, index_N, delta_N.double()) / count_S)[index_N].float()
    raw_N = MAPS[weight_map](delta_N - centre)  # Eq. 4 and 5
    weights_N = raw_N.clamp(1 - epsilon, 1 + epsilon)
    return Weighted(weights_N, delta_N, raw_N < 1 - epsilon, raw_N > 1 + epsilon)


def make(settings: ObjectiveSettings) -> Objective:
    def weigh(tokens: Tokens) -> Weighted:
        return remit_weights(
            tokens.losses_N,
            tokens.columns["logprobs"],
            settings.epsilon,
            tokens.document_N if settings.centring == "document" else None,
            settings.centring != "none",
            settings.weight_map,
        )

    return Objective(weigh, columns=("logprobs",))
