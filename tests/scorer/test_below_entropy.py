"""Most probable tokens that are kept only where the entropy is low: the threshold, the columns, faults, and who reads them."""

import copy
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import duckdb
import numpy as np
import polars
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from damage import (
    ENTROPY_OF,
    entropy_rows,
    flip,
    read_for_kd,
    read_to_train,
    read_to_verify,
    rows,
    top_rows,
    write_folder,
)
from faulty import Faulty
from oracles import read_rows
from processes import Command, content

from scorer.below_entropy import Sample, sample_rows, threshold_of
from scorer.config import BelowEntropy, ScoreConfig, parse_below
from scorer.engine import Answer
from scorer.reference import Reference
from scorer.score import score
from scorer.scored_rows import ScoredRows
from shards import ShardFolder
from shards.verify import verify_folder

Remit = Callable[..., tuple[int, str, str]]
ALL = ("logprobs", "topk_ids", "topk_logprobs", "entropy_t2")
LIMIT = {"rl": ENTROPY_OF["rl"] | {"top_k": 2, "top_k_below_entropy": 2.5}}


def gated_rows() -> dict[str, list]:
    """Entropies at temperature 2 of 3 and, of each row's last token, 2.5: only there the two best are kept."""
    values = copy.deepcopy(top_rows() | entropy_rows())
    for entropies in values["rl_entropy_t2"]:
        entropies[-1] = 2.5
    for column in ("rl_topk_ids", "rl_topk_logprobs"):
        for row in values[column]:
            row[:-1] = [None] * (len(row) - 1)
    return values


@pytest.mark.parametrize("threshold", [1.1, 1.3, 2.5])
def test_the_writer_keeps_what_the_contract_wants(tmp_path: Path, threshold: float) -> None:
    """At an entropy of exactly float32(threshold), which is more or less than the threshold, with entropies as they come."""
    at = float(np.float32(threshold))
    folder = write_folder(tmp_path, rows())
    batch = folder.open_rows(folder.manifest.parts[0].name).batch(0)
    scored = ScoredRows(batch, "packed", 100, 2, {"rl_entropy": (0.0, 9.0)}, ("rl_entropy", threshold))
    for start, end, _ in scored.spans:
        zeros = np.zeros((end - start - 1, 2))
        values = np.full((end - start - 1, 1), at, np.float32)
        scored.put(start, end, Answer(zeros[:, 0], zeros, zeros, values))
    columns = scored.columns("rl", 0.0)
    kept = columns["rl_topk_ids"].flatten().is_valid().to_pylist()
    assert any(kept) == (at <= threshold)  # as the contract compares them, in float64
    assert sum(kept) in (0, int(scored.present.sum()))


def test_a_sample_without_prompts_says_so() -> None:
    with pytest.raises(ValueError, match="the sample has no row that the reference can score"):
        threshold_of(Sample([], []), [], 0.2, 0.05, 0.0)


# --- the option -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("1.5", BelowEntropy(1.5)),
        ("0", BelowEntropy(0.0)),
        ("quantile:0.2", BelowEntropy(None, 0.2, 0.05)),
        ("quantile:0.25+0.1", BelowEntropy(None, 0.25, 0.1)),
        ("quantile:0.25+0", BelowEntropy(None, 0.25, 0.0)),
        *((text, None) for text in ("", "-1", "nan", "inf", "x", "quantile:", "quantile:0", "quantile:1", "quantile:0.2+0.8",
          "quantile:0.2-0.1", "share:0.2", "quantile:nan")),
    ],
)  # fmt: skip
def test_the_option(text: str, want: BelowEntropy | None) -> None:
    if want is None:
        with pytest.raises(
            ValueError, match=r"--top-k-below-entropy is .*expected nats, for instance 1.5, or quantile:0.2"
        ):
            parse_below(text)
    else:
        assert parse_below(text) == want


def test_it_needs_both_columns() -> None:
    for given, missing in (({"entropy": True}, "--top-k"), ({"top_k": 4}, "--entropy")):
        with pytest.raises(ValueError, match=f"--top-k-below-entropy is 1 without {missing}, expected all three"):
            ScoreConfig("a", "b", "c", top_k_below_entropy="1", **given)


@pytest.mark.parametrize("step", [0.0, 1 / 64, 0.5])
def test_threshold_by_brute_force(step: float) -> None:
    rng = np.random.default_rng(1)
    entropies = [rng.exponential(1, size).astype(np.float32) for size in (5, 200, 80, 1, 33)]
    sample = Sample([np.zeros(len(one) + 1, int) for one in entropies], [0, 0, 1, 2, 3])
    found = threshold_of(sample, entropies, 0.2, 0.05, step)
    values = sorted(round(float(v) / step) * step if step else float(v) for one in entropies for v in one)
    assert len(values) == found["top_k_quantile"]["tokens"] == 319
    threshold = found["top_k_below_entropy"]
    assert threshold == pytest.approx(values[math.ceil(0.25 * 319)])
    share = sum(v <= threshold for v in values) / 319
    assert found["top_k_quantile"] | {"share_error": 0} == {
        "quantile": 0.2, "margin": 0.05, "rows": 4, "tokens": 319, "share": pytest.approx(share, abs=1e-6), "share_error": 0,
    }  # fmt: skip
    assert share >= 0.25
    assert 0 < found["top_k_quantile"]["share_error"] < 0.2
    for value in (np.nan, np.inf):
        entropies[1][7] = value
        with pytest.raises(ValueError, match="1 of the sample's 319 entropies are not finite"):
            threshold_of(sample, entropies, 0.2, 0.05, step)


def test_the_sample_comes_from_all_over(packed: Path) -> None:
    folder = ShardFolder(packed)
    sample = sample_rows(folder, "packed", 10**6)
    assert sum(map(len, sample.prompts)) >= min(1 << 14, folder.manifest.tokens) * 0.8
    everything = [row["input_ids"] for row in read_rows(packed) if len(row["input_ids"]) > 1]
    assert sample.prompts[0].tolist() == everything[0]
    assert sample.prompts[-1].tolist() == everything[-1]


# --- on disk --------------------------------------------------------------------------------------------


def test_rows_and_what_is_null(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", gated_rows(), references=LIMIT)
    read_to_verify(folder.path, tmp_path)
    read_to_train(folder.path, tmp_path, ALL)
    base = ["input_ids", "doc_lengths", "doc_ids", "source", "rl_logprobs"]
    read = next(folder.batches(["rl_topk_ids"]))  # what says where they are comes with them
    assert read.batch.schema.names == [*base, "rl_topk_ids", "rl_topk_logprobs", "rl_entropy_t2"]
    assert (read.topk("rl")[0][:, 0] >= 0).tolist() == [False, False, False, True] * 2
    with pytest.raises(
        ValueError, match=r"only where rl_entropy_t2 is at most 2\.5, which is enough for --objective switch"
    ):
        read_for_kd(folder.path, tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda v: v["rl_topk_ids"][1].__setitem__(1, [1, 2]),
            "rl_topk_ids is not null, expected null exactly where nothing",
        ),
        (
            lambda v: v["rl_topk_logprobs"][1].__setitem__(3, None),
            r"precedes, above an entropy of 2\.5, and in quarantined",
        ),
        (lambda v: v["rl_entropy_t2"][1].__setitem__(3, 2.75), "rl_topk_ids is not null"),
        (lambda v: v["rl_entropy_t2"][1].__setitem__(2, 2.25), "rl_topk_ids is null"),
    ],
)
def test_damage_is_named(tmp_path: Path, change: Callable, message: str) -> None:
    values = gated_rows()
    change(values)
    folder = write_folder(tmp_path / "a", values, references=LIMIT).path
    for read in (read_to_verify, lambda folder, model: read_to_train(folder, model, ALL)):
        with pytest.raises(ValueError, match=message):
            read(folder, tmp_path)


@pytest.mark.parametrize("change", [{"top_k": 0}, {"top_k_below_entropy": -1}, {"top_k_below_entropy": "2"}])
def test_manifest_is_checked(tmp_path: Path, change: dict) -> None:
    plan = write_folder(tmp_path / "a", gated_rows(), references=LIMIT).manifest
    (tmp_path / "b").mkdir()
    replace(plan, references={"rl": LIMIT["rl"] | change}).write(tmp_path / "b")
    with pytest.raises(ValueError, match="reference rl: top_k_below_entropy is"):
        ShardFolder(tmp_path / "b")


@pytest.mark.usefixtures("starts_processes")
def test_other_libraries_read_the_nulls(tmp_path: Path) -> None:
    write_folder(tmp_path / "a", gated_rows(), references=LIMIT)
    part = tmp_path / "a/part-00000.arrow"
    read_table = pa.ipc.open_file(part).read_all()
    assert pc.list_flatten(read_table["rl_topk_ids"]).null_count == 6
    want = read_table["rl_topk_logprobs"].to_pylist()
    assert want[0] == [None, None, None, [0.0, -2.0]]
    frame = polars.read_ipc(part)
    assert frame["rl_topk_logprobs"].to_list() == want
    assert frame.explode("rl_topk_ids")["rl_topk_ids"].null_count() == 6
    kept = duckdb.sql("select sum(list_aggregate(rl_topk_ids, 'count')) from read_table").fetchall()
    assert kept == [(2,)]
    code = (
        f"import datasets; d = datasets.load_dataset('arrow', data_files={str(part)!r}, split='train'); "
        "import json; print(json.dumps(d['rl_topk_logprobs'][:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"HF_HOME": str(tmp_path)}
    )
    assert json.loads(done.stdout.splitlines()[-1]) == want, done.stderr


# --- through the command --------------------------------------------------------------------------------


def test_killed_and_damaged_runs_end_alike(faulty: Faulty, tmp_path: Path, remit: Remit) -> None:
    """With the fake engine: the estimate is frozen, a killed run goes on with it, another one is refused."""
    options = ("--top-k", 3, "--entropy", "--top-k-below-entropy")
    sound, killed = tmp_path / "sound", tmp_path / "killed"
    run = Command(tmp_path, *faulty.command("score", sound, *options, "quantile:0.3"))
    assert run.finish() == 0, run.errors
    assert "is estimated on" in run.errors
    assert verify_folder(ShardFolder(sound)).problems == []
    entry = json.loads((sound / "_manifest.json").read_text())["references"]["rl"]
    threshold, record = entry["top_k_below_entropy"], entry["top_k_quantile"]
    assert (record["quantile"], record["margin"]) == (0.3, 0.05)
    assert 0.35 <= record["share"] < 0.45
    rows = read_rows(sound)
    places = [(e, i) for row in rows for e, i in zip(row["rl_entropy"], row["rl_topk_ids"]) if e is not None]
    assert all((entropy <= threshold) == (ids is not None) for entropy, ids in places)
    assert sum(ids is not None for _, ids in places) / len(places) == pytest.approx(record["share"], abs=0.05)

    first = Command(
        tmp_path, *faulty.command("score", killed, *options, "quantile:0.3"), REMIT_CRASH_AT="driver.committed"
    )
    assert first.finish() == -signal.SIGKILL, first.errors
    for value, message in (
        ("quantile:0.2", "--top-k-below-entropy is 0.3 there, 0.2 asked for now"),
        ("quantile:0.3+0.1", "--top-k-below-entropy is 0.05 there, 0.1 asked for now"),
        ("9", "--top-k-below-entropy is"),
    ):
        code, _, error = remit(*faulty.command("score", killed, *options, value))
        assert (code, message in " ".join(error.split())) == (1, True), error
    again = Command(tmp_path, *faulty.command("score", killed, *options, "quantile:0.3"))
    assert again.finish() == 0, again.errors
    assert "is estimated on" not in again.errors
    assert content(killed) == content(sound)

    flip(killed / "part-00001.arrow")
    assert "differs from its commit record" in verify_folder(ShardFolder(killed)).problems[0]
    code, output, _ = remit("verify", "--shards", killed, "--repair")
    assert (code, "part-00001.arrow" in output) == (1, True)
    last = Command(tmp_path, *faulty.command("score", killed, *options, "quantile:0.3"))
    assert last.finish() == 0, last.errors
    assert (killed / "part-00001.arrow").read_bytes() == (sound / "part-00001.arrow").read_bytes()


@pytest.mark.slow  # the machinery is tested with the fake engine
@pytest.mark.usefixtures("ray_session")
def test_with_a_real_engine_that_passes_the_canary(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    """The quantile of the threshold is what the stored entropies of the whole folder say, whose sample was scored before."""
    notes: list[str] = []
    config = ScoreConfig(
        str(packed), str(reference_model), str(tmp_path / "out"), num_engines=1, dtype="float32", top_k=3, entropy=True,
        entropy_temperature=2.0, top_k_below_entropy="quantile:0.3", logprob_step=0.0,  # rounded, most would be equal
    )  # fmt: skip
    folder = score(config, Reference(reference_model, "m"), note=notes.append)
    assert any(line.startswith("for the estimate: engine 1 on ") and " is ready" in line for line in notes), notes
    assert verify_folder(folder).problems == []
    threshold = folder.manifest.references["rl"]["top_k_below_entropy"]
    entropies = [value for row in read_rows(folder.path) for value in row["rl_entropy_t2"] if value is not None]
    assert np.mean(np.array(entropies) <= threshold) == pytest.approx(0.35, abs=0.03)
