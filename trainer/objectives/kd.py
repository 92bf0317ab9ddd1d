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

BLOCK_TOKENS = 64  # at once where a second set of logits is needed: renormalise with a temperature


def teacher(topk_logprobs_NK: Tensor, temperature: float, bucket: bool) -> tuple[Tensor, Tensor]:
    """Reference probabilities, [N, K + 1] with the bucket and [N, K] without, and the mass [N] outside of the top k."""
    log_total_N1 = topk_logprobs_NK.logsumexp(-1, keepdim=True)
    missing_N1 = -torch.expm1(log_total_N1.clamp(max=0))
    log_NO = topk_logprobs_NK - log_total_N1.clamp(min=0)
    if bucket:
        log_NO = torch.cat([log_NO, missing_N1.log()], dim=-1)
    # in logs, because a small probability to the power of 1 / temperature may be 0 in float32
    return (log_NO / temperature).softmax(-1), missing_N1[:, 0]


def kl(target: Tensor, log_student: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension; 0 log 0 is 0."""
    return (torch.xlogy(target, target) - target * log_student.clamp(min=-1e30)).sum(-1)


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
    bucket = missing_mass == "bucket" and ids_NK.shape[1] < logits_NV.shape[1]
    length = len(logits_NV) if bucket or temperature == 1 else BLOCK_TOKENS
    spans = [slice(start, start + length) for start in range(0, len(logits_NV), length)]
    parts = [
        _block(
            logits_NV[span], targets_N[span], ids_NK[span], topk_logprobs_NK[span], kd_weight, temperature, bucket
        )
        for span in spans
    ]  # fmt: skip
    ntp, divergence, missing = zip(*parts)
    ntp_N, kl_N = torch.cat(ntp), torch.cat(divergence)
    losses_N = (1 - kd_weight) * ntp_N + kd_weight * temperature**2 * kl_N
    return TokenLosses(losses_N, ntp_N, {"kd_loss": kl_N, "missing_mass": torch.cat(missing)})


def _block(
    logits_NV: Tensor,
    targets_N: Tensor,
    ids_NK: Tensor,
    topk_logprobs_NK: Tensor,
    kd_weight: float,
    temperature: float,
    bucket: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """-log p of the targets, KL and missing mass of the reference, [N] each; the gradient in the logits' place."""
    plain, scale = 1 - kd_weight, kd_weight * temperature  # temperature^2, once divided by it in the chain rule
    teacher_NO, missing_N = teacher(topk_logprobs_NK, temperature, bucket)
    top_NK, target_N1 = logits_NV.gather(1, ids_NK), logits_NV.gather(1, targets_N[:, None])

    # the rest is summed by itself: 1 minus the top k would lose its digits where it is small
    rest_NV = logits_NV.scatter_(1, ids_NK, -torch.inf)
    largest_N1 = rest_NV.amax(-1, keepdim=True).clamp(min=-1e30)  # -inf where the top k are the whole vocabulary
    student_NV = ((rest_NV - largest_N1) / temperature).exp_() if not bucket and temperature != 1 else None
    rest_N1 = rest_NV.sub_(largest_N1).exp_().sum(-1, keepdim=True)
    log_rest_N1 = largest_N1 + rest_N1.log()
    log_sum_N1 = torch.cat([top_NK, log_rest_N1], dim=-1).logsumexp(-1, keepdim=True)
    plain_factor_N1 = plain * (largest_N1 - log_sum_N1).exp()

    if bucket:
        log_q_NO = (torch.cat([top_NK, log_rest_N1], dim=-1) - log_sum_N1) / temperature
        log_q_NO = log_q_NO.log_softmax(-1)
        gradient_NO = scale * (log_q_NO.exp() - teacher_NO)  # by the log-probabilities of the outcomes
        rest_NV.mul_(plain_factor_N1 + gradient_NO[:, -1:] / rest_N1)
        gradient_NK = gradient_NO[:, :-1]
    else:
        log_q_NO, factor_N1 = top_NK - log_sum_N1, (largest_N1 - log_sum_N1).exp()
        if student_NV is not None:
            log_rest_N1 = largest_N1 / temperature + student_NV.sum(-1, keepdim=True).log()
            log_sum_T_N1 = torch.cat([top_NK / temperature, log_rest_N1], dim=-1).logsumexp(-1, keepdim=True)
            log_q_NO, factor_N1 = top_NK / temperature - log_sum_T_N1, (largest_N1 / temperature - log_sum_T_N1).exp()
            rest_NV.mul_(plain_factor_N1).add_(student_NV.mul_(scale * factor_N1))
        else:
            rest_NV.mul_(plain_factor_N1 + scale * factor_N1)
        gradient_NK = scale * (log_q_NO.exp() - teacher_NO)
    rest_NV.scatter_(1, ids_NK, plain * (top_NK - log_sum_N1).exp() + gradient_NK)
    rest_NV.scatter_add_(1, targets_N[:, None], rest_NV.new_full((1, 1), -plain).expand(len(targets_N), 1))
    return (log_sum_N1 - target_N1)[:, 0], kl(teacher_NO, log_q_NO), missing_N


def make(settings: ObjectiveSettings) -> Objective:
    def loss(logits_NV: Tensor, targets_N: Tensor, columns: Mapping[str, Tensor]) -> TokenLosses:
        return kd_losses(
            logits_NV, targets_N, columns["topk_ids"], columns["topk_logprobs"],
            settings.kd_weight, settings.used_temperature, settings.missing_mass,
        )  # fmt: skip

    columns = ("logprobs", "topk_ids", "topk_logprobs")  # the first for the figures of a step alone
    return Objective(loss=loss, columns=columns, figures=("kd_loss", "missing_mass"))
