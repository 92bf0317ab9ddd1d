"""Distillation from drawn tokens: float64, unbiased where a top k is not, and through remit train."""

from dataclasses import replace
from pathlib import Path
from shutil import copytree

import numpy as np
import pyarrow as pa
import pytest
import torch
from annotated import annotate, by_model, rows_of_step, run
from oracles import load, row_distributions
from test_objectives_train import gradient_norm

from scorer.logits import draws
from shards import ShardFolder, write_part
from trainer.objectives.kd import kd_losses
from trainer.objectives.sampled import sampled_losses


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize(("vocabulary", "count", "spread"), [(50, 1, 1), (131, 12, 3), (9, 30, 40)])
def test_equals_float64_autograd(weight: float, vocabulary: int, count: int, spread: float) -> None:
    g = torch.Generator().manual_seed(0)
    logits, targets = (
        spread * torch.randn(40, vocabulary, generator=g),
        torch.randint(0, vocabulary, (40,), generator=g),
    )
    ids = torch.randint(0, vocabulary, (40, count), generator=g).sort(-1).values
    leaf = logits.double().requires_grad_()
    logprobs = leaf.log_softmax(-1)
    cross = -logprobs.gather(1, ids).mean(-1)
    want = (1 - weight) * -logprobs.gather(1, targets[:, None])[:, 0] + weight * cross
    want.sum().backward()
    buffer = logits.clone()
    result = sampled_losses(buffer, targets, ids, weight)
    torch.testing.assert_close(result.losses_N.double(), want.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.figures["sampled_loss"].double(), cross.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(buffer.double(), leaf.grad, rtol=1e-4, atol=2e-6)


def test_unbiased_where_a_top_k_is_biased() -> None:
    """The mean gradient over many draws is that of the whole distribution; a renormalised top k of as many ids stays off."""
    g = torch.Generator().manual_seed(1)
    vocabulary, count, places = 60, 8, 20_000
    reference = (1.5 * torch.randn(1, vocabulary, generator=g)).repeat(places, 1)
    reference = (reference + 1e-4 * torch.randn(places, vocabulary, generator=g)).log_softmax(-1)
    logits = torch.randn(1, vocabulary, generator=g).repeat(places, 1)
    targets = torch.randint(0, vocabulary, (places,), generator=g)
    mean, top = logits.clone(), logits.clone()
    sampled_losses(mean, targets, draws(reference, targets, count), 1.0)
    best = reference.topk(count)
    kd_losses(top, targets, best.indices, best.values, 1.0, 1.0, "renormalise")
    whole = logits[0].softmax(-1) - reference[0].exp()
    assert (mean.mean(0) - whole).norm() < 0.02 * whole.norm()
    assert (top.mean(0) - whole).norm() > 0.2 * whole.norm()


def with_samples(small: Path, out: Path, model: Path, count: int) -> Path:
    """The folder with log-probs and random drawn ids."""
    rng = np.random.default_rng(0)

    def ids(row: dict) -> list:
        return [None, *np.sort(rng.integers(0, 500, (len(row["input_ids"]) - 1, count)), axis=1).tolist()]

    plain = annotate(small, out / "plain", by_model(model, "packed", 1 / 64), "packed", 1 / 64)
    old = ShardFolder(plain)
    plan = replace(
        old.manifest, references={"rl": old.manifest.references["rl"] | {"sample_k": count, "vocab_size": 521}}
    )
    copytree(plain / "_tokenizer", out / "shards" / "_tokenizer")
    plan.write(out / "shards")
    for index, part in enumerate(plan.parts):
        table = pa.ipc.open_file(plain / part.name).read_all().replace_schema_metadata(None)
        column = pa.array([ids(row) for row in table.to_pylist()], plan.schema.field("rl_sample_ids").type)
        whole = pa.table([*table.columns, column], schema=plan.schema)
        batches = whole.combine_chunks().to_batches(max_chunksize=plan.rows_per_batch)
        write_part(out / "shards", part.name, plan.schema, plan.part_metadata(index), batches)
    return out / "shards"


def test_through_train(tmp_path: Path, small: Path, models: dict[str, Path]) -> None:
    shards = with_samples(small, tmp_path, models["reference"], 7)
    metrics = run(tmp_path / "out", shards, models["base"], objective="sampled", kd_weight=0.7, seed=4)[0]
    base, plain, cross, count = load(models["base"]), 0.0, 0.0, 0
    for row in rows_of_step(shards, 0, 8, seed=4):
        for t, logprobs_V in enumerate(row_distributions(base, row, "packed")):
            if logprobs_V is not None:
                plain, count = plain - logprobs_V[row["input_ids"][t]], count + 1
                cross = cross - logprobs_V[row["rl_sample_ids"][t]].mean()
    loss = (0.3 * plain + 0.7 * cross) / count
    assert metrics["loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert metrics["sampled_loss"] == pytest.approx(cross.item() / count, abs=1e-5)
    loss.backward()
    assert metrics["grad_norm"] == pytest.approx(gradient_norm(base), rel=1e-4)
