"""Switch distillation (arXiv 2609.01532) from a store: reverse KL where the reference is sure, next-token loss elsewhere.

Gated are the tokens whose entropy of the reference, at the temperature of the KL, is at most tau, the --gate-quantile of the
entropies of a scope (trainer/gate.py). Loss = mean over the others of -log p + temperature^2 * mean over the gated of
KL(base || reference), as rkl has it: each mean over its own tokens.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from shards.entropy import temperature_label
from trainer.objectives.objective import Gate, Objective, TokenLosses, exponentiate
from trainer.objectives.rkl import divergence, least_rest, stored_columns
from trainer.objectives.settings import ObjectiveSettings


def plain_losses(logits_NV: Tensor, targets_N: Tensor, columns: Mapping[str, Tensor]) -> TokenLosses:
    """Of the tokens that are not gated: -log p times the weight of each. A LogitLoss."""
    weight_N1 = columns["weight"][:, None]
    ntp_N, normaliser_N, _ = exponentiate(logits_NV, targets_N)
    logits_NV.mul_(weight_N1 / normaliser_N[:, None]).scatter_add_(1, targets_N[:, None], -weight_N1)
    return TokenLosses(columns["weight"] * ntp_N, ntp_N, _gate_figures(columns))


def _gate_figures(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {"gate_entropy": columns["gate_entropy"], "gate_without_topk": columns["gate_without_topk"]}


def fit(settings: ObjectiveSettings, reference: Mapping[str, Any]) -> Objective:
    """The objective for what is stored of a reference, as the manifest has it."""
    temperature, least = settings.used_temperature, least_rest(reference["logprob_step"])
    entropy = "entropy" if temperature == 1 else f"entropy_{temperature_label(temperature)}"

    def gated_losses(logits_NV: Tensor, targets_N: Tensor, columns: Mapping[str, Tensor]) -> TokenLosses:
        scale_N = temperature**2 * columns["weight"]
        ntp_N, kl_N, missing_N = divergence(
            logits_NV, targets_N, columns, 0.0, scale_N[:, None], temperature, least
        )  # fmt: skip
        own = {"gated": torch.ones_like(kl_N), "kd_loss": kl_N, "missing_mass": missing_N}
        return TokenLosses(scale_N * kl_N, ntp_N, own | _gate_figures(columns))

    columns = stored_columns({"entropy_temperature": temperature}, temperature)
    return Objective(
        loss=gated_losses,
        ungated_loss=plain_losses,
        gate=Gate(entropy, settings.gate_quantile),
        columns=(*columns, entropy),
        scope=settings.scope,
        figures=("gated", "gate_entropy", "gate_without_topk", "kd_loss", "missing_mass"),
        per={"kd_loss": "gated", "missing_mass": "gated"},
    )


def make(settings: ObjectiveSettings) -> Objective:
    return fit(settings, {"logprob_step": 0.0})
