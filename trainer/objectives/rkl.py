"""Reverse KL from the base to the reference's stored top k, over k + 1 outcomes: the last is "any other token".

The base's probability outside of the stored ids is one outcome, the reference's too; with k = V nothing is outside, and this
is the dense KL(base || reference). At a temperature both are softened over the whole vocabulary where the reference's log
partition sum at that temperature is stored (shards/entropy.py), so that its softened log-probs are exact; without it the k + 1
outcomes are softened, as kd does. The KL is multiplied by temperature^2 (arXiv 1503.02531).

A base may put anything on an outcome to which the reference gives nothing, at an infinite price. Rounding leaves open how
much the reference has outside of the stored ids, so its last outcome is never less than what the rounding leaves open.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shards.entropy import temperature_label
from trainer.objectives.objective import Objective, TokenLosses
from trainer.objectives.settings import ObjectiveSettings

BLOCK_TOKENS = 64  # at once where a second set of logits is needed: at a temperature, over the whole vocabulary
LEAST_REST = 1e-6  # of the reference outside of the stored ids, with exact log-probs: what float32 sums leave open


def least_rest(logprob_step: float) -> float:
    """Probability outside of the stored ids that log-probs rounded to this step leave open."""
    return max(LEAST_REST, -math.expm1(-logprob_step / 2))


def log_outcomes(
    topk_logprobs_NK: Tensor, temperature: float, log_partition_N: Tensor | None, least: float, whole: bool
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the reference's k + 1 outcomes at the temperature, float32 [N, K + 1], and what it has outside of
    the stored ids before `least` is applied, [N].

    log_partition_N: at the temperature; None: the outcomes are softened. whole: the stored ids are the whole vocabulary; the
    last outcome is then without meaning.
    """
    if whole:
        log_NK = (topk_logprobs_NK / temperature).log_softmax(-1)
        return torch.nn.functional.pad(log_NK, (0, 1)), log_NK.new_zeros(len(log_NK))
    exact = log_partition_N is not None
    log_NK = topk_logprobs_NK.double()  # what is left of 1 has few digits in float32 where it is small
    if exact:
        log_NK = log_NK / temperature - log_partition_N.double()[:, None]  # type: ignore[union-attr]
    log_total_N1 = log_NK.logsumexp(-1, keepdim=True)
    missing_N1 = -torch.expm1(log_total_N1.clamp(max=0))
    down_N1 = (math.log1p(-least) - log_total_N1).where(missing_N1 < least, 0.0)  # so that all sum to 1
    log_NO = torch.cat([log_NK + down_N1, missing_N1.clamp(min=least).log()], dim=-1)
    log_NO = log_NO if exact else (log_NO / temperature).log_softmax(-1)
    return log_NO.float(), missing_N1[:, 0].float()


def reverse_losses(
    logits_NV: Tensor,
    targets_N: Tensor,
    ids_NK: Tensor,
    log_p_NO: Tensor,
    plain: float,
    scale_N1: Tensor,
    temperature: float,
    over_vocabulary: bool,
) -> tuple[Tensor, Tensor]:
    """-log p of the targets and KL(base || reference) over the outcomes log_p_NO, float32 [N] both.

    Leaves in the place of the logits the gradient of plain * -log p + scale * KL. over_vocabulary: the base is softened over
    its whole vocabulary, not over the outcomes.
    """
    over_vocabulary &= temperature != 1
    length = BLOCK_TOKENS if over_vocabulary else max(1, len(logits_NV))
    spans = [slice(start, start + length) for start in range(0, len(logits_NV), length)]
    parts = [
        _block(
            logits_NV[s], targets_N[s], ids_NK[s], log_p_NO[s], plain, scale_N1[s] / temperature, temperature, over_vocabulary
        )
        for s in spans
    ]  # fmt: skip
    ntp, divergence = zip(*parts)
    return torch.cat(ntp), torch.cat(divergence)


def _block(
    logits_NV: Tensor,
    targets_N: Tensor,
    ids_NK: Tensor,
    log_p_NO: Tensor,
    plain: float,
    scale_N1: Tensor,
    temperature: float,
    over_vocabulary: bool,
) -> tuple[Tensor, Tensor]:
    top_NK, target_N = logits_NV.gather(1, ids_NK), logits_NV.gather(1, targets_N[:, None])[:, 0]
    # the rest is summed by itself: 1 minus the top k would lose its digits where it is small
    rest_NV = logits_NV.scatter_(1, ids_NK, -torch.inf)
    largest_N1 = rest_NV.amax(-1, keepdim=True).clamp(min=-1e30)  # -inf where the top k are the whole vocabulary
    rest_NV.sub_(largest_N1)
    cold_NV = rest_NV.exp() if over_vocabulary else rest_NV.exp_()
    cold_N1 = cold_NV.sum(-1, keepdim=True)
    log_NO = torch.cat([top_NK, largest_N1 + cold_N1.log()], dim=-1)
    log_sum_N1 = log_NO.logsumexp(-1, keepdim=True)
    rest_N1 = cold_N1
    if over_vocabulary:
        rest_N1 = rest_NV.div_(temperature).exp_().sum(-1, keepdim=True)
        log_q_NO = torch.cat([top_NK / temperature, largest_N1 / temperature + rest_N1.log()], dim=-1).log_softmax(-1)
    else:
        log_q_NO = ((log_NO - log_sum_N1) / temperature).log_softmax(-1)
    log_q_NO = log_q_NO.clamp(min=-1e30)  # 0 log 0 is 0
    q_NO, ratio_NO = log_q_NO.exp(), log_q_NO - log_p_NO
    kl_N1 = (q_NO * ratio_NO).sum(-1, keepdim=True)
    gradient_NO = scale_N1 * (q_NO * (ratio_NO - kl_N1))  # by the logits of the outcomes
    of_rest_N1 = gradient_NO[:, -1:] / rest_N1.clamp(min=1e-30)
    of_cold_N1 = plain * (largest_N1 - log_sum_N1).exp()
    if over_vocabulary:
        rest_NV.mul_(of_rest_N1)
        if plain:
            rest_NV.add_(cold_NV.mul_(of_cold_N1))
    else:
        rest_NV.mul_(of_rest_N1 + of_cold_N1)
    rest_NV.scatter_(1, ids_NK, plain * (top_NK - log_sum_N1).exp() + gradient_NO[:, :-1])
    if plain:
        rest_NV.scatter_add_(1, targets_N[:, None], rest_NV.new_full((1, 1), -plain).expand(len(targets_N), 1))
    return log_sum_N1[:, 0] - target_N, kl_N1[:, 0]


def divergence(
    logits_NV: Tensor,
    targets_N: Tensor,
    columns: Mapping[str, Tensor],
    plain: float,
    scale_N1: Tensor,
    temperature: float,
    least: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """`reverse_losses` from the stored columns, and the reference's probability outside of the stored ids, [N]."""
    ids_NK, whole = columns["topk_ids"], columns["topk_ids"].shape[1] >= logits_NV.shape[1]
    log_partition_N = columns.get(f"log_partition_{temperature_label(temperature)}")
    log_p_NO, missing_N = log_outcomes(columns["topk_logprobs"], temperature, log_partition_N, least, whole)
    exact = whole or log_partition_N is not None
    ntp_N, kl_N = reverse_losses(logits_NV, targets_N, ids_NK, log_p_NO, plain, scale_N1, temperature, exact)
    return ntp_N, kl_N, missing_N


def stored_columns(reference: Mapping[str, Any], temperature: float) -> tuple[str, ...]:
    """Columns that a reverse KL at this temperature reads; the first is for the figures of a step alone."""
    stored = temperature != 1 and reference.get("entropy_temperature") == temperature
    partition = (f"log_partition_{temperature_label(temperature)}",) if stored else ()
    return ("logprobs", "topk_ids", "topk_logprobs", *partition)


def fit(settings: ObjectiveSettings, reference: Mapping[str, Any]) -> Objective:
    """The objective for what is stored of a reference, as the manifest has it."""
    weight, temperature, least = settings.kd_weight, settings.used_temperature, least_rest(reference["logprob_step"])

    def loss(logits_NV: Tensor, targets_N: Tensor, columns: Mapping[str, Tensor]) -> TokenLosses:
        scale_N1 = logits_NV.new_full((len(logits_NV), 1), weight * temperature**2)
        ntp_N, kl_N, missing_N = divergence(
            logits_NV, targets_N, columns, 1 - weight, scale_N1, temperature, least
        )  # fmt: skip
        losses_N = (1 - weight) * ntp_N + weight * temperature**2 * kl_N
        return TokenLosses(losses_N, ntp_N, {"kd_loss": kl_N, "missing_mass": missing_N})

    columns = stored_columns(reference, temperature)
    label, all_stored = temperature_label(temperature), reference.get("top_k") == reference.get("vocab_size")
    note = (
        f"the log partition sum at temperature {temperature:g} is not stored, so the k + 1 outcomes are softened and not the "
        f"vocabulary, which is far from it; remit score --entropy --entropy-temperature {temperature:g} stores it"
    )
    softened = temperature != 1 and f"log_partition_{label}" not in columns and not all_stored
    figures = ("kd_loss", "missing_mass")
    return Objective(loss=loss, columns=columns, figures=figures, note=note if softened else "")


def make(settings: ObjectiveSettings) -> Objective:
    return fit(settings, {"logprob_step": 0.0})
