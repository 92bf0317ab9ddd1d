"""remit select against brute force over to_pylist and fractions, in bounded memory, killed, refused, and trained from."""

import json
import math
import os
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import fsspec
import numpy as np
import pytest
from annotated import run
from conftest import score_to
from oracles import read_rows
from processes import Command, committed, content
from s3_server import REGION, S3Server
from selecting import PACKED, add_reference, annotate_two, brute_force, corpus_rows, write_rows, write_uniform

from scorer.config import SelectConfig
from scorer.ranking import CorpusRows, best_rows, part_scores
from scorer.select import select
from scorer.stopping import Stopped
from shards import Manifest, ShardFolder
from shards.crash import CRASH_POINTS
from shards.keep_ratio import keep_count
from shards.quarantine import read_quarantined_rows
from shards.verify import verify_folder

Remit = Callable[..., tuple[int, str, str]]
SEQ_LEN, ROWS_PER_PART, ROWS_PER_BATCH = 8, 9, 4
FILES = [9, 0, 21, 1, 5, 0, 40, 2, 0]  # documents; files without rows stand at an end and between others
REFERENCES = {
    "rl": PACKED,
    "base": PACKED,
    "sft": {"context": "document", "logprob_step": 0.0, "top_k": 3},
    "rl_document": {"context": "document", "logprob_step": 0.0},
    "base_document": {"context": "document", "logprob_step": 0.0},
    "pretend": PACKED | {"engine": "fake"},
}
QUARANTINED = {"base": [4, 30], "rl": [4, 11], "sft": [0, 5, 6, 13, 14, 15, 40, 41, 62]}


def make_corpus(folder: Path, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows, files = corpus_rows(rng, FILES, SEQ_LEN)
    for name, reference in REFERENCES.items():
        rounded = reference["logprob_step"]
        add_reference(
            rows, name, reference,
            (lambda count: -rng.integers(0, 3, count) / 4) if rounded else (lambda count: -rng.random(count)),
            QUARANTINED.get(name, ()),
        )  # fmt: skip
    write_rows(folder, rows, files, REFERENCES, QUARANTINED, SEQ_LEN, ROWS_PER_PART, ROWS_PER_BATCH)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About a hundred rows in parts of nine and record batches of four, whose scores often tie."""
    folder = make_corpus(tmp_path_factory.mktemp("select") / "corpus")
    assert verify_folder(ShardFolder(folder)).problems == []
    assert len(read_rows(folder)) % ROWS_PER_PART
    return folder


def config(shards: object, out: object, **settings: object) -> SelectConfig:
    return SelectConfig(str(shards), **({"teacher": "rl", "small": "base", "out": str(out)} | settings))


def arguments(shards: object, out: object, **settings: object) -> list[object]:
    options: dict = {"shards": shards, "out": out, "teacher": "rl", "small": "base"} | settings
    return ["select", *(word for key, value in options.items() for word in (f"--{key.replace('_', '-')}", value))]


# --- how many, and which --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("n", "ratio", "count"),
    [
        (5, 0.5, 3), (20, 0.55, 11), (1, 0.1, 1), (1, 0.8, 1), (3, 0.01, 1), (7, 0.5, 4), (10, 0.25, 3), (10, 0.15, 2),
        (100, 0.145, 15), (8286, 0.8, 6629), (10**15 + 1, 0.3, 3 * 10**14), (3, 1e-05, 1), (5, 0.999, 5), (9, 1.0, 9),
        (2, 0.25, 1), (40, np.float64(0.1625), 7),
    ],
)  # fmt: skip
def test_keep_count(n: int, ratio: float, count: int) -> None:
    assert keep_count(n, ratio) == count


def test_best_rows_by_hand() -> None:
    scores = np.array([1.0, np.nan, 3.0, 2.0, 2.0, np.nan, 2.0, 0.5])
    assert [best_rows(scores, ratio)[0].tolist() for ratio in (0.1, 0.34, 0.5, 0.75, 0.99)] == [
        [2], [2, 3], [2, 3, 4], [0, 2, 3, 4, 6], [0, 2, 3, 4, 6, 7],
    ]  # fmt: skip
    assert [best_rows(scores, ratio)[1] for ratio in (0.1, 0.34, 0.5, 0.75, 0.99)] == [3, 2, 2, 1, 0.5]
    assert best_rows(np.array([-0.0, 0.0, -0.0]), 0.5)[0].tolist() == [0, 1]
    assert str(best_rows(np.array([-0.0, -0.0]), 0.5)[1]) == "0.0"
    with pytest.raises(ValueError, match="none of 2 rows has a score"):
        best_rows(np.array([np.nan, np.nan]), 0.5)


@pytest.mark.parametrize(("teacher", "small"), [("rl", "base"), ("base", "rl"), ("rl_document", "base_document")])
def test_scores(corpus: Path, teacher: str, small: str) -> None:
    folder = ShardFolder(corpus)
    rows, parts = CorpusRows(folder.manifest), range(len(folder.manifest.parts))
    ours = np.concatenate([part_scores(folder, rows, teacher, small, part) for part in parts])
    _, theirs = brute_force(corpus, teacher, small, 1)
    assert np.isnan(ours).tolist() == [score is None for score in theirs]
    pairs = [(score, exact) for score, exact in zip(ours, theirs) if exact is not None]
    if teacher != "rl_document":  # rounded values: the nearest float64 of the true score
        assert all(score == float(exact) for score, exact in pairs)
        assert len({score for score, _ in pairs}) < len(pairs) / 2, "too few ties to tell"
    assert max(abs(Fraction(score) - exact) for score, exact in pairs) < Fraction(1, 10**14)


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(
    ("teacher", "small", "ratio"),
    [("rl", "base", ratio) for ratio in (0.8, 0.5, 0.333, 0.03, 0.0001, 0.97, 0.9999)]
    + [("base", "rl", 0.6), ("rl_document", "base_document", 0.7)],
)
def test_selection(corpus: Path, tmp_path: Path, teacher: str, small: str, ratio: float, workers: int) -> None:
    rows, scores = read_rows(corpus), brute_force(corpus, teacher, small, 1)[1]
    unscored = scores.count(None)
    exact = Fraction(str(ratio)) * (len(rows) - unscored)
    count = max(1, int(exact) + (exact - int(exact) >= Fraction(1, 2)))
    want, _ = brute_force(corpus, teacher, small, count)
    source = Manifest.read(corpus)

    folder = select(
        config(corpus, tmp_path / "out", teacher=teacher, small=small, keep_ratio=ratio, num_workers=workers)
    )
    assert read_rows(tmp_path / "out") == want
    manifest = folder.manifest
    assert manifest.selections == ({
        "method": "miniplm", "teacher": teacher, "small": small, "keep_ratio": ratio, "rows_read": len(rows),
        "rows_unscored": unscored, "rows_kept": count, "source_manifest_sha256": source.checksum,
        "lowest_score_kept": manifest.selections[0]["lowest_score_kept"],
    },)  # fmt: skip
    kept_scores = [scores[index] for index in range(len(rows)) if rows[index] in want and scores[index] is not None]
    assert manifest.selections[0]["lowest_score_kept"] == pytest.approx(float(min(kept_scores)), abs=1e-12)
    assert [file.documents_packed for file in manifest.corpus] == FILES
    assert [file.rows for file in manifest.corpus] == [
        sum(row["source"] == i for row in want) for i in range(len(FILES))
    ]
    assert [plan.rows for plan in manifest.parts[:-1]] == [ROWS_PER_PART] * (len(manifest.parts) - 1)
    assert manifest.references == source.references
    for plan in manifest.parts:
        reader = folder.open_part(plan.name)
        sizes = [reader.get_batch(index).num_rows for index in range(reader.num_record_batches)]
        assert sizes[:-1] == [ROWS_PER_BATCH] * (len(sizes) - 1)
    report = verify_folder(folder)
    assert report.problems == []
    assert report.documents == len({(row["source"], document) for row in want for document in row["doc_ids"]})


def test_rows_of_other_references_stay_quarantined(corpus: Path, tmp_path: Path) -> None:
    folder = select(config(corpus, tmp_path / "out"))
    originals = {json.dumps(row): index for index, row in enumerate(read_rows(corpus))}
    assert len(originals) == len(read_rows(corpus)), "rows repeat, so that they cannot be told apart"
    want, found = [], []
    for place, row in enumerate(read_rows(tmp_path / "out")):
        index = originals[json.dumps(row)]
        want += [(place, name) for name, listed in QUARANTINED.items() if index in listed]
    for part, plan in enumerate(folder.manifest.parts):
        side = read_quarantined_rows(folder.store, plan.name)
        found += [(part * ROWS_PER_PART + entry["row"], entry["reference"]) for entry in side]
        assert {entry["reason"] for entry in side} <= {"no sft"}
        assert folder.record(plan.name).quarantined == ({"sft": [entry["row"] for entry in side]} if side else {})
    assert found == want
    assert len(want) >= 5


def test_selecting_again_appends(corpus: Path, tmp_path: Path) -> None:
    first = select(config(corpus, tmp_path / "one"))
    second = select(config(first.path, tmp_path / "two", teacher="base", small="rl", keep_ratio=0.5))
    kept = second.manifest.rows
    assert kept == keep_count(first.manifest.rows, 0.5)
    assert read_rows(second.path) == brute_force(first.path, "base", "rl", kept)[0]
    assert [entry["teacher"] for entry in second.manifest.selections] == ["rl", "base"]
    assert second.manifest.selections[1]["source_manifest_sha256"] == first.manifest.checksum
    assert verify_folder(second).problems == []


@pytest.mark.parametrize("ratio", [0.05, 0.8])
def test_a_part_is_opened_once_in_each_pass(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ratio: float
) -> None:
    opened: Counter[str] = Counter()
    real = ShardFolder.open_rows

    def counted(folder: ShardFolder, part: str, columns: list[str] | None = None) -> object:
        opened[part if columns is None else f"{part} to rank"] += 1
        return real(folder, part, columns)

    monkeypatch.setattr(ShardFolder, "open_rows", counted)
    select(config(corpus, tmp_path / "out", keep_ratio=ratio, num_workers=3))
    assert set(opened.values()) == {1}
    assert sum(name.endswith("to rank") for name in opened) == len(Manifest.read(corpus).parts)


# --- memory ---------------------------------------------------------------------------------------------

PEAK = """
import sys
from pathlib import Path
from scorer.select import select
from scorer.config import SelectConfig
select(SelectConfig(sys.argv[1], "rl", "base", sys.argv[2], num_workers=2))
status = Path("/proc/self/status").read_text()
print(next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from /proc")
@pytest.mark.usefixtures("starts_processes")
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    peaks = []
    for rows in (10_000, 100_000):  # the larger one has 150 MB of values
        write_uniform(tmp_path / str(rows), rows, 128, 1000)
        code = [sys.executable, "-c", PEAK, tmp_path / str(rows), tmp_path / f"out-{rows}"]
        output = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
        peaks.append(int(output.stdout.split()[-1]) / 1024)
        assert Manifest.read(tmp_path / f"out-{rows}").rows == rows * 8 // 10
    assert peaks[1] < peaks[0] + 64, peaks


# --- killed, stopped, refused ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    select(config(corpus, out, num_workers=1))
    return content(out)


@pytest.mark.parametrize("point", [name for name in CRASH_POINTS if not name.startswith("staging.")])
@pytest.mark.usefixtures("starts_processes")
def test_killed_anywhere(corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes], point: str) -> None:
    killed = Command(tmp_path, *arguments(corpus, tmp_path / "out"), REMIT_CRASH_AT=point)
    assert killed.finish() == -signal.SIGKILL, killed.errors
    again = Command(tmp_path, *arguments(corpus, tmp_path / "out"))
    assert again.finish() == 0, again.errors
    assert content(tmp_path / "out") == undisturbed


@pytest.mark.usefixtures("starts_processes")
def test_killed_after_every_part(corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes]) -> None:
    """Each run commits a part or two and dies, and leaves the others to the next."""
    parts: list[int] = []
    while True:
        attempt = Command(
            tmp_path, *arguments(corpus, tmp_path / "out", num_workers=1), REMIT_CRASH_AT="driver.committed"
        )
        if attempt.finish() == 0:
            break
        assert attempt.process.exitcode == -signal.SIGKILL, attempt.errors
        parts.append(len(committed(tmp_path / "out")))
        assert parts == sorted(set(parts)), "a run committed nothing"
    assert len(parts) > 2
    assert content(tmp_path / "out") == undisturbed


def test_parts_that_were_taken_out_are_written_again(
    corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes], remit: Remit
) -> None:
    out = tmp_path / "out"
    select(config(corpus, out))
    records = committed(out)
    for name in (records[0], records[4], records[-1]):
        (out / "_commits" / name).unlink()
        (out / name.replace(".json", ".arrow")).write_bytes(b"damaged")
    code, output, error = remit(*arguments(corpus, out, num_workers=2))
    assert code == 0, error
    assert content(out) == undisturbed
    assert output.startswith("selected ")
    assert remit(*arguments(corpus, out))[1].startswith("nothing to do")


@pytest.mark.parametrize("phase", ["rank", "write"])
def test_stopped_in_either_pass(corpus: Path, tmp_path: Path, undisturbed: dict[str, bytes], phase: str) -> None:
    out, seen = tmp_path / "out", ""

    def progress(now: str, done: int, total: int) -> None:
        nonlocal seen
        seen = now if done else seen

    with pytest.raises(Stopped):
        select(config(corpus, out, num_workers=1), progress, lambda: seen == phase)
    assert out.exists() == (phase == "write"), "what was not begun leaves nothing"
    if phase == "write":
        assert 0 < len(committed(out)) < len(ShardFolder(out).manifest.parts)
        assert not (out / "_lease").exists()
    select(config(corpus, out))
    assert content(out) == undisturbed


@pytest.mark.usefixtures("starts_processes")
def test_sigterm_is_three(corpus: Path, tmp_path: Path) -> None:
    """The signal comes while the third part is scored."""
    script = (
        "import os, signal, sys, scorer.ranking as ranking\n"
        "real = ranking.part_scores\n"
        "def signalled(*arguments):\n"
        "    if arguments[-1] == 3: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    return real(*arguments)\n"
        "ranking.part_scores = signalled\n"
        "from pipelines.cli import main\n"
        "main(sys.argv[1:])\n"
    )
    words = [str(word) for word in arguments(corpus, tmp_path / "late", num_workers=1)]
    ended = subprocess.run(
        [sys.executable, "-c", script, *words], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert ended.returncode == 3, ended.stderr
    assert "the same command again goes on" in ended.stderr
    assert not (tmp_path / "late").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"small": "rl"}, "--teacher and --small are both 'rl'"),
        ({"keep_ratio": 0}, "--keep-ratio is 0.0, expected more than 0 and less than 1"),
        ({"keep_ratio": 1}, "--keep-ratio is 1.0"),
        ({"keep_ratio": "nan"}, "--keep-ratio is nan"),
        ({"num_workers": 0}, "--num-workers is 0"),
    ],
)
def test_bad_settings(corpus: Path, tmp_path: Path, remit: Remit, settings: dict, message: str) -> None:
    code, _, error = remit(*arguments(corpus, tmp_path / "out", **settings))
    assert code == 2
    assert message in " ".join(error.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "messages"),
    [
        (
            {"teacher": "nobody"},
            ["has no log-probs of a reference named 'nobody'", "it has: base, base_document, pretend"],
        ),
        ({"small": "nobody"}, ["'nobody'"]),
        ({"small": "pretend"}, ["pretend_logprobs comes from the fake engine", "score again without --engine fake"]),
        ({"teacher": "pretend"}, ["pretend_logprobs comes from the fake engine"]),
        ({"teacher": "sft"}, ["sft_logprobs was scored in document context, base_logprobs in packed", "--context"]),
    ],
)
def test_references_that_do_not_fit(
    corpus: Path, tmp_path: Path, remit: Remit, settings: dict, messages: list[str]
) -> None:
    code, _, error = remit(*arguments(corpus, tmp_path / "out", **settings))
    assert code == 1
    assert all(message in error for message in messages), error
    assert not (tmp_path / "out").exists()


def test_another_selection_is_refused_by_field(corpus: Path, tmp_path: Path, remit: Remit) -> None:
    out = tmp_path / "out"
    select(config(corpus, out))
    before = content(out)
    other = make_corpus(tmp_path / "other", seed=1)
    for shards, settings, message in (
        (corpus, {"keep_ratio": 0.5}, "--keep-ratio is 0.8 there, 0.5 asked for now"),
        (corpus, {"teacher": "base", "small": "rl"}, "--teacher is 'rl' there, 'base' asked for now"),
        (other, {}, "selections[0].source_manifest_sha256 is"),
        (out, {"out": corpus}, "selections has 0 entries there, 2 asked for now"),
    ):
        code, _, error = remit(*arguments(shards, **{"out": out} | settings))
        assert code == 1
        assert message in error
    assert content(out) == before


def test_folders_that_do_not_fit(corpus: Path, tmp_path: Path, remit: Remit) -> None:
    (tmp_path / "link").symlink_to(corpus)
    for out in (corpus, f"{corpus}/", f"file://{corpus}", tmp_path / "link"):
        code, _, error = remit(*arguments(corpus, out))
        assert (code, "isthefolderof--shards;remitselectwrites" in re.sub(r"[\s│]", "", error)) == (2, True), error
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert "is not empty and not a shard folder" in remit(*arguments(corpus, tmp_path / "full"))[2]
    part = make_corpus(tmp_path / "part")
    (part / "_commits" / "part-00003.json").unlink()
    assert "parts are not committed" in remit(*arguments(part, tmp_path / "out"))[2]


def test_damage_is_caught(tmp_path: Path, remit: Remit) -> None:
    shards = make_corpus(tmp_path / "shards")
    record = json.loads((shards / "_commits" / "part-00002.json").read_text())
    data = bytearray((shards / "part-00002.arrow").read_bytes())
    data[record["batches"][0]["columns"][0]["offset"] + 9] ^= 1
    (shards / "part-00002.arrow").write_bytes(data)
    code, _, error = remit(*arguments(shards, tmp_path / "out"))
    assert code == 1
    assert "part-00002.arrow: record batch 0, input_ids: sha256" in error
    assert not (tmp_path / "out").exists()


# --- who reads it ---------------------------------------------------------------------------------------


def test_the_result_is_an_ordinary_folder(small: Path, models: dict[str, Path], tmp_path: Path, remit: Remit) -> None:
    shards, out = annotate_two(small, tmp_path / "shards"), tmp_path / "out"
    code, output, error = remit(*arguments(shards, out, keep_ratio=0.5))
    assert code == 0, error
    chosen = Manifest.read(out).selections[0]
    assert chosen["rows_unscored"] > 0, "the corpus has no row of one token"
    scored = chosen["rows_read"] - chosen["rows_unscored"]
    lowest = f"(lowest score kept {chosen['lowest_score_kept']:.4f})"
    assert output.startswith(
        f"selected {chosen['rows_kept']:,} of {scored:,} rows {lowest}, {chosen['rows_unscored']} "
    )
    assert f"without a score left out -> {out} (" in output

    code, output, error = remit("verify", "--shards", out)
    assert code == 0, output + error
    assert "documents, whole or in part" in output
    assert f"selection: miniplm kept {chosen['rows_kept']:,} of {chosen['rows_read']:,} rows, " in output
    code, output, error = remit("inspect", "--shards", out)
    assert code == 0, error
    assert f"selection: miniplm kept {chosen['rows_kept']:,} of {chosen['rows_read']:,} rows, " in output
    assert remit("inspect", "--shards", out, "--row", chosen["rows_kept"] - 1)[0] == 0

    epoch = {"max_steps": None, "epochs": 1.0}
    for objective in ("ntp", "remit"):
        metrics = run(tmp_path / objective, out, models["base"], objective=objective, **epoch)
        assert len(metrics) == math.ceil(chosen["rows_kept"] / 8)
        assert all(math.isfinite(line["loss"]) for line in metrics)
        assert metrics[-1]["tokens"] <= Manifest.read(out).tokens
        assert run(tmp_path / objective, out, models["base"], objective=objective, **epoch) == metrics


@pytest.mark.usefixtures("ray_session")
def test_another_column_on_top(small: Path, reference_model: Path, tmp_path: Path) -> None:
    chosen = select(config(annotate_two(small, tmp_path / "shards"), tmp_path / "out"))
    scored = score_to(tmp_path / "scored", chosen.path, reference_model, name="sft", engine="fake")
    assert scored.manifest.selections == chosen.manifest.selections
    assert verify_folder(scored).problems == []


def test_a_manifest_whose_counts_disagree_is_refused(corpus: Path, tmp_path: Path) -> None:
    source = Manifest.read(corpus)
    wrong = {"rows_read": source.rows + 1, "rows_kept": source.rows - 1}
    replace(source, selections=(wrong,)).write(tmp_path)
    with pytest.raises(ValueError, match="selections kept"):
        Manifest.read(tmp_path)


def test_other_folders_keep_their_bytes(corpus: Path) -> None:
    assert "selections" not in json.loads((corpus / "_manifest.json").read_text())
    assert "selections" not in Manifest.read(corpus).part_metadata(0)


@pytest.fixture
def server() -> Iterator[S3Server]:
    server, before = S3Server(), dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true", "REMIT_STORE_RETRY_SECONDS": "20",
    }  # fmt: skip
    fsspec.filesystem("s3").clear_instance_cache()  # of tests before this one, with their servers
    yield server
    fsspec.filesystem("s3").clear_instance_cache()
    os.environ.clear()
    os.environ.update(before)
    server.close()


def test_in_a_bucket(corpus: Path, undisturbed: dict[str, bytes], server: S3Server) -> None:
    shards = server.upload(corpus, "shards")
    out = shards.replace("shards", "selected")
    select(config(shards, out, num_workers=2))
    assert server.files("selected") == undisturbed
    with pytest.raises(ValueError, match="is the folder of --shards"):
        config(shards, shards + "/")
