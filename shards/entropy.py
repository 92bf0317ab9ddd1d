"""The entropy of a reference's predictions: which columns hold it, and what their values can be.

The entropy at temperature t is that of the distribution q with log q(v) = log p(v) / t - z, where p is the reference's
distribution and z = log of the sum over v of p(v)^(1/t) its log partition sum. So log p(v) / t - z, with a stored log p(v),
is the log-prob of v at temperature t. At temperature 1 z is 0 and not stored. All in nats.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from shards.ranges import require
from shards.schema import logprobs_column

LEAST_TEMPERATURE, LARGEST_TEMPERATURE = 0.1, 100.0
SLACK = 1e-3  # nat, for sums over a whole vocabulary in float32


def temperature_label(temperature: float) -> str:
    """A temperature in the name of a column: t2, t1p5."""
    return f"t{temperature:g}".replace(".", "p")


def entropy_columns(name: str, reference: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Columns of the entropy of the reference called `name`, in the schema's order, and the range of each column's values.

    reference: its provenance, as the manifest has it. Empty where no entropy is stored; one column at temperature 1; with
    another temperature t (2, for instance) also NAME_entropy_t2 and NAME_log_partition_t2.
    """
    if not reference.get("entropy"):
        return {}
    stem, largest = logprobs_column(name).removesuffix("_logprobs"), math.log(reference["vocab_size"])
    columns = {f"{stem}_entropy": (0.0, largest)}
    temperature = reference.get("entropy_temperature")
    if temperature:
        label = temperature_label(temperature)
        bound = (1 - 1 / temperature) * largest  # of the log partition sum: where all tokens are equally probable
        columns[f"{stem}_entropy_{label}"] = (0.0, largest)
        columns[f"{stem}_log_partition_{label}"] = (min(0.0, bound), max(0.0, bound))
    return columns


def topk_limit(name: str, reference: Mapping[str, Any]) -> tuple[str, float] | None:
    """Column of the entropy above which no most probable tokens of the reference `name` are stored, and the threshold in
    nats, at which they are; None where they are stored everywhere. The column is that at the last temperature."""
    threshold = reference.get("top_k_below_entropy")
    if not reference.get("top_k") or threshold is None:
        return None
    columns = [column for column in entropy_columns(name, reference) if "_log_partition_" not in column]
    return columns[-1], threshold


def is_temperature(temperature: float) -> bool:
    """Whether the entropy can be stored at this temperature beside that at 1."""
    return LEAST_TEMPERATURE <= temperature <= LARGEST_TEMPERATURE and temperature != 1


def require_entropy(settings: Any) -> None:
    """ValueError unless the options --entropy and --entropy-temperature of a command, fields of `settings`, fit together."""
    if settings.entropy_temperature is not None and not settings.entropy:
        raise ValueError(f"--entropy-temperature is {settings.entropy_temperature:g} without --entropy, expected both")
    expected = f"{LEAST_TEMPERATURE:g} to {LARGEST_TEMPERATURE:g} other than 1, for instance 2"
    require(settings, is_temperature, expected, "entropy_temperature")


def outside(values: np.ndarray, bounds: tuple[float, float], step: float = 0.0) -> np.ndarray:
    """True where values of a column cannot be what it holds, NaN included; bool, as `values`.

    bounds: of the column; step: to which its values are rounded, 0 for not.
    """
    least, largest = bounds[0] - step / 2 - SLACK, bounds[1] + step / 2 + SLACK
    return ~((values >= least) & (values <= largest))
