"""What a step reports of its tokens: sums, a histogram of the weights, quantiles of the excess loss (delta), by corpus source.

All of it is counts and sums, so micro-batches and ranks add up. The quantiles come from a histogram: exact to 1/64 nat.
"""

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

import torch
from torch import Tensor

from shards.manifest import CorpusFile
from trainer.objectives.objective import TokenLosses, Weighted

SUMS = (
    "tokens",
    "loss",
    "weight",
    "weight_squared",
    "objective_loss",
    "delta",
    "deltas",
    "clipped_low",
    "clipped_high",
)
WEIGHT_STEP, WEIGHT_BINS = 0.05, 41  # bins centred on 0, 0.05, .. 2; the last one is also for what is above
DELTA_STEP, DELTA_BINS = 1 / 32, 1025  # centred on -16 .. 16 nats; the outer ones are also for what is beyond
QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
MAX_SOURCES = 16


class Sources:
    """Groups of corpus files that figures are given for. names; group: of each corpus file, list of int.

    Each file by itself where there are at most 16; else the first folder of its path, the smallest ones together.
    """

    def __init__(self, corpus: Sequence[CorpusFile]) -> None:
        labels = [re.sub(r"#\d+-of-\d+$", "", file.path) for file in corpus]  # the shards of a dataset are one source
        if len(set(labels)) > MAX_SOURCES:
            labels = [_folder(path) for path in labels]
        tokens: dict[str, int] = {}
        for label, file in zip(labels, corpus):
            tokens[label] = tokens.get(label, 0) + file.tokens
        if len(tokens) > MAX_SOURCES:
            largest = set(sorted(tokens, key=lambda label: -tokens[label])[: MAX_SOURCES - 1])
            labels = [label if label in largest else "(others)" for label in labels]
        self.names = list(dict.fromkeys(labels))
        self.group = [self.names.index(label) for label in labels]

    @classmethod
    def of_mixture(cls, corpora: Mapping[str, Sequence[CorpusFile]]) -> "Sources":
        """The sources of a mixture; corpora: by name the corpus files of each, which are numbered on."""
        sources = cls(())
        sources.names = list(corpora)
        sources.group = [index for index, files in enumerate(corpora.values()) for _ in files]
        return sources


def _folder(path: str) -> str:
    parts = PurePosixPath(path).parts
    if ":" in parts[0]:  # a dataset, hf://NAME or FOLDER:CONFIG:SPLIT
        return path
    return parts[0] if len(parts) > 1 else "(no folder)"


class StepStatistics:
    """Sums over predicted tokens, float64 [groups, columns], added to by every call of the loss head.

    group: for each corpus file the group that its tokens count for (default: all in one). figures: names of an
    objective's own figures; per: figures whose mean is over what another one counts. table is what ranks add up.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        group: Sequence[int] | None = None,
        figures: Sequence[str] = (),
        per: Mapping[str, str] | None = None,
    ) -> None:
        self._group, self._names, self._per = group, (*SUMS, *figures), per or {}
        groups = 1 if group is None else max(group) + 1
        columns = len(self._names) + WEIGHT_BINS + DELTA_BINS
        self.table = torch.zeros(groups, columns, dtype=torch.float64, device=device)
        self.auxiliary = torch.zeros(2, dtype=torch.float64, device=device)
        self.router_loss, self.z_loss = self.auxiliary  # views, so that ranks add up both at once

    def add_router_loss(self, value: Tensor) -> None:
        """Add a micro-batch's balancing loss, weighted by its share of the tokens of the step; ranks add up."""
        self.router_loss += value.double()

    def add_z_loss(self, log_z_N: Tensor) -> None:
        """Add the squared logs of the softmax's normaliser of some predicted tokens."""
        self.z_loss += log_z_N.double().square().sum()

    def add_weights(self, source: int, losses_N: Tensor, weighted: Weighted) -> None:
        """Add tokens of one row. losses_N: -log p of the base."""
        weights_N = weighted.weights_N.double()
        sums = {
            "loss": losses_N,
            "weight": weights_N,
            "weight_squared": weights_N.square(),
            "objective_loss": weights_N * losses_N.double(),
            "delta": weighted.delta_N,
            "clipped_low": weighted.clipped_low_N,
            "clipped_high": weighted.clipped_high_N,
        }
        self._add(source, sums, weights_N, weighted.delta_N)

    def add_losses(self, source: int, losses: TokenLosses, logprobs_N: Tensor | None) -> None:
        """Add tokens of one row whose loss is an objective's own. logprobs_N: log p of the reference."""
        delta_N = None if logprobs_N is None else losses.ntp_N + logprobs_N
        ones_N = torch.ones_like(losses.ntp_N)
        sums = {"loss": losses.ntp_N, "weight": ones_N, "weight_squared": ones_N, "objective_loss": losses.losses_N}
        self._add(source, sums | {"delta": delta_N} | dict(losses.figures), ones_N, delta_N)

    def _add(self, source: int, values: dict[str, Tensor | None], weights_N: Tensor, delta_N: Tensor | None) -> None:
        row_C = self.table[0 if self._group is None else self._group[source]]
        zero = row_C.new_zeros(())
        values = values | {"deltas": None if delta_N is None else torch.ones_like(delta_N)}
        own = [values.get(name) for name in self._names[1:]]
        totals = [zero if value is None else value.sum(dtype=torch.float64) for value in own]
        row_C[: len(self._names)] += torch.stack([zero + len(weights_N), *totals])
        first = len(self._names)
        _count(row_C[first : first + WEIGHT_BINS], weights_N / WEIGHT_STEP)
        if delta_N is not None:
            _count(row_C[first + WEIGHT_BINS :], delta_N / DELTA_STEP + DELTA_BINS // 2)

    def total(self, name: str) -> Tensor:
        """One of the sums over all groups, where the table is."""
        return self.table[:, self._names.index(name)].sum()

    @property
    def sums(self) -> dict[str, float]:
        """Over all groups, by name."""
        return dict(zip(self._names, self.table.sum(0).tolist()))

    def metrics(self, sources: Sources) -> dict[str, Any]:
        """Figures over all predicted tokens, and under "sources" those of each group that has any."""
        table = self.table.cpu()
        groups = {name: self._means(row_C) for name, row_C in zip(sources.names, table) if row_C[0] > 0}
        return {**self._means(table.sum(0)), "sources": groups}

    def _means(self, row_C: Tensor) -> dict[str, Any]:
        sums = dict(zip(self._names, row_C.tolist()))
        tokens = sums["tokens"]
        weight_mean = sums["weight"] / tokens
        first = len(self._names)
        weight_counts = row_C[first : first + WEIGHT_BINS].long().tolist()
        return {
            "predicted_tokens": int(tokens),
            "loss": sums["objective_loss"] / tokens,
            "ntp_loss": sums["loss"] / tokens,
            "weight_mean": weight_mean,
            "weight_std": math.sqrt(max(0.0, sums["weight_squared"] / tokens - weight_mean**2)),
            "clipped_low": sums["clipped_low"] / tokens,
            "clipped_high": sums["clipped_high"] / tokens,
            "effective_tokens": sums["weight"] ** 2 / sums["weight_squared"] if sums["weight_squared"] else 0.0,
            "weight_histogram": {
                f"{index * WEIGHT_STEP:.2f}": count for index, count in enumerate(weight_counts) if count
            },
            "delta_mean": sums["delta"] / sums["deltas"] if sums["deltas"] else None,
            "delta_quantiles": _quantiles(row_C[first + WEIGHT_BINS :]) if sums["deltas"] else None,
            **{name: _mean(sums[name], sums[self._per.get(name, "tokens")]) for name in self._names[len(SUMS) :]},
        }


def _mean(total: float, count: float) -> float | None:
    return total / count if count else None


def _count(bins: Tensor, values_N: Tensor) -> None:
    """Add each value, rounded to the nearest integer and not beyond the ends, to the bin of that number."""
    # a NaN has no bin; the step ends at its loss
    index_N = values_N.double().nan_to_num(0).round().clamp(0, len(bins) - 1).long()
    bins.index_add_(0, index_N, torch.ones_like(index_N, dtype=bins.dtype))


def _quantiles(counts: Tensor) -> dict[str, float]:
    """Smallest excess loss, to half a bin, that at least a share of the tokens does not exceed; by share."""
    cumulative = counts.cumsum(0)
    wanted = torch.tensor(QUANTILES, dtype=cumulative.dtype) * cumulative[-1]
    index = torch.searchsorted(cumulative, wanted).tolist()
    return {f"{share:g}": (i - DELTA_BINS // 2) * DELTA_STEP for share, i in zip(QUANTILES, index)}
