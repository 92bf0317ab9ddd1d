"""Distillation from tokens drawn from the reference's whole distribution (sparse logit sampling, arXiv 2503.16870).

Of every place N ids are stored, drawn in proportion to the reference's probabilities (shards/samples.py), so each stands for a
probability of 1 / N. The cross entropy to them, -1 / N sum of log q(id), and its gradient have the expectation of those to the
whole distribution: nothing is cut off, where a top k leaves its tail out. It is the forward KL and the reference's entropy,
which no base can change.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.objectives.objective import Objective, TokenLosses, exponentiate
from trainer.objectives.settings import ObjectiveSettings


def sampled_losses(logits_NV: Tensor, targets_N: Tensor, sample_ids_NS: Tensor, kd_weight: float) -> TokenLosses:
    """A LogitLoss: (1 - kd_weight) * -log p of the target + kd_weight * cross entropy to the drawn ids; leaves the gradient in
    the place of the logits."""
    drawn_NS = logits_NV.gather(1, sample_ids_NS)
    target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    ntp_N, normaliser_N, _ = exponentiate(logits_NV, targets_N)
    cross_N = ntp_N + target_N - drawn_NS.mean(-1)
    logits_NV.div_(normaliser_N[:, None])
    share = torch.full_like(drawn_NS, -kd_weight / drawn_NS.shape[1])
    logits_NV.scatter_add_(1, sample_ids_NS, share)
    logits_NV.scatter_add_(1, targets_N[:, None], logits_NV.new_full((len(targets_N), 1), kd_weight - 1))
    return TokenLosses((1 - kd_weight) * ntp_N + kd_weight * cross_N, ntp_N, {"sampled_loss": cross_N})


def make(settings: ObjectiveSettings) -> Objective:
    def loss(logits_NV: Tensor, targets_N: Tensor, columns: Mapping[str, Tensor]) -> TokenLosses:
        return sampled_losses(logits_NV, targets_N, columns["sample_ids"], settings.kd_weight)

    return Objective(loss=loss, columns=("logprobs", "sample_ids"), figures=("sampled_loss",))
