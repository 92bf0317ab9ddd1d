"""Rows that a reference could not score: which of them train with which objective, and that it is said."""

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import damage
import pyarrow as pa
import pytest
from annotated import run
from oracles import load, read_rows, remit_step

from pipelines.report.compare import differs_in
from shards import ShardFolder, write_part
from shards.manifest import Manifest
from shards.quarantine import write_quarantined_rows
from shards.store import open_store
from trainer.data import RowReader
from trainer.dataset import RowDataset

Remit = Callable[..., tuple[int, str, str]]
UNSCORED = {"rl": [3, 40], "sft": [7, 40, 41]}


def annotate_badly(shards: Path, out: Path, unscored: dict[str, list[int]] = UNSCORED) -> Path:
    """The folder with rl_logprobs again, once more as sft; both null in these rows, counted over all parts."""
    old, rows = Manifest.read(shards), read_rows(shards)
    for row in rows:
        row["sft_logprobs"] = list(row["rl_logprobs"])
    for name, places in unscored.items():
        for place in places:
            rows[place][f"{name}_logprobs"] = [None] * len(rows[place]["input_ids"])
    plan = replace(old, references=dict.fromkeys(unscored, old.references["rl"]))
    shutil.copytree(shards / "_tokenizer", out / "_tokenizer")
    plan.write(out)
    for index, part in enumerate(plan.parts):
        first, table = index * plan.rows_per_part, pa.Table.from_pylist(rows[: part.rows], plan.schema)
        rows = rows[part.rows :]
        here = {
            name: [place - first for place in places if 0 <= place - first < part.rows]
            for name, places in unscored.items()
        }
        batches = table.combine_chunks().to_batches(max_chunksize=plan.rows_per_batch)
        record = {name: places for name, places in here.items() if places}
        aside = [
            {"reference": name, "row": row, "reason": "test", "input_ids": []}
            for name in record
            for row in record[name]
        ]
        write_quarantined_rows(open_store(out), part.name, aside)
        write_part(out, part.name, plan.schema, plan.part_metadata(index), batches, record)
    return out


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path]) -> Path:
    return annotate_badly(annotated["packed"], tmp_path_factory.mktemp("unscored") / "shards")


def one_step(out: Path, shards: Path, base: Path, objective: str, **settings: object) -> tuple[dict, dict]:
    """Metrics of a step over all rows, and run.json."""
    num_rows = ShardFolder(shards).manifest.rows
    options = {"max_steps": 1, "global_batch_size": num_rows, "micro_batch_size": 16, "learning_rate": 1e-6}
    (metrics,) = run(out, shards, base, objective=objective, **options | settings)
    return metrics, json.loads((out / "run.json").read_text())


def test_ntp_and_remit_train_on_the_same_rows(tmp_path: Path, shards: Path, models: dict[str, Path]) -> None:
    kept = [row for place, row in enumerate(read_rows(shards)) if place not in {3, 7, 40, 41}]
    want = remit_step(load(models["base"]).double(), kept, "packed", "rl_logprobs", 0.2)
    runs = {name: one_step(tmp_path / name, shards, models["base"], name) for name in ("ntp", "remit")}
    runs["sft"] = one_step(tmp_path / "sft", shards, models["base"], "remit", reference="sft")
    for metrics, settings in runs.values():
        assert metrics["ntp_loss"] == pytest.approx(want["ntp_loss"], rel=1e-5)
        assert settings["leave_out"] == "any"
        assert settings["rows_left_out"]["rows"] == 4
        assert settings["rows_left_out"]["by_reference"] == {"rl": 2, "sft": 3}
    assert runs["remit"][0]["loss"] == pytest.approx(float(want["loss"].detach()), rel=1e-5)
    for other in ("remit", "sft"):
        assert differs_in(runs["ntp"][1], runs[other][1]) is None


def test_reference_alone(tmp_path: Path, shards: Path, models: dict[str, Path]) -> None:
    model, rows = load(models["base"]).double(), read_rows(shards)
    both = []
    for objective, gone in (("ntp", set()), ("remit", {3, 40})):
        kept = [row for place, row in enumerate(rows) if place not in gone]
        want = remit_step(model, kept, "packed", "rl_logprobs" if gone else None, 0.2)
        metrics, settings = one_step(tmp_path / objective, shards, models["base"], objective, leave_out="reference")
        assert metrics["ntp_loss"] == pytest.approx(want["ntp_loss"], rel=1e-5)
        assert (settings["rows_left_out"]["rows"], "leave_out" in settings) == (len(gone), False)
        both.append(settings)
    assert differs_in(*both) == "rows_left_out"


def test_the_number_is_printed_and_other_runs_are_refused(
    tmp_path: Path, shards: Path, annotated: dict[str, Path], models: dict[str, Path], remit: Remit
) -> None:
    options = ["--model", models["base"], "--objective", "ntp", "--max-steps", 2, "--global-batch-size", 8]
    bad, good = (["train", *options, "--shards", folder, "--out", tmp_path / name]
                 for name, folder in (("bad", shards), ("good", annotated["packed"])))  # fmt: skip
    code, _, error = remit(*bad)
    assert (code, "4 rows train on nothing, since they could not be scored (rl 2, sft 3)" in error) == (0, True), error
    code, _, error = remit(*good)
    assert (code, "train on nothing" in error) == (0, False), error
    assert remit(*bad)[1].startswith("nothing to do")
    code, _, error = remit(*bad, "--leave-out", "reference")
    assert (code, "--leave-out is 'any' there, not set now" in error) == (1, True), error
    for out, arguments in (("bad", bad), ("good", good)):  # as written when rows trained in another order
        old = json.loads((tmp_path / out / "run.json").read_text())
        assert ("leave_out" in old) == (out == "bad")
        (tmp_path / out / "run.json").write_text(json.dumps({key: old[key] for key in old if key != "order"}))
        code, _, error = remit(*arguments)
        assert (code, "begun by an earlier release, whose rows train in another order (order is not set" in error) == (
            1,
            True,
        )


def predicted(shards: Path) -> list[int]:
    """Tokens that each row of a small folder trains, as the trainer's reader has them."""
    reader = RowReader(ShardFolder(shards), "packed", None, 200, left_out=("rl", "sft"))
    return [int(row.predicted.sum()) for block in range(len(reader.block_rows)) for row in reader.read_block(block)]


@pytest.mark.parametrize("version", [1, 2])
def test_a_folder_that_was_copied_without_its_side_files(tmp_path: Path, version: int) -> None:
    """Then nobody could say how many rows are left out; parts that have none are read."""
    whole = damage.write_folder(tmp_path / "whole", damage.rows(), format_version=version).path
    bad = annotate_badly(whole, tmp_path / "bad", {"rl": [2], "sft": [3]})
    assert predicted(bad) == [3, 3, 0, 0]
    shutil.rmtree(bad / "_quarantine")
    reader = RowReader(ShardFolder(bad), "packed", None, 200, left_out=("rl",))
    assert [int(row.predicted.sum()) for row in reader.read_block(0)] == [3, 3]
    with pytest.raises(
        ValueError, match=r"rows/part-00001.json: missing, and the commit record .*; copy the folder again"
    ):
        reader.read_block(1)


def test_a_flipped_bit_does_not_change_which_rows_train(tmp_path: Path) -> None:
    """Each bit of the list in a record of format 1, which has no checksum of its own, and some of the other ones."""
    whole = damage.write_folder(tmp_path / "whole", damage.rows(), format_version=1).path
    bad = annotate_badly(whole, tmp_path / "bad", {"rl": [2], "sft": [3]})
    record = bad / "_commits" / "part-00001.json"
    sound = record.read_bytes()
    first, last = (8 * sound.index(name) for name in (b'"quarantined"', b'"rows"'))
    for bit in sorted({*range(first, last, 3), *range(0, 8 * len(sound), 23)}):
        flipped = bytearray(sound)
        flipped[bit // 8] ^= 1 << bit % 8
        record.write_bytes(flipped)
        with pytest.raises(ValueError, match="part-00001"):
            predicted(bad)
    record.write_bytes(sound)
    aside = json.loads((bad / "_quarantine" / "rows" / "part-00001.json").read_text())
    aside["rows"][0]["row"] = 1
    (bad / "_quarantine" / "rows" / "part-00001.json").write_text(json.dumps(aside))
    with pytest.raises(
        ValueError, match=r"its rows are not those that the commit record lists; run remit verify --repair"
    ):
        predicted(bad)


def test_rows_for_other_loops(shards: Path) -> None:
    """Without a reference and with one, the same tokens count."""
    loops = [list(RowDataset(shards, reference, epochs=1)) for reference in (None, "rl", "sft")]
    for rows in loops:
        silent = [row.where.rsplit("/", 1)[1] for row in rows if len(row.input_ids) > 1 and not row.predicted.any()]
        assert len(silent) == 4
        assert math.isclose(sum(row.predicted.sum() for row in rows), sum(row.predicted.sum() for row in loops[0]))
