"""Weights from the reference's entropy through remit train: the first step against the definition in float64."""

import math
from pathlib import Path

import pytest
import torch
from annotated import annotate, by_model, entropies_by_model, rows_of_step, run
from oracles import load, read_rows, row_logprobs
from test_objectives_train import gradient_norm

STEP = 1 / 64


@pytest.mark.parametrize(("context", "scale"), [("packed", 1.0), ("document", 0.3)])
def test_first_step(tmp_path: Path, small: Path, models: dict[str, Path], context: str, scale: float) -> None:
    """scale: of the stored entropies, since those of an untrained model are all above ln 20, where the weight is 1."""
    found = entropies_by_model(models["reference"], context, None, STEP)
    bad = [number for number, row in enumerate(read_rows(small)) if len(row["input_ids"]) > 5][2::9]

    def entropies(row: dict) -> list:
        values = [value if value is None else round(scale * value / STEP) * STEP for value in found(row)]
        return [value if value is None or place % 7 else 0.0 for place, value in enumerate(values)]  # some are sure

    shards = annotate(
        small, tmp_path / "shards", by_model(models["reference"], context, STEP), context, STEP, entropy=entropies,
        unscored=bad,
    )  # fmt: skip
    metrics = run(tmp_path / "out", shards, models["base"], objective="entropy", seed=4)[0]
    base, rows = load(models["base"]), rows_of_step(shards, 0, 8, seed=4)
    total: torch.Tensor | float = 0.0
    weights, count = [], 0
    for row in rows:
        for logprob, entropy in zip(row_logprobs(base, row, context), row["rl_entropy"]):
            if logprob is None or entropy is None:  # nothing precedes, or the row was not scored
                continue
            weights.append(min(1.0, entropy / math.log(20)))
            total, count = total - weights[-1] * logprob, count + 1
    assert min(weights) == 0
    assert max(weights) == (1 if scale == 1 else pytest.approx(scale * math.log(521) / math.log(20), rel=0.2))
    loss = total / count
    loss.backward()
    assert metrics["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert metrics["predicted_tokens"] == count
    assert metrics["weight_mean"] == pytest.approx(sum(weights) / count, rel=1e-5)
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(base), rel=1e-4)


def test_a_folder_without_entropies_is_refused(tmp_path: Path, small: Path, models: dict[str, Path]) -> None:
    shards = annotate(small, tmp_path / "shards", by_model(models["reference"], "packed", STEP), "packed", STEP)
    with pytest.raises(ValueError, match="no column rl_entropy; score with --entropy"):
        run(tmp_path / "out", shards, models["base"], objective="entropy")
