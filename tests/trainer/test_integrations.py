"""Weights of whole micro-batches, and OLMo-core on what was exported for it."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from oracles import load, read_rows, remit_step, rho1_step

from pipelines.cli import main
from trainer.integrations.weights import row_objective, row_weights


def batch(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses, log-probs and what counts, of unequal rows: one is full, one predicts a single token, one nothing."""
    generator = torch.Generator().manual_seed(seed)
    losses_BT = torch.rand(6, 17, generator=generator) * 9
    logprobs_BT = -torch.randint(0, 400, (6, 17), generator=generator) / 64
    predicted_BT = torch.rand(6, 17, generator=generator) < torch.tensor([1.0, 0.9, 0.5, 0.3, 0.0, 0.0])[:, None]
    predicted_BT[0], predicted_BT[5, 3] = True, True
    return losses_BT, logprobs_BT.where(predicted_BT, torch.nan), predicted_BT


@pytest.mark.parametrize(("epsilon", "centring", "weight_map"), [(0.2, "row", "sigmoid"), (math.inf, "none", "exp"), (0.6, "row", "linear")])  # fmt: skip
def test_weights_by_hand(epsilon: float, centring: str, weight_map: str) -> None:
    """Eq. 3-5 in Python's own floats."""
    losses_BT, logprobs_BT, predicted_BT = batch(1)
    settings = row_objective("remit", epsilon=epsilon, centring=centring, weight_map=weight_map)
    weights = row_weights(losses_BT, logprobs_BT, predicted_BT, settings)
    maps = {
        "sigmoid": lambda x: 2 / (1 + math.exp(-x)),
        "exp": lambda x: math.exp(x / 2),
        "linear": lambda x: max(0, 1 + x / 2),
    }
    for row in range(6):
        places = predicted_BT[row].nonzero()[:, 0].tolist()
        excess = {t: losses_BT[row, t].item() + logprobs_BT[row, t].item() for t in places}
        centre = sum(excess.values()) / len(excess) if excess and centring == "row" else 0.0
        for t in range(17):
            wanted = 0.0
            if t in excess:
                wanted = min(1 + epsilon, max(1 - epsilon, maps[weight_map](excess[t] - centre)))
            assert weights[row, t].item() == pytest.approx(wanted, rel=1e-5), (row, t)


def test_kept_tokens_by_hand() -> None:
    """RHO-1 within a row, equal values included: the earlier ones are kept."""
    losses_BT, logprobs_BT, predicted_BT = batch(2)
    losses_BT[0] = 1.0
    logprobs_BT[0] = -0.5
    weights = row_weights(losses_BT, logprobs_BT, predicted_BT, row_objective("rho1", keep_ratio=0.55))
    assert (weights[0] > 0).tolist() == [True] * 9 + [False] * 8  # 0.55 * 17 = 9.35
    for row in range(6):
        places = predicted_BT[row].nonzero()[:, 0].tolist()
        best = sorted(places, key=lambda t: (-(losses_BT[row, t] + logprobs_BT[row, t]).item(), t))
        kept = best[: max(1, math.floor(0.55 * len(places) + 0.5))] if places else []
        assert weights[row].nonzero()[:, 0].tolist() == sorted(kept)
        assert all(weights[row, t].item() == pytest.approx(1 / 0.55) for t in kept)


def test_objectives_that_need_more_are_refused() -> None:
    for objective, settings in (
        ("kd", {}),
        ("remit", {"centring": "document"}),
        ("rho1", {"scope": "global"}),
        ("switch", {}),
    ):
        with pytest.raises(ValueError, match="remit train has the others"):
            row_objective(objective, **settings)
    with pytest.raises(ValueError, match="belongs to --objective rho1"):
        row_objective("remit", keep_ratio=0.5)


@pytest.fixture(scope="module")
def exported(annotated: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rows of at most 24 tokens for OLMo-core, scored in either context."""
    out = tmp_path_factory.mktemp("olmo-core")
    for context, shards in annotated.items():
        with pytest.raises(SystemExit) as ended:
            main(["export", "--to", "olmo-core", "--shards", str(shards), "--out", str(out / context)])
        assert ended.value.code == 0
    return {context: out / context for context in annotated}


def test_olmo_core_reads_rows(annotated: dict[str, Path], exported: dict[str, Path]) -> None:
    """By OLMo-core's own dataset, and by the one with log-probs: a row after the other."""
    from olmo_core.data import NumpyFSLDataset

    from trainer.integrations.olmo_core import ScoredCollator, ScoredRows

    for context, out in exported.items():
        rows = read_rows(annotated[context])
        scored = ScoredRows.open(out)
        plain = NumpyFSLDataset(
            *sorted(out.glob("part-?????.npy")), sequence_length=24, pad_token_id=0, eos_token_id=0, vocab_size=521,
            label_mask_paths=sorted(out.glob("part-?????_label_mask.npy")),
        )  # fmt: skip
        assert len(plain) == len(scored) == len(rows)
        for index, row in enumerate(rows):
            length, padding = len(row["input_ids"]), 24 - len(row["input_ids"])
            for item in (plain[index], scored[index]):
                assert item["input_ids"].tolist() == row["input_ids"] + [0] * padding
                assert item["label_mask"].tolist() == [v is not None for v in row["rl_logprobs"]] + [False] * padding
            own = [math.nan if value is None else value for value in row["rl_logprobs"]] + [math.nan] * padding
            assert np.array_equal(scored[index]["logprobs"].numpy(), np.array(own, np.float32), equal_nan=True)
            if context == "document":
                assert scored[index]["doc_lens"].tolist() == row["doc_lengths"] + ([padding] if padding else [])
            assert length <= 24
        assert scored[-1]["logprobs"].numpy().tobytes() == scored[len(rows) - 1]["logprobs"].numpy().tobytes()
        collated = ScoredCollator(pad_token_id=0)([scored[0], scored[1]])
        assert collated["logprobs"].shape == collated["input_ids"].shape == (2, 24)


@pytest.mark.parametrize(("objective", "epsilon"), [("remit", 0.2), ("rho1", 0.2), ("ntp", 0.2)])
def test_steps_in_olmo_core(
    annotated: dict[str, Path],
    exported: dict[str, Path],
    models: dict[str, Path],
    tmp_path: Path,
    objective: str,
    epsilon: float,
) -> None:
    """OLMo-core's own loop and AdamW, against float64 on the rows that it drew: transformers and the equations alone."""
    from benchmarks.other_trainers.olmo_core_steps import Settings, train

    settings = Settings(
        exported["packed"],
        models["base"],
        tmp_path,
        objective=objective,
        epsilon=epsilon,
        steps=3,
        batch_rows=8,
        micro_rows=4,
    )
    found = train(settings)
    rows, model = read_rows(annotated["packed"]), load(models["base"]).double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, (0.9, 0.95), weight_decay=0.0)
    seen = []
    for step in found:
        own = [rows[index] for index in step["rows"]]
        if objective == "rho1":
            expected: dict[str, Any] = rho1_step(model, own, "packed", "rl_logprobs", [[n] for n in range(8)], 0.8)
        else:
            expected = remit_step(model, own, "packed", "rl_logprobs" if objective == "remit" else None, epsilon)
        assert step["loss"] == pytest.approx(float(expected["loss"].detach()), rel=1e-5)
        assert step["ntp_loss"] == pytest.approx(expected["ntp_loss"], rel=1e-5)
        expected["loss"].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen += step["rows"]
    assert len(set(seen)) == 24


def test_what_olmo_core_cannot_weigh_is_refused(
    exported: dict[str, Path], models: dict[str, Path], tmp_path: Path
) -> None:
    from olmo_core.optim import AdamWConfig

    from benchmarks.other_trainers.olmo_core_steps import build_model
    from trainer.integrations.olmo_core import ScoredRows, WeightedTrainModule

    model = build_model(models["base"])
    with pytest.raises(ValueError, match="z_loss_multiplier is 1e-05, expected None"):
        WeightedTrainModule(model, AdamWConfig(), 24, 24, z_loss_multiplier=1e-5)
    with pytest.raises(ValueError, match="has log-probs of rl, 'sft' asked for"):
        ScoredRows.open(exported["packed"], "sft")
    with pytest.raises(ValueError, match=r"has no export\.json"):
        ScoredRows.open(tmp_path)
    module = WeightedTrainModule(model, AdamWConfig(), 24, 24)
    ids = torch.ones(1, 24, dtype=torch.long)
    with pytest.raises(ValueError, match="the batch has no logprobs"):
        module.model_forward(ids, labels=ids, loss_reduction="sum")
