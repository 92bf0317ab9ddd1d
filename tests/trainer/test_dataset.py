"""Rows and objective in other people's loops: torch's and torchdata's loaders, transformers' Trainer."""

from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from annotated import rows_of_step
from oracles import load, read_rows, remit_step
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from trainer.batch import Row
from trainer.dataset import IGNORED, Collator, RowDataset, TrainerLoss, split_labels


def names(rows: list[Row]) -> list[str]:
    return [row.where for row in rows]


def test_rows_are_those_of_the_trainer(annotated: dict[str, Path]) -> None:
    dataset = RowDataset(annotated["packed"], "rl", seed=4)
    wanted = rows_of_step(annotated["packed"], 0, 8, seed=4) + rows_of_step(annotated["packed"], 1, 8, seed=4)
    for row, want in zip(islice(dataset, 16), wanted, strict=True):
        assert row.input_ids.tolist() == want["input_ids"]


@pytest.mark.usefixtures("starts_processes")
def test_ranks_and_workers_take_every_row_once(annotated: dict[str, Path]) -> None:
    every = names(list(RowDataset(annotated["packed"], "rl", epochs=1)))
    assert len(set(every)) == len(every) == len(read_rows(annotated["packed"]))
    ranks = [names(list(RowDataset(annotated["packed"], "rl", epochs=1, rank=r, world_size=3))) for r in range(3)]
    assert [ranks[p % 3][p // 3] for p in range(len(every))] == every
    loader = DataLoader(RowDataset(annotated["packed"], None, epochs=1), batch_size=None, num_workers=2)
    assert sorted(names(list(loader))) == sorted(every)


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.usefixtures("starts_processes")
def test_stateful_loader_resumes(annotated: dict[str, Path], workers: int) -> None:
    def make() -> StatefulDataLoader:
        rows = RowDataset(annotated["packed"], "rl", seed=2)
        return StatefulDataLoader(rows, batch_size=4, num_workers=workers, collate_fn=names)

    loader = make()
    iterator = iter(loader)
    first = [next(iterator) for _ in range(5)]
    state = loader.state_dict()
    following = [next(iterator) for _ in range(40)]  # beyond what was read ahead, and over an epoch's end
    again = make()
    again.load_state_dict(state)
    assert list(islice(again, 40)) == following
    assert following[0] not in first


def test_labels_carry_ids_and_logprobs() -> None:
    """Extreme values, by hand: the exact float32 bits come back, and no pair collides with the marker."""
    logprobs = np.array([0.0, -0.0, -1e-45, -3.5, -np.finfo(np.float32).max, -100.0], np.float32)
    ids = np.array([0, 2**31 - 1, 5, 151_935, 2**31 - 100, 100], np.int32)
    predicted = np.array([False, True, True, True, True, True])
    row = Row("here", 0, ids, np.array([6], np.int32), predicted, {"logprobs": logprobs})
    labels = Collator("packed")([row])["labels"]
    assert labels.tolist()[0][0] == IGNORED
    assert int((labels != IGNORED).sum()) == 5
    got_ids, got, counts = split_labels(labels)
    assert got_ids[0, 1:].tolist() == ids[1:].tolist()
    assert got[0, 1:].numpy().tobytes() == logprobs[1:].tobytes()
    assert counts[0].tolist() == predicted.tolist()


def test_a_state_of_other_readers_is_refused(annotated: dict[str, Path]) -> None:
    rows = RowDataset(annotated["packed"], "rl", seed=2, world_size=2)
    next(iter(rows))
    for other in ({"world_size": 3}, {"world_size": 2, "rank": 1}, {"world_size": 2, "seed": 3}):
        again = RowDataset(annotated["packed"], "rl", **({"seed": 2} | other))
        again.load_state_dict(rows.state_dict())
        with pytest.raises(ValueError, match="rows would be lost and train twice"):
            next(iter(again))


def test_rows_go_to_spawned_workers(annotated: dict[str, Path]) -> None:
    rows = RowDataset(annotated["document"], "rl", epochs=1)
    every = names(list(rows))  # its caches are full now
    loader = DataLoader(rows, batch_size=None, num_workers=1, multiprocessing_context="spawn")
    assert names(list(loader)) == every
    assert rows.context == "document"


def test_loss_of_rows_that_predict_nothing_and_of_several_gpus() -> None:
    """By hand: one row of one token has no loss, but a gradient; under DataParallel the counts come as a column."""
    loss = TrainerLoss("ntp")
    logits = torch.zeros(1, 3, 4, requires_grad=True)
    nothing = loss(SimpleNamespace(logits=logits), torch.full((1, 3), IGNORED), torch.tensor(5))
    nothing.backward()
    assert nothing.item() == 0
    assert logits.grad is not None
    labels = torch.tensor([[IGNORED, 1, 2]])  # log p = -log 4 for both
    for count in (torch.tensor([[2], [2]]), torch.tensor(4), 4):
        assert loss(SimpleNamespace(logits=logits), labels, count).item() == pytest.approx(2 * np.log(4) / 4)
    assert loss(SimpleNamespace(logits=logits), labels).item() == pytest.approx(np.log(4))


@pytest.mark.parametrize(("scope", "kept"), [("row", [(0, 1), (1, 2)]), ("micro", [(1, 1), (1, 2)])])
def test_rho1_in_other_loops(scope: str, kept: list[tuple[int, int]]) -> None:
    """By hand: two rows of two tokens, half of them kept; every loss is log 4, so the stored log-prob decides."""
    logits = torch.zeros(2, 3, 4, requires_grad=True)
    columns = {"logprobs": np.array([[0, -2, -3], [0, -1, -0.5]], np.float32)}
    ids = np.array([3, 1, 2], np.int32)
    predicted = np.array([False, True, True])
    rows = [
        Row("here", 0, ids, np.array([3], np.int32), predicted, {"logprobs": columns["logprobs"][row]})
        for row in range(2)
    ]
    loss = TrainerLoss("rho1", keep_ratio=0.5, scope=scope)(
        SimpleNamespace(logits=logits), Collator("packed")(rows)["labels"]
    )
    loss.backward()
    assert loss.item() == pytest.approx(2 * np.log(4) / 0.5 / 4)
    trained = logits.grad.abs().sum(-1).nonzero().tolist()
    assert trained == [[row, position - 1] for row, position in kept]


@pytest.mark.parametrize(
    ("objective", "settings"), [("kd", {}), ("rho1", {"scope": "global"}), ("remit", {"centring": "document"})]
)
def test_what_labels_cannot_carry_is_refused(objective: str, settings: dict) -> None:
    with pytest.raises(ValueError, match="needs more than the labels of one batch; use remit train"):
        TrainerLoss(objective, **settings)


def test_an_objective_without_its_reference_is_refused(annotated: dict[str, Path]) -> None:
    rows = list(islice(RowDataset(annotated["packed"], None), 4))
    labels = Collator("packed")(rows)["labels"]
    outputs = SimpleNamespace(logits=torch.zeros(*labels.shape, 600))
    assert TrainerLoss("ntp")(outputs, labels).item() == pytest.approx(np.log(600))
    for objective in ("remit", "rho1"):
        with pytest.raises(ValueError, match="read without a reference"):
            TrainerLoss(objective)(outputs, labels)


@pytest.mark.parametrize("context", ["packed", "document"])
@pytest.mark.parametrize("objective", ["remit", "ntp"])
def test_transformers_trainer(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], context: str, objective: str
) -> None:
    """Two accumulated micro-batches of four rows: loss and gradient norm of the first step against float64."""
    shards = annotated[context]
    model = load(models["base"]).float()
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2, logging_steps=1,
        remove_unused_columns=False, report_to=[], use_cpu=True, save_strategy="no", learning_rate=1e-4,
        disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(
        model, arguments, train_dataset=RowDataset(shards, "rl", seed=4, context=context),
        data_collator=Collator(context), compute_loss_func=TrainerLoss(objective),
    )  # fmt: skip
    trainer.train()
    base = load(models["base"])
    column = "rl_logprobs" if objective == "remit" else None
    want = remit_step(base, rows_of_step(shards, 0, 8, seed=4), context, column, 0.2)
    want["loss"].backward()
    norm = torch.sqrt(sum(p.grad.double().square().sum() for p in base.parameters() if p.grad is not None))
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(want["loss"].item(), abs=2e-4)  # the Trainer rounds to four digits
    assert first["grad_norm"] == pytest.approx(norm.item(), rel=1e-3)
