"""The loss head: an objective's loss from hidden states, loss and gradient in one pass.

B sequences of T positions, H hidden size, V vocabulary, N predicted tokens of one scope.

The weights of a token depend on the losses of its whole scope (for ReMiT its sequence), so a scope is the natural
chunk: with its logits in hand its losses, weights and gradients all follow, and no more than one scope's logits exist
at any time. A scope whose logits exceed `logits_budget_bytes` is split into pieces: a first pass takes the losses, a
second one computes the logits again piece by piece. A loss that a token's own logits decide needs no second pass.
"""

import threading
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from trainer.batch import MicroBatch
from trainer.objectives.objective import LogitLoss, Objective, Tokens, exponentiate
from trainer.statistics import StepStatistics

LOGITS_BUDGET_BYTES = 3 << 30
_kept = threading.local()
"""A CPU's memory for logits, kept from call to call: fresh memory costs up to a third of the product's time in page
faults."""


def _buffer(positions: int, vocabulary: int, device: torch.device) -> Tensor:
    """float32 [positions, vocabulary], not initialised. A GPU's allocator keeps memory by itself."""
    entries = positions * vocabulary
    if device.type != "cpu":
        return torch.empty(positions, vocabulary, dtype=torch.float32, device=device)
    if len(getattr(_kept, "buffer", ())) < entries:
        _kept.buffer = None  # give it back first
        with torch.inference_mode(False):  # what is made in inference mode can never be used outside of it
            _kept.buffer = torch.empty(entries, dtype=torch.float32)
    return _kept.buffer[:entries].view(positions, vocabulary)


def token_losses(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of the targets, float32 [N], and the log of the normaliser, float32 [N]."""
    log_normaliser_N = torch.logsumexp(logits_NV, dim=-1)
    return log_normaliser_N - logits_NV.gather(1, targets_N[:, None])[:, 0], log_normaliser_N


class _Logits:
    """Logits of one piece after another in the same memory, and what becomes of them there."""

    def __init__(self, weight_VH: Tensor, bias_V: Tensor | None, max_positions: int) -> None:
        self._weight_VH, self._bias_V = weight_VH, bias_V
        self._buffer = _buffer(max_positions, weight_VH.shape[0], weight_VH.device)

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


class _Gradients:
    """Gradients of hidden states, weight and bias, which pieces of logits add to; None where none are wanted."""

    def __init__(self, hidden_BTH: Tensor, weight_VH: Tensor, bias_V: Tensor | None) -> None:
        self.hidden_BTH = torch.zeros_like(hidden_BTH)
        self.weight_VH = torch.zeros_like(weight_VH, dtype=torch.float32)
        self.bias_V = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)

    def add(self, grad_NV: Tensor, hidden_NH: Tensor, compute_VH: Tensor, row_N: Tensor, position_N: Tensor) -> None:
        """grad_NV: float32, by the logits of the tokens at row_N, position_N."""
        if self.bias_V is not None:
            self.bias_V += grad_NV.sum(0)
        grad_NV = grad_NV.to(hidden_NH.dtype)
        self.hidden_BTH[row_N, position_N - 1] = grad_NV @ compute_VH
        if hidden_NH.dtype == torch.float32:
            self.weight_VH.addmm_(grad_NV.T, hidden_NH)
        elif hidden_NH.is_cuda:
            self.weight_VH += torch.mm(grad_NV.T, hidden_NH, out_dtype=torch.float32)
        else:  # CPUs have no product of bfloat16 that leaves float32: one rounding per piece
            self.weight_VH += grad_NV.T @ hidden_NH


def gradient_in_place(
    exponentials_NV: Tensor, targets_N: Tensor, factor_N: Tensor, scale_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """d loss / d logits = factor * exponentials - scale * onehot, float32, in the memory of the exponentials."""
    grad_NV = exponentials_NV.mul_(factor_N[:, None])
    return grad_NV.scatter_add_(1, targets_N[:, None], -scale_N[:, None])


def low_gradient(
    exponentials_NV: Tensor, targets_N: Tensor, factor_N: Tensor, scale_N: Tensor, dtype: torch.dtype
) -> Tensor:
    """The same, rounded once to `dtype`: one pass that reads float32 and writes 16 bit, in place of three over float32."""
    target_N1 = exponentials_NV.gather(1, targets_N[:, None]) * factor_N[:, None] - scale_N[:, None]
    grad_NV = torch.empty_like(exponentials_NV, dtype=dtype)
    torch.mul(exponentials_NV, factor_N[:, None], out=grad_NV)
    return grad_NV.scatter_(1, targets_N[:, None], target_N1.to(dtype))


def _losses(batch: MicroBatch, objective: Objective) -> list[tuple[Tensor, LogitLoss | None]]:
    """Tokens of the batch, bool [B, T], and the loss that the objective has of its own for them, if any."""
    if objective.gate is None:
        return [(batch.predicted_BT, objective.loss)]
    assert batch.gated_BT is not None
    return [(batch.predicted_BT & ~batch.gated_BT, objective.ungated_loss), (batch.gated_BT, objective.loss)]


class _ObjectiveLoss(torch.autograd.Function):
    # forward is one long function because its steps share the memory of the logits: the order in which it is overwritten is
    # the algorithm, and parts of it would hand each other a dozen tensors
    @staticmethod
    def forward(
        ctx: Any,
        hidden_BTH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        batch: MicroBatch,
        objective: Objective,
        normaliser: float,
        statistics: StepStatistics,
        logits_budget_bytes: int,
    ) -> Tensor:
        compute_VH = weight_VH.to(hidden_BTH.dtype)
        gradients = _Gradients(hidden_BTH, weight_VH, bias_V) if any(ctx.needs_input_grad[:3]) else None
        loss = hidden_BTH.new_zeros((), dtype=torch.float32)
        z_scale = objective.z_loss / normaliser
        length = max(1, logits_budget_bytes // (4 * weight_VH.shape[0]))  # of a piece, in positions
        if z_scale and objective.loss is not None:
            length = max(1, length // 2)  # two sets of logits are needed there
        rows = range(hidden_BTH.shape[0])
        scopes = [list(rows)] if objective.scope == "micro" else [[row] for row in rows]
        counts = batch.predicted_BT.sum(1).tolist()
        sources = batch.sources or (0,) * len(rows)
        taken = [(scope, mask_BT, own_loss) for scope in scopes for mask_BT, own_loss in _losses(batch, objective)]
        most = max(int(mask_BT[scope].sum()) for scope, mask_BT, _ in taken)
        logits = _Logits(compute_VH, bias_V, min(length, max(1, most)))

        for scope, mask_BT, own_loss in taken:
            place_N2 = mask_BT[scope].nonzero().to(hidden_BTH.device, non_blocking=True)
            if not len(place_N2):
                continue  # a one-token row has nothing to predict
            inner_N, position_N = place_N2.unbind(1)
            row_N = inner_N + scope[0]
            hidden_NH = hidden_BTH[row_N, position_N - 1]  # position t is predicted from the state at t - 1
            targets_N = batch.input_ids_BT[row_N, position_N]
            columns = {name: values[row_N, position_N] for name, values in batch.columns.items()}
            columns = {
                name: values if values.is_floating_point() else values.long() for name, values in columns.items()
            }
            spans = [slice(start, start + length) for start in range(0, len(position_N), length)]

            def add_gradient(span: slice, grad_NV: Tensor) -> None:
                if gradients is not None:
                    gradients.add(grad_NV, hidden_NH[span], compute_VH, row_N[span], position_N[span])  # noqa: B023

            if own_loss is not None:
                for span in spans:
                    logits_NV = logits(hidden_NH[span])
                    here = {name: values[span] for name, values in columns.items()}
                    plain_NV = logits_NV.clone() if z_scale else None  # the gradient takes the place of the others
                    result = own_loss(logits_NV, targets_N[span], here)
                    statistics.add_losses(sources[scope[0]], result, here.get("logprobs"))
                    loss += result.losses_N.sum() / normaliser
                    grad_NV = logits_NV if gradients is None else logits_NV.div_(normaliser)
                    if plain_NV is not None:
                        _, sum_N, log_z_N = exponentiate(plain_NV, targets_N[span])
                        loss += z_scale * log_z_N.square().sum()
                        statistics.add_z_loss(log_z_N)
                        grad_NV.addcmul_(plain_NV, (2 * z_scale * log_z_N / sum_N)[:, None])
                    add_gradient(span, grad_NV)
                continue

            assert objective.weigh is not None
            passes = []
            for span in spans:
                probabilities_NV = logits(hidden_NH[span])
                passes.append(exponentiate(probabilities_NV, targets_N[span]))
            losses_N, sums_N, log_z_N = (torch.cat(parts) for parts in zip(*passes))
            document_N = torch.zeros_like(row_N) if batch.document_BT is None else batch.document_BT[row_N, position_N]
            weighted = objective.weigh(Tokens(losses_N, inner_N, document_N, columns))
            if weighted.delta_N is None and "logprobs" in columns:
                weighted = replace(weighted, delta_N=losses_N + columns["logprobs"])
            first = 0
            for row in scope:
                own = slice(first, first + counts[row])
                statistics.add_weights(sources[row], losses_N[own], weighted.part(own))
                first += counts[row]
            scale_N = weighted.weights_N / normaliser
            loss += (scale_N * losses_N).sum()
            softmax_scale_N = scale_N
            if z_scale:
                loss += z_scale * log_z_N.square().sum()
                statistics.add_z_loss(log_z_N)
                softmax_scale_N = scale_N + 2 * z_scale * log_z_N  # d log Z^2 / d logits = 2 log Z softmax
            if gradients is None:
                continue
            for span in spans:
                if len(spans) > 1:
                    probabilities_NV = logits(hidden_NH[span])
                    exponentiate(probabilities_NV, targets_N[span])
                factor_N = softmax_scale_N[span] / sums_N[span]
                is_low = hidden_NH.is_cuda and hidden_NH.dtype != torch.float32 and bias_V is None
                build = low_gradient if is_low else gradient_in_place
                add_gradient(span, build(probabilities_NV, targets_N[span], factor_N, scale_N[span], hidden_NH.dtype))

        if gradients is not None:
            ctx.gradients = (gradients.hidden_BTH, gradients.weight_VH, gradients.bias_V)
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
            *[None] * 5,
        )


def objective_loss(
    hidden_BTH: Tensor,
    weight_VH: Tensor,
    batch: MicroBatch,
    objective: Objective,
    normaliser: float,
    *,
    bias_V: Tensor | None = None,
    statistics: StepStatistics | None = None,
    logits_budget_bytes: int = LOGITS_BUDGET_BYTES,
) -> Tensor:
    """Sum over predicted tokens of w_t * -log p(x_t | x_<t), or of the objective's own loss, divided by `normaliser`
    (Eq. 6), a scalar. With objective.z_loss that many times the sum of log^2 Z is added before the division, Z the softmax's
    normaliser (PaLM, arXiv 2204.02311, section 5).

    hidden_BTH: last hidden states, float32 or bfloat16; weight_VH, bias_V: of the output embedding; normaliser: the
    number of predicted tokens of the whole global batch, so that micro-batches add up. Gradients flow to hidden_BTH,
    weight_VH and bias_V. statistics are added to. ValueError for an objective of "global" scope: see
    trainer/first_pass.py.
    """
    if objective.scope == "global":
        raise ValueError("a micro-batch is not the global batch; give the weights of trainer.first_pass instead")
    if bool(batch.predicted_BT[:, 0].any()):
        raise ValueError("position 0 is marked as predicted, but nothing precedes it; clear predicted_BT[:, 0]")
    if not torch.is_grad_enabled():  # evaluation: no gradient buffers
        hidden_BTH, weight_VH = hidden_BTH.detach(), weight_VH.detach()
        bias_V = None if bias_V is None else bias_V.detach()
    if statistics is None:
        statistics = StepStatistics(hidden_BTH.device)
    loss: Tensor = _ObjectiveLoss.apply(
        hidden_BTH, weight_VH, bias_V, batch, objective, normaliser, statistics, logits_budget_bytes
    )  # fmt: skip
    return loss
