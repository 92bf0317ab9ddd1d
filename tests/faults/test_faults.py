"""Engines that die, hang or answer nonsense: nothing is lost, nothing is made up, the same command finishes."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from conftest import VOCABULARY, write_corpus
from faulty import SEQ_LEN, Faulty
from oracles import read_rows
from processes import Command, committed, content, log_lines, part_rows, token_of_one_row

from scorer.config import PackConfig
from scorer.pack import pack
from shards import ShardFolder, row_schema, write_part
from shards.verify import verify_folder
from trainer.batch import Row
from trainer.data import RowReader

pytestmark = pytest.mark.usefixtures("ray_session", "starts_processes")

Remit = Callable[..., tuple[int, str, str]]


def fault(**settings: object) -> dict[str, str]:
    return {"REMIT_FAKE_ENGINE": json.dumps(settings)}


def summary(run: Command, name: str) -> int:
    """A number of the final table."""
    line = next(line for line in run.errors.splitlines() if line.strip().startswith(name))
    return int(line.split()[-1].replace(",", ""))


def in_words(run: Command, part: int, attempt: int) -> list[str]:
    return [line for line in run.errors.splitlines() if f"part-{part:05d}.arrow: attempt {attempt} failed" in line]


# --- engines that die or hang ---------------------------------------------------------------------------


# long enough that a busy machine does not make a sound engine look like one that hangs
PATIENCE: dict[str, tuple] = {"die": (), "raise": (), "hang": ("--progress-timeout-seconds", 6)}
SLOW_RAISE = pytest.param("raise", marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["die", SLOW_RAISE, "hang"])
def test_engine_that_fails_once(faulty: Faulty, tmp_path: Path, kind: str) -> None:
    token, part, _ = token_of_one_row(faulty.packed, range(2, faulty.num_parts))
    out = tmp_path / "out"
    settings = fault(**{kind: [token], "once": str(tmp_path / "marker")})
    run = Command(tmp_path, *faulty.command("score", out, *PATIENCE[kind], engines=2), **settings)
    assert run.finish() == 0, run.errors
    assert (tmp_path / "marker").exists()
    assert content(out) == faulty.undisturbed("score")
    assert len(in_words(run, part, 1)) == 1
    if kind == "hang":
        assert "no progress for 6 s" in in_words(run, part, 1)[0]
    assert not in_words(run, part, 2)
    assert summary(run, "engines that died") == 1
    last = log_lines(out)[-1]
    assert (last["event"], last["engine_restarts"], last["parts_failed"]) == ("done", 1, 0)
    assert last["retries"] == summary(run, "parts tried again") >= 1


@pytest.mark.parametrize("kind", ["die", SLOW_RAISE, pytest.param("hang", marks=pytest.mark.slow)])
def test_part_that_always_fails(faulty: Faulty, tmp_path: Path, remit: Remit, kind: str) -> None:
    """One engine, which reads the next part already when the bad one takes it along."""
    token, part, _ = token_of_one_row(faulty.packed, range(2, faulty.num_parts - 2))
    name, out = f"part-{part:05d}.arrow", tmp_path / "out"
    arguments = faulty.command("score", out, *PATIENCE[kind])
    run = Command(tmp_path, *arguments, **fault(**{kind: [token], "seconds": 0.1}))
    assert run.finish() == 1, run.errors

    assert committed(out) == [f"part-{index:05d}.json" for index in range(faulty.num_parts) if index != part]
    assert not (out / name).exists()
    assert list(out.rglob("*.tmp")) == []
    assert not (out / "_lease").exists()
    want = faulty.undisturbed("score")
    assert all((out / "_commits" / file).read_bytes() == want[f"_commits/{file}"] for file in committed(out))
    assert [path.name for path in (out / "_quarantine" / "failed").iterdir()] == [f"part-{part:05d}.json"]
    failure = json.loads((out / "_quarantine" / "failed" / f"part-{part:05d}.json").read_text())
    reason = {"die": "died", "raise": "the fake engine was told to fail", "hang": "no progress for 6 s"}[kind]
    assert (failure["part"], failure["attempts"]) == (name, 3)
    assert reason in failure["reason"]

    shared = [index for index in range(faulty.num_parts) if index != part and in_words(run, index, 1)]
    assert len(shared) == 1  # a part was with the bad one in the engine, once; then the bad one was alone
    assert not in_words(run, shared[0], 2)
    lines = run.errors.strip().splitlines()
    told = [line["line"] for line in log_lines(out) if line["event"] == "part_failed"]
    assert len(told) == 1  # and not in each line of progress
    assert told[0].startswith(f"{name}: given up after 3 attempts: ")
    assert sum(line.endswith(told[0]) for line in lines) == 1
    words = " ".join(["remit", *map(shlex.quote, map(str, arguments))])
    assert sum(line.endswith(f"to try these parts again: {words}") for line in lines) == 1
    assert lines[-1].startswith(f"remit score: error: 1 of {faulty.num_parts} parts failed, the others are committed")
    assert name in lines[-1]
    last = log_lines(out)[-1]
    assert (last["event"], last["parts"], last["parts_failed"]) == ("failed", faulty.num_parts - 1, 1)
    assert (last["engine_restarts"], last["retries"]) == (3, 3)
    assert "failed" not in last
    assert last["tokens"] == sum(len(row["input_ids"]) for row in read_rows(out))

    code, output, error = remit("verify", "--shards", out)
    assert (code, output.splitlines()[-1]) == (1, "FAILED")
    assert f"failed 3 times: {failure['reason']}" in error

    again = Command(tmp_path, *arguments)
    assert again.finish() == 0, again.errors
    assert content(out) == want


def test_damaged_input_part_is_not_tried_again(faulty: Faulty, tmp_path: Path) -> None:
    shards, out = tmp_path / "packed", tmp_path / "out"
    shutil.copytree(faulty.packed, shards)
    data = bytearray((shards / "part-00001.arrow").read_bytes())
    data[len(data) // 2] ^= 1
    (shards / "part-00001.arrow").write_bytes(data)
    arguments = [shards if word == faulty.packed else word for word in faulty.command("score", out)]
    run = Command(tmp_path, *arguments)
    assert run.finish() == 1
    failure = json.loads((out / "_quarantine" / "failed" / "part-00001.json").read_text())
    assert failure["attempts"] == 1
    assert "sha256" in failure["reason"]
    assert len(committed(out)) == faulty.num_parts - 1
    shutil.copy(faulty.packed / "part-00001.arrow", shards)
    again = Command(tmp_path, *arguments)
    assert again.finish() == 0, again.errors
    assert content(out) == faulty.undisturbed("score")


def test_an_engine_that_answers_only_nonsense_does_not_empty_the_folder(faulty: Faulty, tmp_path: Path) -> None:
    """All rows of a part are bad: that is the engine's fault, or the model's, and not the rows'."""
    shards, out = tmp_path / "packed", tmp_path / "out"
    corpus = [write_corpus(tmp_path / f"{letter}.jsonl", [" ".join(letter * 95)]) for letter in "qz"]
    files = [str(path) for path in corpus]
    pack(PackConfig(files, str(faulty.tokenizer), str(shards), seq_len=48, tokens_per_shard=48 * 4))
    rows = [part_rows(shards, part) for part in range(2)]
    assert [len(part) for part in rows] == [4, 4]
    first, second = ({token for row in part for token in row["input_ids"]} for part in rows)
    tokens = second - first
    assert all(tokens & set(row["input_ids"]) for row in rows[1])
    words: list[object] = [shards if word == faulty.packed else word for word in faulty.command("score", out)]
    run = Command(tmp_path, *words, **fault(nan=sorted(tokens)))
    assert run.finish() == 1, run.errors
    assert committed(out) == ["part-00000.json"]
    failure = json.loads((out / "_quarantine" / "failed" / "part-00001.json").read_text())
    assert failure["attempts"] == 3
    assert "all 4 rows of the part came out bad" in failure["reason"]
    assert not (out / "_quarantine" / "rows").exists()


# --- rows that come out wrong ---------------------------------------------------------------------------

REASONS = {"nan": "not finite", "inf": "not finite", "positive": "positive", "zeros": "exactly 0 before rounding"}
KINDS = ["nan", "zeros", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("inf", "positive"))]


def side_file(out: Path, part: int) -> list[dict]:
    value = json.loads((out / "_quarantine" / "rows" / f"part-{part:05d}.json").read_text())
    assert value["part"] == f"part-{part:05d}.arrow"
    return value["rows"]


@pytest.mark.parametrize("kind", KINDS)
def test_bad_row_once_comes_out_right(faulty: Faulty, tmp_path: Path, kind: str) -> None:
    token, _, _ = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    settings = fault(**{kind: [token], "once": str(tmp_path / "marker")})
    run = Command(tmp_path, *faulty.command("score", tmp_path / "out"), **settings)
    assert run.finish() == 0, run.errors
    assert (tmp_path / "marker").exists()
    assert content(tmp_path / "out") == faulty.undisturbed("score")
    assert summary(run, "rows without log-probs") == 0
    assert summary(run, "parts tried again") == 0


def test_many_bad_rows_end_the_run_until_they_are_allowed(faulty: Faulty, tmp_path: Path) -> None:
    """As where float16 overflows: the command says so and why; with a larger share it goes on where it was."""
    shards, out = tmp_path / "packed", tmp_path / "out"
    pack(PackConfig([str(faulty.corpus)], str(faulty.tokenizer), str(shards), seq_len=12, tokens_per_shard=12 * 40))
    rows = [row["input_ids"] for row in read_rows(shards)]
    assert len(rows) > 600
    shares = {token: np.mean([token in row for row in rows]) for token in range(VOCABULARY)}
    token = min(shares, key=lambda token: abs(shares[token] - 0.3))
    assert 0.15 < shares[token] < 0.5
    words: list[object] = [shards if word == faulty.packed else word for word in faulty.command("score", out)]
    run = Command(tmp_path, *words, **fault(nan=[token]))
    assert run.finish() == 1, run.errors
    assert re.search(
        r"\d+ of [34]\d\d rows came out without log-probs \(\d+\.\d%\), mostly: scored twice, .* not finite",
        run.last_error,
    )
    assert "expected at most 0.05 of them (--max-bad-rows); " in run.last_error
    assert "training skips them" in run.errors  # a line, long before
    done = set(committed(out))
    assert 300 / 40 <= len(done) < len(rows) / 40
    assert log_lines(out)[-1]["event"] == "failed"
    again = Command(tmp_path, *words, "--max-bad-rows", 0.6, **fault(nan=[token]))
    assert again.finish() == 0, again.errors
    assert done < set(committed(out))
    bad = [index for index, row in enumerate(read_rows(out)) if row["rl_logprobs"] == [None] * len(row["input_ids"])]
    assert {index for index in bad if len(rows[index]) > 1} == {
        index for index, row in enumerate(rows) if token in row and len(row) > 1
    }


@pytest.mark.parametrize("kind", KINDS)
def test_bad_row_twice_is_set_aside(faulty: Faulty, tmp_path: Path, remit: Remit, kind: str) -> None:
    token, part, place = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    out = tmp_path / "out"
    run = Command(tmp_path, *faulty.command("score", out), **fault(**{kind: [token]}))
    assert run.finish() == 0, run.errors
    assert summary(run, "rows without log-probs") == 1
    assert log_lines(out)[-1]["rows_quarantined"] == 1

    found, want = content(out), faulty.undisturbed("score")
    own = {f"part-{part:05d}.arrow", f"_commits/part-{part:05d}.json"}
    side = f"_quarantine/rows/part-{part:05d}.json"
    assert set(found) == {*want, side}
    assert {name: data for name, data in found.items() if name not in {*own, side}} == {
        name: data for name, data in want.items() if name not in own
    }
    assert json.loads(found[f"_commits/part-{part:05d}.json"])["quarantined"] == {"rl": [place]}
    packed, good, rows = (part_rows(folder, part) for folder in (faulty.packed, faulty.scored, out))
    assert rows[place] == packed[place] | {"rl_logprobs": [None] * len(packed[place]["input_ids"])}
    assert [row for index, row in enumerate(rows) if index != place] == [
        row for index, row in enumerate(good) if index != place
    ]
    (entry,) = side_file(out, part)
    assert (entry["reference"], entry["row"], entry["input_ids"]) == ("rl", place, packed[place]["input_ids"])
    assert REASONS[kind] in entry["reason"]
    assert "scored twice" in entry["reason"]

    report = verify_folder(ShardFolder(out))
    assert (report.problems, report.quarantined) == ([], {"rl": 1})
    sound = verify_folder(ShardFolder(faulty.scored))
    assert report.logprobs["rl"] == sound.logprobs["rl"] - (len(packed[place]["input_ids"]) - 1)
    code, output, _ = remit("verify", "--shards", out)
    assert (code, output.splitlines()[-1]) == (0, "OK")
    assert re.search(r"^rl .* 1$", output, re.MULTILINE), output  # its last column: rows quarantined


def test_second_reference_keeps_what_the_first_set_aside(faulty: Faulty, tmp_path: Path) -> None:
    first, part, place = token_of_one_row(faulty.packed, range(1, 4))
    second, other, other_place = token_of_one_row(faulty.packed, range(part + 1, faulty.num_parts))
    rl, both, twice = tmp_path / "rl", tmp_path / "both", tmp_path / "twice"
    assert Command(tmp_path, *faulty.command("score", rl), **fault(nan=[first])).finish() == 0

    def on_top(out: Path, **settings: str) -> Command:
        words: list[object] = [rl if word == faulty.packed else word for word in faulty.command("score", out)]
        run = Command(tmp_path, *words, "--name", "sft", "--context", "document", **settings)
        assert run.finish() == 0, run.errors
        return run

    on_top(both, **fault(inf=[second]))
    records = {index: json.loads((both / "_commits" / f"part-{index:05d}.json").read_text()) for index in (part, other)}
    assert records[part]["quarantined"] == {"rl": [place]}
    assert records[other]["quarantined"] == {"sft": [other_place]}
    assert [(entry["reference"], entry["row"]) for entry in side_file(both, part)] == [("rl", place)]
    assert side_file(both, part) == side_file(rl, part)
    assert [(entry["reference"], entry["row"]) for entry in side_file(both, other)] == [("sft", other_place)]
    report = verify_folder(ShardFolder(both))
    assert (report.problems, report.quarantined) == ([], {"rl": 1, "sft": 1})
    rows, before = part_rows(both, part), part_rows(rl, part)
    assert [row["rl_logprobs"] for row in rows] == [row["rl_logprobs"] for row in before]
    assert any(value is not None for value in rows[place]["sft_logprobs"])  # one column's fault is not the other's
    assert all(value is None for value in part_rows(both, other)[other_place]["sft_logprobs"])
    assert any(value is not None for value in part_rows(both, other)[other_place]["rl_logprobs"])

    # the same row for both references: one entry each
    run = on_top(twice, **fault(positive=[first]))
    assert json.loads((twice / "_commits" / f"part-{part:05d}.json").read_text())["quarantined"] == {
        "rl": [place], "sft": [place],
    }  # fmt: skip
    assert [entry["reference"] for entry in side_file(twice, part)] == ["rl", "sft"]
    assert verify_folder(ShardFolder(twice)).quarantined == {"rl": 1, "sft": 1}
    assert summary(run, "rows without log-probs") == 1


@pytest.mark.parametrize("bad_id", [VOCABULARY + 79, -1, 2**31 - 1])
def test_id_outside_the_embedding(faulty: Faulty, tmp_path: Path, bad_id: int) -> None:
    """A part that pack did not write: the engine must not see such an id, nor the row get a number."""
    shards, out, name, place = tmp_path / "packed", tmp_path / "out", "part-00002.arrow", 7
    shutil.copytree(faulty.packed, shards)
    (shards / name).unlink()
    (shards / "_commits" / "part-00002.json").unlink()
    rows = part_rows(faulty.packed, 2)
    rows[place]["input_ids"][11] = bad_id
    batch = pa.RecordBatch.from_pylist(rows, schema=row_schema())
    write_part(shards, name, row_schema(), ShardFolder(shards).part_metadata(name), [batch])
    words: list[object] = [shards if word == faulty.packed else word for word in faulty.command("score", out)]
    run = Command(tmp_path, *words)
    assert run.finish() == 0, run.errors
    assert summary(run, "rows without log-probs") == 1
    assert json.loads((out / "_commits" / "part-00002.json").read_text())["quarantined"] == {"rl": [place]}
    (entry,) = side_file(out, 2)
    assert entry["reason"] == f"token id {bad_id} is not in the reference's embedding, 0..{VOCABULARY - 1}"
    assert entry["input_ids"] == rows[place]["input_ids"]
    scored = part_rows(out, 2)
    assert scored[place]["rl_logprobs"] == [None] * len(rows[place]["input_ids"])
    good = part_rows(faulty.scored, 2)
    assert [row for i, row in enumerate(scored) if i != place] == [row for i, row in enumerate(good) if i != place]


def test_trainer_leaves_out_the_quarantined_row_alone(faulty: Faulty, tmp_path: Path) -> None:
    token, part, place = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    out = tmp_path / "out"
    assert Command(tmp_path, *faulty.command("score", out), **fault(nan=[token])).finish() == 0

    def rows(folder: Path) -> list[Row]:
        reader = RowReader(ShardFolder(folder), "packed", "rl", VOCABULARY)
        places = [(block, row) for block, count in enumerate(reader.block_rows) for row in range(count)]
        return reader.rows(np.array(places))

    found, want = rows(out), rows(faulty.scored)
    assert len(found) == len(want) > 100
    bad = part * (len(part_rows(out, 0))) + place
    for index, (row, sound) in enumerate(zip(found, want)):
        assert row.input_ids.tolist() == sound.input_ids.tolist()
        if index == bad:
            assert not row.predicted.any()
            assert not row.columns["logprobs"].any()
            assert sound.predicted.sum() == len(row.input_ids) - 1
        else:
            assert row.predicted.tolist() == sound.predicted.tolist()
            assert row.columns["logprobs"].tolist() == sound.columns["logprobs"].tolist()
    assert len(found[bad].input_ids) <= SEQ_LEN
