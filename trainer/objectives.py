"""Token weights of each objective: pure functions of the losses and the stored log-probs of one sequence.

N = predicted tokens of the sequence. All logarithms are natural, all losses in nats. Weights are constants
for the gradient (arXiv 2602.03075, Eq. 14).
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Weighted:
    """weights_N, the delta losses they came from (None without a reference), and where the clip acted."""

    weights_N: Tensor
    delta_N: Tensor | None = None
    clipped_low_N: Tensor | None = None
    clipped_high_N: Tensor | None = None


Weigh = Callable[[Tensor, Tensor | None], Weighted]
"""(losses_N, reference_logprobs_N or None) -> Weighted, for the predicted tokens of one sequence."""


def ntp_weights(losses_N: Tensor, reference_logprobs_N: Tensor | None = None) -> Weighted:
    """Next-token prediction: every weight is 1."""
    return Weighted(torch.ones_like(losses_N))


def remit_weights(losses_N: Tensor, reference_logprobs_N: Tensor, epsilon: float) -> Weighted:
    """ReMiT: clip(2 sigmoid(delta - mean delta), 1 - epsilon, 1 + epsilon), Eq. 3-5.

    losses_N: float32, -log p of the base; reference_logprobs_N: float32, log p of the reference for the
    same tokens. The mean is over the N tokens given, so N must be the whole sequence.
    """
    delta_N = losses_N + reference_logprobs_N  # Eq. 3: L_base - L_ref, and L_ref = -log p_ref
    raw_N = 2 * torch.sigmoid(delta_N - delta_N.mean())  # Eq. 4 and 5
    weights_N = raw_N.clamp(1 - epsilon, 1 + epsilon)
    return Weighted(weights_N, delta_N, raw_N < 1 - epsilon, raw_N > 1 + epsilon)


def make_weigh(objective: str, epsilon: float) -> Weigh:
    """The weight function of an objective by its name on the command line."""
    if objective == "ntp":
        return ntp_weights
    if objective == "remit":

        def weigh(losses_N: Tensor, reference_logprobs_N: Tensor | None) -> Weighted:
            assert reference_logprobs_N is not None
            return remit_weights(losses_N, reference_logprobs_N, epsilon)

        return weigh
    raise ValueError(f"objective is {objective!r}, expected one of ntp, remit")


NEEDS_REFERENCE = {"ntp": False, "remit": True}
