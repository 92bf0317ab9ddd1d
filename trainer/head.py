"""The loss head: weighted cross entropy from hidden states, loss and gradient in one pass.

B sequences of T positions, H hidden size, V vocabulary, N predicted tokens of one sequence.

The weights of a token depend on the losses of its whole sequence, so a sequence is the natural chunk: with
one sequence's logits in hand its losses, weights and gradients all follow, and no more than one sequence's
logits exist at any time. A sequence whose logits exceed `logits_budget_bytes` is split into pieces: a first
pass takes the losses, a second one computes the logits again piece by piece.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.objectives import Weigh, Weighted

LOGITS_BUDGET_BYTES = 1 << 30


@dataclass
class HeadStatistics:
    """Sums over predicted tokens, float64 [8], added to by every call; see NAMES for the order."""

    sums: Tensor

    NAMES = (
        "tokens",
        "loss",
        "weight",
        "weight_squared",
        "weighted_loss",
        "delta",
        "clipped_low",
        "clipped_high",
    )

    @classmethod
    def zeros(cls, device: torch.device | str = "cpu") -> "HeadStatistics":
        return cls(torch.zeros(len(cls.NAMES), dtype=torch.float64, device=device))

    def add(self, losses_N: Tensor, weighted: Weighted) -> None:
        """Add one sequence."""
        weights_N = weighted.weights_N
        zero = losses_N.new_zeros((), dtype=torch.float64)

        def total(values: Tensor | None) -> Tensor:
            return zero if values is None else values.sum(dtype=torch.float64)

        self.sums += torch.stack(
            [
                zero + losses_N.numel(),
                total(losses_N),
                total(weights_N),
                total(weights_N.double().square()),
                total(weights_N.double() * losses_N.double()),
                total(weighted.delta_N),
                total(weighted.clipped_low_N),
                total(weighted.clipped_high_N),
            ]
        )

    def as_dict(self) -> dict[str, float]:
        return dict(zip(self.NAMES, self.sums.tolist()))


def _logits(hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> Tensor:
    """float32 logits; the product accumulates in float32 also for bfloat16 operands."""
    return torch.nn.functional.linear(hidden_NH, weight_VH, bias_V).float()


def _losses(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of the targets, float32 [N], and the log of the normaliser, float32 [N]."""
    log_normaliser_N = torch.logsumexp(logits_NV, dim=-1)
    return log_normaliser_N - logits_NV.gather(1, targets_N[:, None])[:, 0], log_normaliser_N


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        input_ids_BT: Tensor,
        predicted_BT: Tensor,
        reference_BT: Tensor | None,
        weigh: Weigh,
        normaliser: float,
        statistics: HeadStatistics,
        logits_budget_bytes: int,
    ) -> Tensor:
        needs_gradient = any(ctx.needs_input_grad[:3])
        compute_VH = weight_VH.to(hidden_BTH.dtype)
        compute_bias_V = None if bias_V is None else bias_V.to(hidden_BTH.dtype)
        grad_hidden_BTH = torch.zeros_like(hidden_BTH) if needs_gradient else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_gradient else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_gradient and bias_V is not None else None
        loss = hidden_BTH.new_zeros((), dtype=torch.float32)
        piece = max(1, logits_budget_bytes // (4 * weight_VH.shape[0]))

        for row in range(hidden_BTH.shape[0]):
            position_N = predicted_BT[row].nonzero()[:, 0]
            if not len(position_N):
                continue  # a one-token row has nothing to predict
            hidden_NH = hidden_BTH[row, position_N - 1]  # position t is predicted from the state at t - 1
            targets_N = input_ids_BT[row, position_N]
            spans = [slice(start, start + piece) for start in range(0, len(position_N), piece)]

            passes = []
            for span in spans:
                logits_NV = _logits(hidden_NH[span], compute_VH, compute_bias_V)
                passes.append(_losses(logits_NV, targets_N[span]))
            losses_N, log_normaliser_N = (torch.cat(parts) for parts in zip(*passes))
            reference_N = None if reference_BT is None else reference_BT[row, position_N]
            weighted = weigh(losses_N, reference_N)
            statistics.add(losses_N, weighted)
            scale_N = weighted.weights_N / normaliser
            loss += (scale_N * losses_N).sum()
            if grad_hidden_BTH is None or grad_weight_VH is None:
                continue

            for span in spans:
                if len(spans) > 1:
                    logits_NV = _logits(hidden_NH[span], compute_VH, compute_bias_V)
                # d loss / d logits = scale * (softmax - onehot), built in the logits' own memory
                grad_NV = logits_NV.sub_(log_normaliser_N[span, None]).exp_()
                grad_NV.scatter_add_(1, targets_N[span, None], -torch.ones_like(grad_NV[:, :1]))
                grad_NV.mul_(scale_N[span, None])
                if grad_bias_V is not None:
                    grad_bias_V += grad_NV.sum(0)
                grad_NV = grad_NV.to(hidden_NH.dtype)
                grad_hidden_BTH[row, position_N[span] - 1] = grad_NV @ compute_VH
                if hidden_NH.dtype == torch.float32:
                    grad_weight_VH.addmm_(grad_NV.T, hidden_NH[span])
                else:
                    grad_weight_VH += grad_NV.T @ hidden_NH[span]
            del logits_NV, grad_NV  # free before the next sequence's logits are made

        if needs_gradient:
            ctx.save_for_backward(grad_hidden_BTH, grad_weight_VH, grad_bias_V)
            ctx.weight_dtype = weight_VH.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_loss,) = grad_outputs
        grad_hidden_BTH, grad_weight_VH, grad_bias_V = ctx.saved_tensors
        return (
            grad_hidden_BTH * grad_loss,
            (grad_weight_VH * grad_loss).to(ctx.weight_dtype),
            None if grad_bias_V is None else (grad_bias_V * grad_loss).to(ctx.weight_dtype),
            *[None] * 7,
        )


def weighted_cross_entropy(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    input_ids_BT: Tensor,
    predicted_BT: Tensor,
    weigh: Weigh,
    normaliser: float,
    *,
    reference_BT: Tensor | None = None,
    bias_V: Tensor | None = None,
    statistics: HeadStatistics | None = None,
    logits_budget_bytes: int = LOGITS_BUDGET_BYTES,
) -> Tensor:
    """Sum over predicted tokens of w_t * -log p(x_t | x_<t), divided by `normaliser` (Eq. 6), a scalar.

    hidden_BTH: last hidden states, float32 or bfloat16; weight_VH, bias_V: of the output embedding;
    input_ids_BT: int64; predicted_BT: bool, true where x_t counts (never at t = 0); reference_BT: float32
    stored log-probs, read where predicted; weigh: from trainer.objectives, called once per sequence;
    normaliser: the number of predicted tokens of the whole global batch, so that micro-batches add up.
    Gradients flow to hidden_BTH, weight_VH and bias_V. statistics are added to.
    """
    if bool(predicted_BT[:, 0].any()):
        raise ValueError("position 0 is marked as predicted, but nothing precedes it; clear predicted_BT[:, 0]")
    if not torch.is_grad_enabled():  # evaluation: no gradient buffers
        hidden_BTH, weight_VH = hidden_BTH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    if statistics is None:
        statistics = HeadStatistics.zeros(hidden_BTH.device)
    loss: Tensor = _WeightedCrossEntropy.apply(
        hidden_BTH,
        weight_VH,
        bias_V,
        input_ids_BT,
        predicted_BT,
        reference_BT,
        weigh,
        normaliser,
        statistics,
        logits_budget_bytes,
    )
    return loss
