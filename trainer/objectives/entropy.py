"""Tokens weighted by the entropy of the reference (the gate of EAFT, arXiv 2601.02151, from a stored column).

w = min(1, H / ln 20), H the reference's entropy in nats: what the reference is sure of hardly trains, whether or not the text
agrees with it. EAFT takes the entropy of the model that trains, over its 20 most probable tokens, which is never above ln 20;
here it is that of the whole vocabulary, which may be.
"""

import math

from trainer.objectives.objective import Objective, Tokens, Weighted
from trainer.objectives.settings import ObjectiveSettings

FULL_WEIGHT = math.log(20)  # nats, from which on a token counts as in next-token prediction


def entropy_weights(tokens: Tokens) -> Weighted:
    return Weighted((tokens.columns["entropy"] / FULL_WEIGHT).clamp(0, 1))


def make(settings: ObjectiveSettings) -> Objective:
    return Objective(entropy_weights, columns=("logprobs", "entropy"))
