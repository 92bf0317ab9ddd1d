"""The entropy of every prediction: real vLLM against float64, and the machinery around it with the fake engine.

Short rows, chunked prompts, both contexts and other temperatures are in test_topk.py, whose engines give both.
"""

import json
import math
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import VOCABULARY, score_to
from damage import ENTROPY_OF, entropy_rows, flip, write_folder
from entropies import compare_entropies
from faulty import Faulty
from oracles import read_rows
from processes import Command, content, log_lines, part_rows, token_of_one_row
from test_faults import fault, side_file

from scorer.canary import CanaryFailed, Distance, Limits, compare
from scorer.config import ScoreConfig
from scorer.engine import Answer
from scorer.fake import hashed_entropies, hashed_logprobs
from shards import ShardFolder, write_part
from shards.verify import verify_folder

Remit = Callable[..., tuple[int, str, str]]
COLUMNS = ("rl_entropy", "rl_entropy_t2", "rl_log_partition_t2")
OPTIONS = ("--entropy", "--entropy-temperature", 2)


def test_full_rows_equal_transformers(exact: Path, reference_model: Path) -> None:
    assert compare_entropies(exact, reference_model, "packed", 0.0, 2.0, every=4) > 2_000
    assert verify_folder(ShardFolder(exact)).problems == []
    entry = json.loads((exact / "_manifest.json").read_text())["references"]["rl"]
    assert (entry["entropy"], entry["entropy_temperature"], entry["vocab_size"]) == (True, 2.0, VOCABULARY)
    schema = pa.ipc.open_file(exact / "part-00000.arrow").schema
    assert [schema.field(column).type for column in COLUMNS] == [pa.list_(pa.float32())] * 3


@pytest.mark.usefixtures("engine")
def test_bfloat16_engine_passes_the_canary(tmp_path: Path, small: Path, models: dict[str, Path]) -> None:
    """Rounded, in document context, the entropy at temperature 1 alone; within what bfloat16 costs a forward."""
    out = score_to(
        tmp_path / "out", small, models["reference"], dtype="bfloat16", context="document", canary=True, entropy=True
    ).path
    assert verify_folder(ShardFolder(out)).problems == []
    (started,) = (line for line in log_lines(out) if line["event"] == "engine")
    assert 0 < started["canary"]["entropy_mean"] < 0.1
    assert started["logprob_kernel"] == "V1"
    again = score_to(tmp_path / "again", small, models["reference"], dtype="bfloat16", context="document", entropy=True)
    assert content(again.path) == content(out)
    table = pa.ipc.open_file(out / "part-00000.arrow").read_all()
    assert [name for name in table.column_names if "entropy" in name or "partition" in name] == ["rl_entropy"]


def test_entropies_of_another_model_fail_the_canary() -> None:
    one = np.zeros(20, np.float32)
    want = Answer(one, entropies=np.full((20, 3), 2.0, np.float32))
    limits = Limits("bfloat16", Distance(20, 0.01, 0.01, 0.01, 0.0, entropy_mean=0.05))

    def off(size: float) -> Answer:
        return Answer(one, entropies=want.entropies + np.float32(size))

    assert compare([off(0.1)], [want], limits)["entropy_mean"] == pytest.approx(0.1, rel=1e-3)
    for wrong in (off(0.11), off(np.nan)):
        with pytest.raises(CanaryFailed, match=r"entropies are not the model's.*at most 0\.102 in bfloat16"):
            compare([wrong], [want], limits)
    # a place for which float32 has none either says nothing
    want.entropies[3], lost = np.nan, off(0.0)
    assert compare([lost], [want], limits)["entropy_mean"] == 0


def test_shifted_entropies_do_not_pass_a_rescoring(
    tmp_path: Path, exact: Path, reference_model: Path, remit: Remit
) -> None:
    """Each value in the place of the one before it: nothing in the folder contradicts it, the model does."""
    folder, out = ShardFolder(exact), tmp_path / "forged"
    shutil.copytree(exact / "_tokenizer", out / "_tokenizer")
    folder.manifest.write(out)
    for plan in folder.manifest.parts:
        table = pa.ipc.open_file(exact / plan.name).read_all().replace_schema_metadata(None)
        for column in COLUMNS:
            place = table.schema.get_field_index(column)
            rows = [[row[0], *row[2:], *row[1:2]] for row in table[column].to_pylist()]
            table = table.set_column(place, table.schema.field(place), pa.array(rows, table.schema.field(place).type))
        batches = table.combine_chunks().to_batches(max_chunksize=folder.manifest.rows_per_batch)
        write_part(out, plan.name, folder.manifest.schema, folder.part_metadata(plan.name), batches)
    assert verify_folder(ShardFolder(out)).problems == []
    code, output, _ = remit("verify", "--shards", exact, "--model", reference_model, "--rows", 4)
    assert (code, "mean |difference| of entropies" in output) == (0, True)
    code, output, _ = remit("verify", "--shards", out, "--model", reference_model, "--rows", 4)
    assert (code, output.strip().splitlines()[-1]) == (1, "FAILED")


# --- on disk --------------------------------------------------------------------------------------------


def test_only_readers_that_want_them_read_them(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, entropy_rows(), references=ENTROPY_OF)
    base = ["input_ids", "doc_lengths", "doc_ids", "source"]
    assert next(folder.batches(["rl_logprobs"])).batch.schema.names == [*base, "rl_logprobs"]
    read = next(folder.batches(["rl_entropy_t2"]))
    assert read.batch.schema.names == [*base, "rl_entropy_t2"]
    assert np.isnan(read.values("rl_entropy_t2")).tolist() == [True, False, False, False] * 2
    assert folder.schema.names == [*base, "rl_logprobs", *COLUMNS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"entropy": 1}, "entropy is 1"),
        ({"vocab_size": 0}, "entropy is True with vocab_size 0"),
        ({"entropy_temperature": 1}, "entropy_temperature is 1"),
        ({"entropy_temperature": "2"}, "entropy_temperature is '2'"),
        ({"entropy_temperature": True}, "entropy_temperature is True"),
        ({"entropy": False}, r"entropy_temperature is 2\.0"),
    ],
)
def test_manifest_is_checked(tmp_path: Path, change: dict, message: str) -> None:
    plan = write_folder(tmp_path / "a", entropy_rows(), references=ENTROPY_OF).manifest
    (tmp_path / "b").mkdir()
    replace(plan, references={"rl": ENTROPY_OF["rl"] | change}).write(tmp_path / "b")
    with pytest.raises(ValueError, match=f"reference rl: {message}"):
        ShardFolder(tmp_path / "b")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"entropy_temperature": 2.0}, "--entropy-temperature is 2 without --entropy, expected both"),
        (
            {"entropy": True, "entropy_temperature": 1.0},
            r"--entropy-temperature is 1\.0, expected 0\.1 to 100 other than 1",
        ),
        ({"entropy": True, "entropy_temperature": 0.0}, r"--entropy-temperature is 0\.0, expected"),
        ({"entropy": True, "entropy_temperature": math.nan}, "--entropy-temperature is nan, expected"),
    ],
)
def test_settings_that_do_not_fit(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ScoreConfig("a", "b", "c", **settings)


def test_fake_engine_has_the_entropy_of_a_distribution() -> None:
    prompt = np.random.default_rng(0).integers(0, 40, 300)
    logprobs = hashed_logprobs(prompt)
    found = hashed_entropies(logprobs, 40, (1.0, 2.0))
    whole = np.full((299, 40), ((1 - np.exp(logprobs.astype(np.float64))) / 39)[:, None])
    whole[:, 0] = np.exp(logprobs.astype(np.float64))
    distribution = torch.distributions.Categorical(probs=torch.from_numpy(whole))
    hot = torch.distributions.Categorical(logits=distribution.logits / 2)
    want = [distribution.entropy(), hot.entropy(), (distribution.logits / 2).logsumexp(-1)]
    assert np.abs(found - torch.stack(want, -1).numpy()).max() < 1e-5


# --- faults ---------------------------------------------------------------------------------------------


def test_killed_driver_bad_rows_and_flipped_bits(faulty: Faulty, tmp_path: Path, remit: Remit) -> None:
    sound, killed, bad = tmp_path / "sound", tmp_path / "killed", tmp_path / "bad"
    run = Command(tmp_path, *faulty.command("score", sound, *OPTIONS))
    assert run.finish() == 0, run.errors
    report = verify_folder(ShardFolder(sound))
    assert (report.problems, report.quarantined) == ([], {"rl": 0})
    # all but the new columns is what a run without them gives
    for part in range(faulty.num_parts):
        for row, before in zip(part_rows(sound, part), part_rows(faulty.scored, part), strict=True):
            assert {name: row[name] for name in before} == before
            for column in COLUMNS:
                assert [v is None for v in row[column]] == [v is None for v in row["rl_logprobs"]]
    entry = json.loads((faulty.scored / "_manifest.json").read_text())["references"]["rl"]
    assert not {"entropy", "entropy_temperature", "vocab_size"} & set(entry)

    first = Command(tmp_path, *faulty.command("score", killed, *OPTIONS), REMIT_CRASH_AT="driver.committed")
    assert first.finish() == -signal.SIGKILL, first.errors
    for options, message in (
        ((), "--entropy is true there, not set now"),
        (("--entropy",), "--entropy-temperature is 2.0 there, not set now"),
        (("--entropy", "--entropy-temperature", 3), "--entropy-temperature is 2.0 there, 3.0 asked for now"),
    ):
        code, _, error = remit(*faulty.command("score", killed, *options))
        assert (code, message in error) == (1, True), error
    again = Command(tmp_path, *faulty.command("score", killed, *OPTIONS))
    assert again.finish() == 0, again.errors
    assert content(killed) == content(sound)

    token, part, place = token_of_one_row(faulty.packed, range(1, faulty.num_parts))
    run = Command(tmp_path, *faulty.command("score", bad, *OPTIONS), **fault(entropy=[token]))
    assert run.finish() == 0, run.errors
    rows, want = part_rows(bad, part), part_rows(sound, part)
    nulls = [None] * len(want[place]["input_ids"])
    assert rows[place] == want[place] | dict.fromkeys(("rl_logprobs", *COLUMNS), nulls)
    assert rows[:place] + rows[place + 1 :] == want[:place] + want[place + 1 :]
    (listed,) = side_file(bad, part)
    assert "rl_entropy is -0.5, expected 0..6.256" in listed["reason"]
    assert verify_folder(ShardFolder(bad)).problems == []

    flip(bad / "part-00000.arrow")
    assert "differs from its commit record" in verify_folder(ShardFolder(bad)).problems[0]
    code, output, _ = remit("verify", "--shards", bad, "--repair")
    assert (code, "part-00000.arrow" in output) == (1, True)
    run = Command(tmp_path, *faulty.command("score", bad, *OPTIONS))
    assert run.finish() == 0, run.errors
    assert (bad / "part-00000.arrow").read_bytes() == (sound / "part-00000.arrow").read_bytes()


@pytest.mark.usefixtures("ray_session")
def test_entropy_of_a_second_reference(tmp_path: Path, packed: Path, reference_model: Path) -> None:
    first = score_to(tmp_path / "one", packed, reference_model, engine="fake", entropy=True).path
    both = score_to(
        tmp_path / "two", first, reference_model, engine="fake", name="sft", entropy=True, entropy_temperature=0.5
    )
    for before, after in zip(read_rows(first), read_rows(both.path), strict=True):
        assert {key: after[key] for key in before} == before
    assert [name for name in both.schema.names if "entropy" in name or "partition" in name] == [
        "rl_entropy", "sft_entropy", "sft_entropy_t0p5", "sft_log_partition_t0p5",
    ]  # fmt: skip
    assert verify_folder(both).problems == []
