"""A step of metrics.jsonl as flat groups of figures, for TensorBoard and Weights & Biases alike."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

DETAILS_EVERY = 10  # steps between histograms and the figures of each source
NOT_SHOWN = ("step", "sources", "weight_histogram", "delta_quantiles")


@dataclass(frozen=True)
class WeightHistogram:
    """centres: of the bins that have tokens, ascending; counts: of tokens, by centre."""

    centres: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Group:
    """Figures under one heading: "train", or "source NAME". weights: None in the steps that leave details out."""

    name: str
    scalars: dict[str, float]
    weights: WeightHistogram | None


def step_groups(metrics: dict[str, Any]) -> Iterator[Group]:
    """The groups of one step as it stands in metrics.jsonl; those of the sources every ten steps, if there are several."""
    has_details = metrics["step"] == 1 or metrics["step"] % DETAILS_EVERY == 0
    yield _group("train", metrics, has_details)
    if has_details and len(metrics["sources"]) > 1:
        for name, figures in metrics["sources"].items():
            yield _group(f"source {name}", figures, has_details)


def _group(name: str, figures: dict[str, Any], has_details: bool) -> Group:
    scalars = {key: value for key, value in figures.items() if key not in NOT_SHOWN and value is not None}
    if not has_details:
        return Group(name, scalars, None)
    quantiles = figures["delta_quantiles"] or {}
    bins = sorted((float(centre), count) for centre, count in figures["weight_histogram"].items())
    histogram = WeightHistogram([centre for centre, _ in bins], [count for _, count in bins])
    return Group(name, scalars | {f"delta_quantile_{share}": value for share, value in quantiles.items()}, histogram)
