"""Stored entropies against the whole float64 distribution of a transformers forward."""

from pathlib import Path

import torch
from oracles import load, read_rows, row_distributions

NOISE = 1e-4  # nat, between an engine in float32 and transformers


def compare_entropies(
    folder: Path,
    model: Path,
    context: str,
    step: float,
    temperature: float | None,
    every: int = 1,
    noise: float = NOISE,
) -> int:
    """Every value against its definition; how many places have one. Without a temperature nothing may be there."""
    label = "" if temperature is None else f"{temperature:g}".replace(".", "p")
    columns = {"rl_entropy", f"rl_entropy_t{label}", f"rl_log_partition_t{label}"} if temperature else set()
    reference, compared = load(model), 0
    with torch.no_grad():
        for row in read_rows(folder)[::every]:
            assert {name for name in row if "entropy" in name or "partition" in name} == columns
            if not columns:
                continue
            want = row_distributions(reference, row, context)
            stored = [row[name] for name in ("rl_entropy", f"rl_entropy_t{label}", f"rl_log_partition_t{label}")]
            for own, distribution, *values in zip(row["rl_logprobs"], want, *stored, strict=True):
                assert {value is None for value in (own, distribution, *values)} == {distribution is None}
                if distribution is None:
                    continue
                hot = distribution / temperature
                log_partition = hot.exp().sum().log()
                entropies = [-(d.exp() * d).sum() for d in (distribution, hot - log_partition)]
                for value, wanted in zip(values, [*entropies, log_partition]):
                    assert abs(value - wanted) <= noise + step / 2
                    assert not step or value / step == round(value / step)
                compared += 1
    return compared
