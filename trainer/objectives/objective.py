"""What an objective is: token weights from losses and stored columns, or a loss from logits.

N = predicted tokens, K = stored most probable tokens of each, V = vocabulary. All logarithms are natural, all losses
in nats. Tokens that are not predicted (nothing precedes them, padding, rows without log-probs) never come here.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tokens:
    """The predicted tokens that an objective sees at once, row after row in the order of the global batch.

    losses_N: float32, -log p of the base, without gradient. row_N: int64, ascending, the row of each token.
    document_N: int64, ascending within a row, the document piece of the row. columns: what the objective asked for:
    "logprobs", float32 [N], log p of the reference; "topk_ids", int64 [N, K], "topk_logprobs", float32 [N, K]; "entropy",
    "entropy_t2", "log_partition_t2", float32 [N].
    """

    losses_N: Tensor
    row_N: Tensor
    document_N: Tensor
    columns: Mapping[str, Tensor]


@dataclass(frozen=True)
class Weighted:
    """weights_N, constants for the gradient (Eq. 14); for the figures of a step also the excess losses over the
    reference and where a clip acted, None where there is no such thing."""

    weights_N: Tensor
    delta_N: Tensor | None = None
    clipped_low_N: Tensor | None = None
    clipped_high_N: Tensor | None = None

    def part(self, tokens: slice) -> "Weighted":
        """Of some of the tokens."""
        return Weighted(*(None if values is None else values[tokens] for values in vars(self).values()))  # type: ignore[arg-type]


@dataclass(frozen=True)
class TokenLosses:
    """losses_N: of the objective; ntp_N: -log p of the token; figures: float32 [N] by name, whose means are reported."""

    losses_N: Tensor
    ntp_N: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)


def exponentiate(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """-log p of the targets, the normaliser of the probabilities that are left in place of the logits, and the log of the
    logits' own normaliser, log Z.

    Half the passes over the logits of log-sum-exp and softmax, one after the other.
    """
    target_N = logits_NV.gather(1, targets_N[:, None])[:, 0]
    largest_N = logits_NV.amax(-1)
    normaliser_N = logits_NV.sub_(largest_N[:, None]).exp_().sum(-1)
    log_z_N = largest_N + normaliser_N.log()
    return log_z_N - target_N, normaliser_N, log_z_N


Weigh = Callable[[Tokens], Weighted]
LogitLoss = Callable[[Tensor, Tensor, Mapping[str, Tensor]], TokenLosses]
"""(logits_NV float32, targets_N int64, columns) -> TokenLosses; leaves d losses_N / d logits_NV in the place of the
logits. A token's loss may depend on its own logits only."""


@dataclass(frozen=True)
class Gate:
    """Tokens are gated whose stored `column` is at most its `quantile` over a scope (trainer/gate.py)."""

    column: str
    quantile: float


@dataclass(frozen=True)
class Objective:
    """One of weigh and loss is given. columns: stored columns of the reference that are read. scope: the tokens that
    weigh, or the gate, sees at once: those of a "row", of one forward pass ("micro"), of the optimizer step ("global").
    gate: with it loss is of the gated tokens and ungated_loss of the others. figures: names of the figures of loss; a mean is
    over all predicted tokens, or over those that another figure counts, which `per` names. note: what its user should know.
    z_loss: coefficient of log^2 Z of each predicted token, gated or not, whatever its weight."""

    weigh: Weigh | None = None
    loss: LogitLoss | None = None
    columns: tuple[str, ...] = ()
    scope: str = "row"
    figures: tuple[str, ...] = ()
    gate: Gate | None = None
    ungated_loss: LogitLoss | None = None
    per: Mapping[str, str] = field(default_factory=dict)
    note: str = ""
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        assert (self.weigh is None) != (self.loss is None)
        assert (self.gate is None) == (self.ungated_loss is None)
        assert self.loss is None or self.scope == "row" or self.gate


def differentiable(function: Callable[[Tensor, Tensor, Mapping[str, Tensor]], Tensor]) -> LogitLoss:
    """A LogitLoss from an ordinary function (logits_NV, targets_N, columns) -> losses_N, by automatic differentiation.

    Takes several times the memory of the logits; write the gradient by hand where that matters, as kd does.
    """

    def loss(logits_NV: Tensor, targets_N: Tensor, columns: Mapping[str, Tensor]) -> TokenLosses:
        with torch.enable_grad():
            leaf_NV = logits_NV.detach().clone().requires_grad_()
            losses_N = function(leaf_NV, targets_N, columns)
            (gradient_NV,) = torch.autograd.grad(losses_N.sum(), leaf_NV)
        ntp_N = logits_NV.logsumexp(-1) - logits_NV.gather(1, targets_N[:, None])[:, 0]
        logits_NV.copy_(gradient_NV)
        return TokenLosses(losses_N.detach(), ntp_N)

    return loss
