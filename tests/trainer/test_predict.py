"""What is to be predicted, from packed conversations to the loss: each objective against float64 over the masked tokens."""

import json
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars
import pyarrow.dataset
import pytest
import torch
from annotated import annotate, run
from conftest import pack_inline, source_texts
from oracles import contexts, kd_step, load, read_rows, remit_step, rho1_step, row_distributions, row_logprobs

from scorer.config import PackConfig, SelectConfig
from scorer.select import select
from shards import ShardFolder
from shards.verify import verify_folder
from trainer.config import TrainConfig
from trainer.data import RowReader
from trainer.dataset import IGNORED, Collator, RowDataset
from trainer.evaluation import read_lines
from trainer.train import train

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content + eos_token }}{% endgeneration %}"
    "{% else %}{{ m.role + ': ' + m.content + '\n' }}{% endif %}{% endfor %}"
)
TOP = 8


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path, models: dict[str, Path]
) -> dict[str, Path]:
    """Conversations by best-fit packing, annotated in both contexts. Some rows predict nothing."""
    folder = tmp_path_factory.mktemp("conversations")
    texts = [text[:200] for text in source_texts(60) if text]
    documents = [
        {"messages": [{"role": ("user", "assistant")[turn % 2], "content": texts[(3 * number + turn) % len(texts)]}
                      for turn in range(1 + number % 4)]} for number in range(40)
    ]  # fmt: skip
    (folder / "c.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (folder / "t.jinja").write_text(TEMPLATE)
    config = PackConfig(
        [str(folder / "c.jsonl")], str(tokenizer_folder), str(folder / "rows"), 64, messages_field="messages",
        train_on="assistant", chat_template=str(folder / "t.jinja"), packing="best-fit", tokens_per_shard=64 * 10,
    )  # fmt: skip
    packed = pack_inline(config)
    assert packed.manifest.predict
    model = load(models["reference"]).double()

    def logprobs(row: dict, context: str) -> list:
        return [None if v is None else round(v.item() * 64) / 64 for v in row_logprobs(model, row, context)]

    def top(row: dict, context: str) -> list:
        found: list = []
        for logprobs_V, own, stored in zip(
            row_distributions(model, row, context), row["input_ids"], logprobs(row, context)
        ):
            if logprobs_V is None:
                found.append(None)
                continue
            best = logprobs_V.topk(TOP)
            pairs = {token: round(value * 64) / 64 for token, value in zip(best.indices.tolist(), best.values.tolist())}
            if own in pairs:
                pairs[own] = stored
            ordered = sorted(pairs.items(), key=lambda pair: -pair[1])
            found.append(tuple(map(list, zip(*ordered))))
        return found

    with torch.no_grad():
        return {
            context: annotate(
                packed.path, folder / context, lambda row, c=context: logprobs(row, c), context, 1 / 64,
                top=lambda row, c=context: top(row, c),
            )
            for context in ("packed", "document")
        }  # fmt: skip


def test_other_tools_read_the_column(shards: dict[str, Path]) -> None:
    rows = read_rows(shards["packed"])
    assert verify_folder(ShardFolder(shards["packed"])).problems == []
    frame = polars.read_ipc(f"{shards['packed']}/part-*.arrow")
    assert frame["predict"].to_list() == [row["predict"] for row in rows]
    dataset = pyarrow.dataset.dataset(shards["packed"], format="arrow")
    assert dataset is not None
    (count,) = duckdb.sql("select sum(x::int) from (select unnest(predict) as x from dataset)").fetchall()[0]
    assert count == sum(sum(row["predict"]) for row in rows)
    assert any(not any(row["predict"]) for row in rows)


@pytest.mark.parametrize("context", ["packed", "document"])
def test_rows_of_reader_and_labels(shards: dict[str, Path], context: str) -> None:
    reader = RowReader(ShardFolder(shards[context]), context, "rl", 10**6)
    rows = reader.rows(
        np.array([(block, row) for block, count in enumerate(reader.block_rows) for row in range(count)])
    )
    for row, want in zip(rows, read_rows(shards[context]), strict=True):
        first = {start for start, _ in contexts(want, context)}
        expected = [flag and place not in first for place, flag in enumerate(want["predict"])]
        assert row.predicted.tolist() == expected
        assert row.columns["logprobs"].tolist() == [
            value if flag else 0 for value, flag in zip(want["rl_logprobs"], expected)
        ]
        labels = Collator(context)([row])["labels"][0]
        assert ((labels != IGNORED).tolist()) == expected
    every = list(RowDataset(shards[context], "rl", epochs=1))
    assert sum(row.predicted.sum() for row in every) == sum(row.predicted.sum() for row in rows)


@pytest.mark.parametrize(
    ("context", "settings"),
    [
        ("packed", {"objective": "ntp"}), ("packed", {"objective": "remit"}), ("document", {"objective": "remit"}),
        ("packed", {"objective": "rho1", "keep_ratio": 0.6, "scope": "row"}),
        ("document", {"objective": "rho1", "keep_ratio": 0.6, "scope": "global"}),
        ("packed", {"objective": "kd", "kd_weight": 0.4, "missing_mass": "bucket"}),
    ],
)  # fmt: skip
def test_loss_is_over_what_is_to_be_predicted(
    tmp_path: Path, shards: dict[str, Path], models: dict[str, Path], context: str, settings: dict[str, Any]
) -> None:
    folder, base = shards[context], load(models["base"]).double()
    rows = read_rows(folder)
    options = {"global_batch_size": len(rows), "micro_batch_size": 5, "learning_rate": 1e-6, "reference": "rl"}
    if settings["objective"] == "ntp":
        del options["reference"]
    (metrics,) = run(tmp_path / "run", folder, models["base"], **options | settings | {"context": context})
    if settings["objective"] == "rho1":
        # a step ranks its rows in the order of training; only ties depend on it
        groups = [[row] for row in range(len(rows))] if settings["scope"] == "row" else [list(range(len(rows)))]
        want = rho1_step(base, rows, context, "rl_logprobs", groups, 0.6)
    elif settings["objective"] == "kd":
        want = kd_step(base, rows, context, "rl", {"temperature": 1.0} | settings)
    else:
        want = remit_step(base, rows, context, "rl_logprobs" if settings["objective"] == "remit" else None, 0.2)
    assert metrics["loss"] == pytest.approx(float(torch.as_tensor(want["loss"]).detach()), rel=2e-5)
    assert metrics["ntp_loss"] == pytest.approx(want["ntp_loss"], rel=2e-5)
    predicted = sum(
        flag and place not in {start for start, _ in contexts(row, context)}
        for row in rows for place, flag in enumerate(row["predict"])
    )  # fmt: skip
    assert metrics["predicted_tokens"] == predicted
    assert metrics["tokens"] == sum(len(row["input_ids"]) for row in rows)


def test_centring_by_document_is_over_what_is_to_be_predicted(
    tmp_path: Path, shards: dict[str, Path], models: dict[str, Path]
) -> None:
    rows, base = read_rows(shards["packed"]), load(models["base"]).double()
    loss = count = 0.0
    for row in rows:
        losses, start = row_logprobs(base, row, "packed"), 0
        for length in row["doc_lengths"]:
            places = [t for t in range(start, start + length) if losses[t] is not None and row["predict"][t]]
            start += length
            if places:
                own = torch.stack([-losses[t].detach() for t in places])
                delta = own + torch.tensor([row["rl_logprobs"][t] for t in places], dtype=torch.float64)
                weights = (2 * torch.sigmoid(delta - delta.mean())).clip(0.8, 1.2)
                loss, count = loss + (weights * own).sum().item(), count + len(places)
    options = {"global_batch_size": len(rows), "learning_rate": 1e-6, "centring": "document"}
    (metrics,) = run(tmp_path / "run", shards["packed"], models["base"], **options)
    assert metrics["loss"] == pytest.approx(loss / count, rel=2e-5)


def test_held_out_loss_and_rows_that_train_on_nothing(
    tmp_path: Path, shards: dict[str, Path], models: dict[str, Path]
) -> None:
    rows, base = read_rows(shards["packed"]), load(models["base"]).double()
    want = remit_step(base, rows, "packed", None, 0.2)
    train(TrainConfig(
        shards["packed"], models["base"], tmp_path / "run", objective="ntp", max_steps=1, global_batch_size=16,
        micro_batch_size=4, dtype="float32", eval_shards=str(shards["packed"]), learning_rate=1e-9, checkpoint_every=0,
    ))  # fmt: skip
    line = read_lines(tmp_path / "run/evaluation.jsonl")[0]
    assert line["loss"] == pytest.approx(want["ntp_loss"], rel=2e-5)
    assert line["tokens"] == sum(sum(row["predict"][1:]) for row in rows)


def test_selection_scores_what_is_to_be_predicted(tmp_path: Path, shards: dict[str, Path]) -> None:
    base = annotate(
        shards["packed"], tmp_path / "both", lambda row: [None, *[-float(t % 7) for t in row["input_ids"][1:]]], "packed",
        1 / 64, "base",
    )  # fmt: skip
    rows = read_rows(base)
    scores = {}
    for number, row in enumerate(rows):
        places = [t for t in range(1, len(row["predict"])) if row["predict"][t]]
        if places:
            scores[number] = np.mean([row["rl_logprobs"][t] - row["base_logprobs"][t] for t in places])
    keep = sorted(sorted(scores, key=lambda number: (-scores[number], number))[: int(len(scores) / 2 + 0.5)])
    folder = select(SelectConfig(str(base), "rl", "base", str(tmp_path / "kept"), keep_ratio=0.5, num_workers=1))
    assert [row["input_ids"] for row in read_rows(folder.path)] == [rows[number]["input_ids"] for number in keep]
    assert folder.manifest.predict
    assert verify_folder(folder).problems == []
    assert len(scores) < len(rows)


def test_steps_that_predict_nothing_change_nothing(
    tmp_path: Path, shards: dict[str, Path], models: dict[str, Path]
) -> None:
    """With one row a step some steps are such: the run goes on past them, and a resume knows them too."""
    silent = sum(not any(row["predict"][1:]) for row in read_rows(shards["packed"]))
    assert silent
    notes: list[str] = []
    settings = {
        "objective": "ntp", "epochs": 1, "global_batch_size": 1, "dtype": "float32", "learning_rate": 1e-4, "checkpoint_every": 5
    }  # fmt: skip
    done = train(TrainConfig(shards["packed"], models["base"], tmp_path / "run", **settings), note=notes.append)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    steps = len(read_rows(shards["packed"]))
    assert done.finished
    assert sum("none of its rows has a token to predict" in line for line in notes) == silent == steps - len(lines)
    assert lines[-1]["tokens"] <= sum(len(row["input_ids"]) for row in read_rows(shards["packed"]))

    asked = iter([False] * 7 + [True] * steps)
    half = TrainConfig(shards["packed"], models["base"], tmp_path / "again", **settings)
    assert not train(half, should_stop=lambda: next(asked)).finished
    assert train(half).finished
    again = [json.loads(line) for line in (tmp_path / "again/metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["tokens"], line["loss"]) for line in again] == [
        (line["step"], line["tokens"], line["loss"]) for line in lines
    ]
