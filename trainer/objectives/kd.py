"""Knowledge distillation from the reference's stored top k: forward KL over the vocabulary, with a rule for the rest.

bucket: reference and base are compared over k + 1 outcomes, the last of which is "any other token". renormalise: the
reference's k probabilities are scaled to sum to 1, the base's are over its whole vocabulary. Rounded probabilities
that sum to more than 1 are scaled down to 1; with k = V nothing is missing, and this is dense distillation. The KL is
multiplied by temperature^2, so that its gradient does not shrink with the temperature (Hinton et al. 2015,
arXiv 1503.02531). With a temperature, bucket raises the probabilities of the k + 1 outcomes to 1 / temperature.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from trainer.objectives.objective import Objective, TokenLosses
from trainer.objectives.settings import ObjectiveSettings

TINY = 1e-30  # probability below which a log is not taken
BLOCK_ROWS = 64  # of a second set of logits, which only renormalise with a temperature needs


def teacher(topk_logprobs_NK: Tensor, temperature: float, bucket: bool) -> tuple[Tensor, Tensor]:
    """Reference probabilities, [N, K + 1] with the bucket and [N, K] without, and the mass [N] outside of the top k."""
    probabilities_NK = topk_logprobs_NK.exp()
    total_N1 = probabilities_NK.sum(-1, keepdim=True)
    probabilities_NK = probabilities_NK / total_N1.clamp(min=1)
    missing_N1 = (1 - total_N1).clamp(min=0)
    outcomes = torch.cat([probabilities_NK, missing_N1], dim=-1) if bucket else probabilities_NK
    if temperature != 1:
        outcomes = outcomes.pow(1 / temperature)
    return outcomes / outcomes.sum(-1, keepdim=True), missing_N1[:, 0]


def kl(target: Tensor, log_student: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension; 0 log 0 is 0."""
    return (torch.xlogy(target, target) - target * log_student).sum(-1)


def kd_losses(
    logits_NV: Tensor,
    targets_N: Tensor,
    ids_NK: Tensor,
    topk_logprobs_NK: Tensor,
    kd_weight: float,
    temperature: float,
    missing_mass: str,
) -> TokenLosses:
    """A LogitLoss: takes the logits, leaves the gradient in their place; one set of logits in memory."""
    whole = ids_NK.shape[1] == logits_NV.shape[1]
    bucket = missing_mass == "bucket" and not whole
    teacher_NO, missing_N = teacher(topk_logprobs_NK, temperature, bucket)
    scale = kd_weight * temperature**2
    plain = 1 - kd_weight

    top_NK, target_N1 = logits_NV.gather(1, ids_NK), logits_NV.gather(1, targets_N[:, None])
    largest_N1 = logits_NV.amax(-1, keepdim=True)
    exp_NV = logits_NV.sub_(largest_N1).exp_()
    # the rest is summed by itself: 1 minus the top k would lose its digits where it is small
    rest_N1 = exp_NV.scatter_(1, ids_NK, 0.0).sum(-1, keepdim=True)
    exp_NK = (top_NK - largest_N1).exp()
    normaliser_N1 = rest_N1 + exp_NK.sum(-1, keepdim=True)
    log_normaliser_N1 = largest_N1 + normaliser_N1.log()
    ntp_N = (log_normaliser_N1 - target_N1)[:, 0]
    log_q_NK, q_NK, q_rest_N1 = top_NK - log_normaliser_N1, exp_NK / normaliser_N1, rest_N1 / normaliser_N1

    if bucket:
        log_q_NO = torch.cat([log_q_NK, q_rest_N1.clamp(min=TINY).log()], dim=-1) / temperature
        log_q_NO = log_q_NO.log_softmax(-1) if temperature != 1 else log_q_NO
        kl_N = kl(teacher_NO, log_q_NO)
        gradient_NO = (log_q_NO.exp() - teacher_NO) / temperature  # by the log-probabilities of the outcomes
        rest_factor_N1 = plain + scale * gradient_NO[:, -1:] / q_rest_N1.clamp(min=TINY)
        exp_NV.mul_(rest_factor_N1 / normaliser_N1)
        exp_NV.scatter_(1, ids_NK, plain * q_NK + scale * gradient_NO[:, :-1])
    elif temperature == 1:
        kl_N = kl(teacher_NO, log_q_NK)
        exp_NV.div_(normaliser_N1).scatter_(1, ids_NK, q_NK - scale * teacher_NO)
    else:
        exp_NV.scatter_(1, ids_NK, exp_NK)
        kl_N = torch.empty_like(ntp_N)
        for start in range(0, len(exp_NV), BLOCK_ROWS):
            rows = slice(start, start + BLOCK_ROWS)
            student_nV = exp_NV[rows].pow(1 / temperature)
            sum_n1 = student_nV.sum(-1, keepdim=True)
            log_student_nK = (top_NK[rows] - largest_N1[rows]) / temperature - sum_n1.log()
            kl_N[rows] = kl(teacher_NO[rows], log_student_nK)
            student_nV.mul_(scale / temperature / sum_n1)
            student_nV.scatter_add_(1, ids_NK[rows], -scale / temperature * teacher_NO[rows])
            exp_NV[rows] = student_nV.add_(exp_NV[rows] * (plain / normaliser_N1[rows]))
    exp_NV.scatter_add_(1, targets_N[:, None], exp_NV.new_full((1, 1), -plain).expand(len(targets_N), 1))
    return TokenLosses(plain * ntp_N + scale * kl_N, ntp_N, {"kd_loss": kl_N, "missing_mass": missing_N})


def make(settings: ObjectiveSettings) -> Objective:
    def loss(logits_NV: Tensor, targets_N: Tensor, columns: Mapping[str, Tensor]) -> TokenLosses:
        return kd_losses(
            logits_NV, targets_N, columns["topk_ids"], columns["topk_logprobs"],
            settings.kd_weight, settings.temperature, settings.missing_mass,
        )  # fmt: skip

    columns = ("logprobs", "topk_ids", "topk_logprobs")  # the first for the figures of a step alone
    return Objective(loss=loss, columns=columns, figures=("kd_loss", "missing_mass"))
