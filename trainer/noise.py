"""Noise that a base's config adds in training: dropout and what goes by other names. Here it is switched off.

It would enter the losses that the weights are made of. The export keeps the settings as they were.
"""

import re
from collections.abc import Iterator
from typing import Any

from transformers import PreTrainedConfig

NOISE = re.compile(
    r"dropout|pdrop|jitter|layer_?drop|drop_?path|stochastic_depth|drop_connect|noise|(^|_)drop_(\w+_)?(rate|prob)$|"
    r"_drop_rate$"
)
# Called noise, and no noise: PhiMoE compares router scores with it, in evaluation too
THRESHOLDS = {("phimoe", "router_jitter_noise")}


def silence(config: PreTrainedConfig) -> dict[str, float]:
    """Set every probability and size of noise in a config to 0, nested ones too; what was there, by dotted name."""
    found = dict(_noise(config))
    write_back(config, dict.fromkeys(found, 0.0))
    return found


def _noise(config: Any, above: str = "") -> Iterator[tuple[str, float]]:
    values = config if isinstance(config, dict) else vars(config)
    kind = values.get("model_type") or getattr(config, "model_type", None)
    for name, value in values.items():
        if isinstance(value, (dict, PreTrainedConfig)):
            yield from _noise(value, f"{above}{name}.")
        elif not NOISE.search(str(name)) or (kind, name) in THRESHOLDS or isinstance(value, bool):
            continue
        elif isinstance(value, (int, float)) and value > 0:
            yield f"{above}{name}", value


def write_back(config: Any, values: dict[str, float]) -> None:
    """Set settings of a config by their dotted names."""
    for name, value in values.items():
        *path, last = name.split(".")
        part = config
        for step in path:
            part = part[step] if isinstance(part, dict) else getattr(part, step)
        if isinstance(part, dict):
            part[last] = value
        else:
            setattr(part, last, value)
