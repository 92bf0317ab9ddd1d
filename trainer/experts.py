"""Bases with experts: how they are known, and the loss of their routers that keeps the load of the experts balanced.

The loss is the family's own: the function that its class in transformers calls, with the arguments that it gives it. What
training adds is this module's affair: without it experts that are rarely chosen are chosen ever more rarely.
B rows of T tokens, E experts.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.batch import MicroBatch
from trainer.statistics import StepStatistics

RouterLoss = Callable[[tuple[Tensor, ...], Tensor], Tensor]
"""Balancing loss, a scalar, from the router logits of each layer and a mask, int [B, T], of tokens that count."""
FUNCTION = "load_balancing_loss_func"  # transformers' name for it, in each family's module
COUNTS = re.compile(r"(^|_)experts$")  # num_experts, num_local_experts, n_routed_experts, moe_num_experts
NO_COUNTS = re.compile(r"shared|per_tok|top_k|topk|zero")
CLASSES = re.compile(r"MoE|Moe|Expert|Router|Gating")
OPTION = "--router-aux-loss"


def num_experts(config: dict[str, Any]) -> int:
    """Most experts of a layer by a parsed config.json, nested ones too; 0 where it has none."""
    most = 0
    for key, value in config.items():
        if isinstance(value, dict):
            most = max(most, num_experts(value))
        elif COUNTS.search(str(key)) and not NO_COUNTS.search(str(key)):
            counts = value if isinstance(value, list) else [value]
            most = max(most, *(count for count in counts if isinstance(count, int)), 0)
    return most if most > 1 else 0


def has_experts(model: nn.Module, config: dict[str, Any]) -> bool:
    """Whether a model routes tokens to experts: by the names of its parameters, or by its config and its classes.

    A family with experts may be dense by its config (Nemotron-H, Granite 4, DOGE), and configs have many names for it.
    """
    parameters = (re.sub(r"shared_experts?", "", name) for name, _ in model.named_parameters())
    if any("expert" in name for name in parameters):
        return True
    family = type(model).__name__.partition("For")[0]
    classes = {type(module).__name__.removeprefix(family) for module in model.modules() if module is not model}
    return num_experts(config) > 1 and any(CLASSES.search(name) for name in classes)


def check_experts(folder: Path, coefficient: float | None) -> None:
    """ValueError where a base has experts and nothing was said of their balancing loss, or the reverse.

    From config.json alone: the model is built without weights. coefficient: of --router-aux-loss.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise ValueError(
            f"{folder}: {type(config).__name__} has no causal language model in transformers, expected one; give the folder of a "
            "language model by itself"
        )
    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config)
    values, name = config.to_dict(), type(model).__name__
    experts = has_experts(model, values)
    if not experts and coefficient:
        raise ValueError(f"{OPTION} is {coefficient}, but {name} in {folder} has no experts; leave it out")
    if not experts or coefficient == 0:
        return
    if not hasattr(sys.modules[type(model).__module__], FUNCTION):
        raise ValueError(
            f"{folder}: {name} routes tokens to experts and has no balancing loss in transformers (its routing is balanced by "
            f"a bias that its makers move outside of the gradients, or not at all), {OPTION} is "
            f"{coefficient if coefficient is not None else 'not given'}, expected 0: the router trains with the objective "
            "alone, and such a bias stays as it is"
        )
    if coefficient is None:
        own = coefficient_of(values)
        raise ValueError(
            f"{folder}: {name} routes tokens to {num_experts(values) or 'some'} experts, and {OPTION} is not given, expected "
            f"the coefficient of its balancing loss ({'its config has none' if own is None else f'{own:g} in its config'}), or "
            "0 to train without"
        )


def coefficient_of(config: dict[str, Any]) -> float | None:
    """The coefficient of the balancing loss that a parsed config.json has."""
    for key, value in config.items():
        if isinstance(value, dict) and (found := coefficient_of(value)) is not None:
            return found
        if str(key).endswith("aux_loss_coef") and isinstance(value, (int, float)):
            return float(value)
    return None


@torch.no_grad()
def router_loss(model: Any) -> RouterLoss | None:
    """The balancing loss of `model`; None where its class has none. ValueError where it cannot be told apart.

    The class is asked once, with a few tokens of which one is padding: what it hands to the function beside logits and
    mask is kept, and what it calls its aux_loss must be what the kept function gives for its body's logits.
    """
    module = sys.modules[type(model).__module__]
    function = getattr(module, FUNCTION, None)
    if function is None:
        return None
    seen: list[tuple[Any, ...]] = []

    def record(*arguments: Any) -> Any:
        seen.append(arguments)
        return function(*arguments)

    was_training = model.training
    model.eval()
    inputs: dict[str, Any] = {
        "input_ids": torch.arange(12, device=model.device).view(2, 6),
        "attention_mask": torch.ones(2, 6, dtype=torch.int64, device=model.device),
        "output_router_logits": True,
        "use_cache": False,
    }
    inputs["input_ids"] %= model.get_input_embeddings().weight.shape[0]
    inputs["attention_mask"][1, 5:] = 0
    setattr(module, FUNCTION, record)
    try:
        expected = model(**inputs).aux_loss
    finally:
        setattr(module, FUNCTION, function)
        model.train(was_training)
    if len(seen) != 1:
        return None
    between = seen[0][1:-1]

    def loss(router_logits: tuple[Tensor, ...], mask_BT: Tensor) -> Tensor:
        return function(router_logits, *between, mask_BT)

    model.eval()
    body = model.get_decoder()(**inputs, return_dict=True)
    model.train(was_training)
    found = loss(tuple(body.router_logits), inputs["attention_mask"])
    if not torch.allclose(found, expected, rtol=1e-5):
        raise ValueError(
            f"{type(model).__name__}: its balancing loss is {expected:.6g} by its own forward and {found:.6g} by its body's "
            f"router logits; train with {OPTION} 0"
        )
    return loss


@dataclass(frozen=True)
class Balancing:
    """The balancing loss of one step. tokens: of the global batch, padding not counted."""

    loss: RouterLoss
    coefficient: float
    tokens: int

    def share(self, router_logits: tuple[Tensor, ...], batch: MicroBatch, statistics: StepStatistics) -> Tensor:
        """coefficient times the balancing loss of a micro-batch, weighted by its share of the tokens; a scalar.

        The weighted values of all micro-batches and ranks add up to the mean of the step.
        """
        width = batch.input_ids_BT.shape[1]
        mask_BT = (torch.arange(width) < torch.tensor(batch.lengths)[:, None]).long().to(batch.input_ids_BT.device)
        with torch.enable_grad() if self.coefficient and torch.is_grad_enabled() else torch.no_grad():
            value = self.loss(tuple(logits.float() for logits in router_logits), mask_BT)
            value = value * (batch.tokens / self.tokens)
            statistics.add_router_loss(value.detach())
            return value * self.coefficient


def describe(config: dict[str, Any], coefficient: float | None) -> str | None:
    """What a user should know of the balancing loss, for a note; None: nothing."""
    own = coefficient_of(config)
    if coefficient == 0 and own:
        return f"its experts train without their balancing loss ({OPTION} 0); the coefficient in its config is {own:g}"
    return None
