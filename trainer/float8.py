"""--float8: the matrix products of the decoder layers' linear layers in 8 bit, by torchao.

In: a base, after its checks and before it is compiled and spread. Each product scales its operands by their largest entry and rounds
them: e4m3 for inputs and weights, e5m2 for the gradients of outputs. Weights, their names, optimizer and checkpoints stay as they
are. In bfloat16 stay the head (its logits decide weights and losses), embeddings, routers, experts (stacked weights, no linear
layers), and layers whose sizes are no multiples of 16, which the kernels ask for.
"""

import re
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from trainer.config import TrainConfig
from trainer.model import Base, resolve_dtype

CAPABILITY = (8, 9)  # of CUDA devices with products in float8: Ada, Hopper, Blackwell
MULTIPLE = 16
ROUTER = re.compile(r"(^|[._])(gate|router|gating)($|\.)")


def require_float8(config: TrainConfig, device: torch.device) -> None:
    """ValueError where --float8 is asked for and cannot be had; before anything is loaded."""
    if not config.float8:
        return
    remedy = "leave the option out, or give --float8-emulated to try its numerics, slowly"
    if not config.float8_emulated and device.type != "cuda":
        raise ValueError(f"--float8: the device is {device.type}, expected a GPU with float8 products; {remedy}")
    capability = CAPABILITY if config.float8_emulated else torch.cuda.get_device_capability(device)
    if capability < CAPABILITY:
        raise ValueError(
            f"--float8: {torch.cuda.get_device_name(device)} has compute capability {capability[0]}.{capability[1]}, expected "
            f"{CAPABILITY[0]}.{CAPABILITY[1]} or newer; {remedy}"
        )
    if resolve_dtype(config.dtype, device) != torch.bfloat16:
        given = f"--dtype is {config.dtype}" + (
            "" if config.dtype != "auto" else f", float32 on this {device.type} device"
        )
        raise ValueError(f"--float8: {given}, expected bfloat16 for what is not in float8; give --dtype bfloat16")
    if find_spec("torchao") is None:
        raise ValueError(
            "--float8: torchao is not installed; in your checkout of remit: pip install '.[float8]', or leave the option out"
        )


def use_float8(base: Base, emulated: bool) -> str:
    """Swap the linear layers of the decoder layers for torchao's; a line about what is in float8 now.

    emulated: operands are rounded to float8 and multiplied in float32. ValueError where no layer can be in float8.
    """
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    from torchao.float8.float8_linear import Float8Linear

    before = [linears(layer) for layer in base.layers]
    # rows of any length: the product for the gradient of a weight sums over tokens, whose number need not be a multiple of 16
    settings = Float8LinearConfig(emulate=emulated, pad_inner_dim=True)
    for layer in base.layers:
        convert_to_float8_training(layer, module_filter_fn=is_suitable, config=settings)
    done = [linear for layer in base.layers for linear in linears(layer) if isinstance(linear, Float8Linear)]
    if not done:
        raise ValueError(
            f"--float8: {type(base.model).__name__} has no linear layer in its decoder layers with sizes that are multiples of "
            f"{MULTIPLE}; leave the option out"
        )
    if base.device.type != "cuda":  # torchao looks at the autocast of CUDA alone
        for linear in done:
            linear.register_forward_pre_hook(_to_bfloat16)
    weights = sum(linear.weight.numel() for linear in done)
    inside = sum(parameter.numel() for layer in base.layers for parameter in layer.parameters())
    how = ", emulated" if emulated else ""
    return (
        f"float8{how}: {len(done):,} of {sum(map(len, before)):,} linear layers, {weights / inside:.0%} of the decoder layers' "
        "weights; head, embeddings, routers and experts stay in bfloat16"
    )


def linears(layer: nn.Module) -> list[nn.Linear]:
    """The linear layers in a decoder layer."""
    return [module for module in layer.modules() if isinstance(module, nn.Linear)]


def is_suitable(module: nn.Module, name: str) -> bool:
    """Whether a linear layer of this name in a decoder layer is computed in float8."""
    sizes = (module.in_features, module.out_features) if isinstance(module, nn.Linear) else (1, 1)
    return not any(size % MULTIPLE for size in sizes) and not ROUTER.search(name)


def _to_bfloat16(module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    return (inputs[0].to(torch.bfloat16), *inputs[1:])
