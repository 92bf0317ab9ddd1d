"""RHO-1, selective language modelling (arXiv 2404.07965): train on the tokens with the largest excess loss.

The loss is the sum over the kept tokens divided by N * keep_ratio, so a kept token weighs 1 / keep_ratio.
"""

from torch import Tensor

from shards.keep_ratio import keep_count
from trainer.objectives.objective import Objective, Tokens, Weighted
from trainer.objectives.settings import ObjectiveSettings


def top_share(excess_N: Tensor, ratio: float) -> Tensor:
    """True for the keep_count(N, ratio) largest; among equals the earlier tokens. bool [N].

    The same numbers give the same choice on every device: stored log-probs are rounded, so equals are common.
    """
    kept = keep_count(len(excess_N), ratio)
    # not kthvalue: of that torch may have no deterministic form on a GPU
    threshold = excess_N.topk(kept, sorted=False).values.min()
    above_N, equal_N = excess_N > threshold, excess_N == threshold
    return above_N | (equal_N & (equal_N.cumsum(0) <= kept - above_N.sum()))


def make(settings: ObjectiveSettings) -> Objective:
    def weigh(tokens: Tokens) -> Weighted:
        excess_N = tokens.losses_N + tokens.columns["logprobs"]
        return Weighted(top_share(excess_N, settings.keep_ratio) / settings.keep_ratio, excess_N)

    return Objective(weigh, columns=("logprobs",), scope=settings.scope)
