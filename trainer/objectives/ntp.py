"""Next-token prediction: every weight is 1."""

import torch

from trainer.objectives.objective import Objective, Tokens, Weighted
from trainer.objectives.settings import ObjectiveSettings


def ntp_weights(tokens: Tokens) -> Weighted:
    return Weighted(torch.ones_like(tokens.losses_N))


def make(settings: ObjectiveSettings) -> Objective:
    return Objective(ntp_weights)


NTP = Objective(ntp_weights)
