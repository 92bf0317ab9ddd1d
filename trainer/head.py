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

LOGITS_BUDGET_BYTES = 3 << 30


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


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of the targets, float32 [N], and the log of the normaliser, float32 [N]."""
    log_normaliser_N = torch.logsumexp(logits_NV, dim=-1)
    return log_normaliser_N - logits_NV.gather(1, targets_N[:, None])[:, 0], log_normaliser_N


class _Logits:
    """Logits of one piece after another in the same memory, and what becomes of them there."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, max_positions: int) -> None:
        self._weight_VH, self._bias_V = weight_VH, bias_V
        # fresh memory for every piece costs a CPU a third of the product's time in page faults
        self._buffer = torch.empty(max_positions, weight_VH.shape[0], dtype=torch.float32, device=weight_VH.device)

    def __call__(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, V]; the product accumulates in float32 also for bfloat16 operands."""
        logits_NV = self._buffer[: len(hidden_NH)]
        if hidden_NH.dtype == torch.float32:
            torch.mm(hidden_NH, self._weight_VH.T, out=logits_NV)
        elif hidden_NH.is_cuda:
            torch.mm(hidden_NH, self._weight_VH.T, out_dtype=torch.float32, out=logits_NV)
        else:
            logits_NV.copy_(torch.mm(hidden_NH, self._weight_VH.T))
        return logits_NV if self._bias_V is None else logits_NV.add_(self._bias_V)

    @staticmethod
    def exponentiate(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
        """-log p of the targets and the normaliser of the probabilities that are left in place of the logits.

        Half the passes over the logits of log-sum-exp and softmax, one after the other.
        """
        target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
        largest_N = logits_NV.amax(-1)
        normaliser_N = logits_NV.sub_(largest_N[:, None]).exp_().sum(-1)
        return largest_N + normaliser_N.log() - target_N, normaliser_N


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
        grad_hidden_BTH = torch.zeros_like(hidden_BTH) if needs_gradient else None
        grad_weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32) if needs_gradient else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32) if needs_gradient and bias_V is not None else None
        loss = hidden_BTH.new_zeros((), dtype=torch.float32)
        piece = max(1, logits_budget_bytes // (4 * weight_VH.shape[0]))
        logits = _Logits(compute_VH, bias_V, min(piece, hidden_BTH.shape[1]))

        for row in range(hidden_BTH.shape[0]):
            position_N = predicted_BT[row].nonzero()[:, 0].to(hidden_BTH.device, non_blocking=True)
            if not len(position_N):
                continue  # a one-token row has nothing to predict
            hidden_NH = hidden_BTH[row, position_N - 1]  # position t is predicted from the state at t - 1
            targets_N = input_ids_BT[row, position_N]
            spans = [slice(start, start + piece) for start in range(0, len(position_N), piece)]

            passes = []
            for span in spans:
                probabilities_NV = logits(hidden_NH[span])
                passes.append(logits.exponentiate(probabilities_NV, targets_N[span]))
            losses_N, normaliser_N = (torch.cat(parts) for parts in zip(*passes))
            reference_N = None if reference_BT is None else reference_BT[row, position_N]
            weighted = weigh(losses_N, reference_N)
            statistics.add(losses_N, weighted)
            scale_N = weighted.weights_N / normaliser
            loss += (scale_N * losses_N).sum()
            if grad_hidden_BTH is None or grad_weight_VH is None:
                continue

            for span in spans:
                if len(spans) > 1:
                    probabilities_NV = logits(hidden_NH[span])
                    logits.exponentiate(probabilities_NV, targets_N[span])
                # d loss / d logits = scale * (softmax - onehot), built in the logits' own memory
                grad_NV = probabilities_NV.mul_((scale_N[span] / normaliser_N[span])[:, None])
                grad_NV.scatter_add_(1, targets_N[span, None], -scale_N[span, None])
                if grad_bias_V is not None:
                    grad_bias_V += grad_NV.sum(0)
                grad_NV = grad_NV.to(hidden_NH.dtype)
                grad_hidden_BTH[row, position_N[span] - 1] = grad_NV @ compute_VH
                if hidden_NH.dtype == torch.float32:
                    grad_weight_VH.addmm_(grad_NV.T, hidden_NH[span])
                elif hidden_NH.is_cuda:
                    grad_weight_VH += torch.mm(grad_NV.T, hidden_NH[span], out_dtype=torch.float32)
                else:  # CPUs have no product of bfloat16 that leaves float32: one rounding per piece
                    grad_weight_VH += grad_NV.T @ hidden_NH[span]

        if needs_gradient:
            ctx.gradients = (grad_hidden_BTH, grad_weight_VH, grad_bias_V)
            ctx.weight_dtype = weight_VH.dtype
        return loss

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:
        (grad_loss,) = grad_outputs
        if ctx.gradients is None:
            raise RuntimeError("the loss head's gradients were taken already; call it again for a second backward")
        gradients, ctx.gradients = ctx.gradients, None
        for gradient in gradients:  # in place, because the one of the weight is as large as the weight
            if gradient is not None:
                gradient.mul_(grad_loss)
        grad_hidden_BTH, grad_weight_VH, grad_bias_V = gradients
        return (
            grad_hidden_BTH,
            grad_weight_VH.to(ctx.weight_dtype),
            None if grad_bias_V is None else grad_bias_V.to(ctx.weight_dtype),
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
    input_ids_BT: int64; predicted_BT: bool, true where x_t counts (never at t = 0), on the CPU so that a GPU need not
    be waited for, or on the same device; reference_BT: float32
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
