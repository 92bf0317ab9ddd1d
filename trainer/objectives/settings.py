"""Settings of the objectives, checked once. Light to import, so that --help answers at once."""

import math
from dataclasses import dataclass, fields
from typing import Literal

from shards.ranges import require, require_one_of

Name = Literal["remit", "ntp", "rho1", "kd", "rkl", "switch", "sampled", "entropy"]
"""Each is a module of this package with a function make(settings) -> Objective."""

OPTIONS: dict[str, tuple[str, ...]] = {
    "remit": ("epsilon", "centring", "weight_map"),
    "ntp": (),
    "rho1": ("keep_ratio", "scope"),
    "kd": ("kd_weight", "temperature", "missing_mass"),
    "rkl": ("kd_weight", "temperature"),
    "switch": ("gate_quantile", "temperature", "scope"),
    "sampled": ("kd_weight",),
    "entropy": (),
}
"""The settings that each objective reads."""

TEMPERATURES = {"kd": 1.0, "rkl": 1.0, "switch": 2.0}
"""Of those that have one, where none is given: that of the switch as published."""


def check_epsilon(option: str, value: float, verb: str = "is") -> None:
    """ValueError unless `value` can clip the ReMiT weights: the rule of every command. verb: "has" for a list option."""
    if not (0 < value < 1 or value == math.inf):
        raise ValueError(
            f"{option} {verb} {value:g}, expected a number between 0 and 1, for instance 0.2, or inf for no clip"
        )


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Which objective, and its settings; the paper is arXiv 2602.03075."""

    objective: Name = "remit"
    """remit weights each token by how much better the reference predicts it; ntp is plain next-token prediction; rho1
    trains on the tokens whose loss exceeds the reference's most; kd learns the reference's most probable tokens, rkl
    likewise by the reverse KL, and switch does so where the reference is sure, with next-token prediction elsewhere; sampled
    learns tokens that were drawn from the reference; entropy weights each token by how unsure the reference is."""
    epsilon: float = 0.2
    """remit: weights are clipped to 1 - epsilon .. 1 + epsilon (Eq. 5); inf: no clip."""
    centring: Literal["row", "document", "none"] = "row"
    """remit: the mean that is taken off the loss differences (Eq. 4): of the row, of each document in it, or none."""
    weight_map: Literal["sigmoid", "exp", "linear"] = "sigmoid"
    """remit: from centred difference x to weight: 2 sigmoid(x) as in the paper, exp(x/2), or 1 + x/2 (not below 0); all
    are 1 with slope 1/2 at x = 0."""
    keep_ratio: float = 0.8
    """rho1: share of the tokens that train."""
    scope: Literal["global", "micro", "row"] = "global"
    """rho1: the tokens that are ranked together: of the whole optimizer step on all processes (costs a forward pass more
    where that is several micro-batches), of one forward pass, or of one row. switch: those whose quantile is the gate,
    global or micro; entropies are stored, so global costs nothing."""
    kd_weight: float = 0.5
    """kd, rkl: loss = (1 - kd_weight) * next-token loss + kd_weight * temperature^2 * KL, which is KL(reference || base) for
    kd and KL(base || reference) for rkl. sampled: the cross entropy to the drawn tokens in the place of the KL."""
    temperature: float | None = None
    """kd, rkl, switch: both distributions are raised to 1 / temperature and normalised again; default 1, for switch 2, where
    the entropies and log partition sums at that temperature must be stored."""
    gate_quantile: float = 0.2
    """switch: share of the tokens, those with the lowest entropy of the reference, that learn from it."""
    missing_mass: Literal["bucket", "renormalise"] = "bucket"
    """kd: what becomes of the probability outside of the stored top k: one outcome more, for reference and base alike,
    or spread over the top k of the reference in proportion."""

    def __post_init__(self) -> None:
        require_one_of(self, OPTIONS, "objective")
        require_one_of(self, ("row", "document", "none"), "centring")
        require_one_of(self, ("sigmoid", "exp", "linear"), "weight_map")
        require_one_of(self, ("global", "micro", "row"), "scope")
        require_one_of(self, ("bucket", "renormalise"), "missing_mass")
        check_epsilon("--epsilon", self.epsilon)
        between = "a share between 0 and 1, for instance 0.8; --objective ntp keeps all tokens"
        require(self, lambda ratio: 0 < ratio < 1, between, "keep_ratio")
        up_to_one = "a share above 0, up to 1; --objective ntp is without it"
        require(self, lambda weight: 0 < weight <= 1, up_to_one, "kd_weight")
        require(self, lambda value: 0.05 <= value <= 100, "a number between 0.05 and 100", "temperature")
        sure = "a share of the tokens between 0 and 1, for instance 0.2; --objective ntp and rkl are without a gate"
        require(self, lambda share: 0 < share < 1, sure, "gate_quantile")
        if self.objective == "switch" and self.scope == "row":
            raise ValueError("--scope is 'row', expected global or micro with --objective switch")
        used = OPTIONS[self.objective]
        for entry in fields(ObjectiveSettings):
            if entry.name in ("objective", *used) or getattr(self, entry.name) == entry.default:
                continue
            owners = " or ".join(name for name, options in OPTIONS.items() if entry.name in options)
            raise ValueError(
                f"--{entry.name.replace('_', '-')} belongs to --objective {owners} and would do nothing with --objective "
                f"{self.objective}; leave it out"
            )
        if self.temperature is None and self.objective in TEMPERATURES:  # so that run.json says it
            object.__setattr__(self, "temperature", TEMPERATURES[self.objective])

    @property
    def used_temperature(self) -> float:
        """The temperature of an objective that has one."""
        assert self.temperature is not None
        return self.temperature
