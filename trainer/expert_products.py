"""The products of stacked experts in the dtype of autocast.

transformers computes them by torch's grouped_mm, which autocast does not know of: with the float32 weights that training keeps
they run in float32 where everything around them is in bfloat16, on a GPU at a fraction of its speed. Sharded weights (FSDP2) come
in bfloat16 and are not touched. T tokens, H hidden size, K experts per token.
"""

from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

GROUPED = "grouped_mm"
"""transformers' name of the implementation that it takes by default where it has stacked experts."""
IN_AUTOCAST = "remit_grouped_mm_in_autocast"


def use_autocast_in_experts(model: Any) -> None:
    """Have the experts of `model` take their weights in autocast's dtype; nothing where they are computed otherwise."""
    from transformers.integrations.moe import ExpertsInterface

    if model.get_experts_implementation().get("") != GROUPED:
        return
    ExpertsInterface.register(IN_AUTOCAST, _experts)
    model.set_experts_implementation(IN_AUTOCAST)


def _experts(experts: Any, hidden_TH: Tensor, chosen_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """As transformers' own; the weights are cast once per call, through which their gradients come back in float32."""
    from transformers.integrations.moe import grouped_mm_experts_forward

    device = hidden_TH.device.type
    if torch.is_autocast_enabled(device):
        low = torch.get_autocast_dtype(device)
        own = {name: value.to(low) for name, value in experts.named_parameters() if value.dtype == torch.float32}
        if own:  # the call comes back here, with these weights
            result: Tensor = functional_call(experts, own, (hidden_TH, chosen_TK, weights_TK))
            return result
    return grouped_mm_experts_forward(experts, hidden_TH, chosen_TK, weights_TK)
