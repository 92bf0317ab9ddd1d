"""Runs that a signal, a full disk or other settings stop: what is there stays whole, the same command finishes."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from conftest import make_model, make_tokenizer, source_texts, write_corpus
from faulty import ROWS_PER_PART, SEQ_LEN, Faulty
from oracles import read_rows
from processes import FORKS, Command, committed, content, log_lines, start_server

from scorer.config import PackConfig
from scorer.pack import pack
from scorer.stopping import Stopped
from shards import ShardFolder, row_schema, write_part
from shards.store import LocalStore

Remit = Callable[..., tuple[int, str, str]]
SIGNALS = (signal.SIGTERM, signal.SIGINT)


def slow(seconds: float) -> dict[str, str]:
    return {"REMIT_FAKE_ENGINE": json.dumps({"seconds": seconds})}


def engine_has_parts(out: Path) -> bool:
    """Parts are handed over in the turn of the driver's loop that follows the one with the line `engine`."""
    events = [line["event"] for line in log_lines(out)] if (out / "_score.jsonl").exists() else []
    return "engine" in events and events[-1] == "progress"


def finishes(faulty: Faulty, folder: Path, arguments: list[object], command: str = "score") -> None:
    again = Command(folder, *arguments)
    assert again.finish() == 0, again.errors
    assert content(folder / "out") == faulty.undisturbed(command)


# --- signals --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", SIGNALS)
def test_signal_lets_the_parts_in_work_end(faulty: Faulty, tmp_path: Path, number: signal.Signals) -> None:
    out = tmp_path / "out"
    arguments = faulty.command("score", out)
    run = Command(tmp_path, *arguments, **slow(0.5))  # a part: 20 rows, three steps
    run.until(lambda: committed(out))
    time.sleep(0.7)  # the next one has been handed over by now
    before = committed(out)
    run.signal(number)
    assert run.finish() == 3, run.errors
    assert run.last_error == f"remit score: stopped by {number.name}; the same command again goes on"
    new = len(committed(out)) - len(before)
    assert 1 <= new <= 2  # an engine has two parts at most, and no third began
    assert len(committed(out)) < faulty.num_parts
    assert {path.stem for path in out.glob("part-*.arrow")} == {name[:-5] for name in committed(out)}
    assert not list(out.rglob("*.tmp"))
    assert not (out / "_lease").exists()
    last = log_lines(out)[-1]
    assert (last["event"], last["parts"]) == ("stopped", len(committed(out)))
    assert last["tokens"] == sum(len(row["input_ids"]) for row in read_rows(out))
    finishes(faulty, tmp_path, arguments)


def test_signal_with_a_grace_period_shorter_than_a_part(faulty: Faulty, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = faulty.command("score", out, "--grace-seconds", 0.5)
    run = Command(tmp_path, *arguments, **slow(4))
    run.until(lambda: engine_has_parts(out))
    run.signal(signal.SIGTERM)
    began = time.monotonic()
    assert run.finish() == 3, run.errors
    assert time.monotonic() - began < 120
    assert committed(out) == []
    time.sleep(5)  # the engine would have been done by now
    assert committed(out) == []
    last = log_lines(out)[-1]
    assert (last["event"], last["parts"], last["tokens"]) == ("stopped", 0, 0)
    finishes(faulty, tmp_path, arguments)


@pytest.mark.parametrize("numbers", [SIGNALS, pytest.param(SIGNALS[::-1], marks=pytest.mark.slow)])
def test_second_signal_leaves_at_once(faulty: Faulty, tmp_path: Path, numbers: tuple[signal.Signals, ...]) -> None:
    out = tmp_path / "out"
    arguments = faulty.command("score", out, "--grace-seconds", 600)
    run = Command(tmp_path, *arguments, **slow(60))
    run.until(lambda: engine_has_parts(out))
    run.signal(numbers[0])
    time.sleep(2)
    assert run.process.is_alive(), run.errors  # the first one waits for the parts in work
    run.signal(numbers[1])
    began = time.monotonic()
    assert run.finish() == 3, run.errors
    assert time.monotonic() - began < 120  # a part takes three minutes
    assert committed(out) == []
    assert log_lines(out)[-1]["event"] == "stopped"
    finishes(faulty, tmp_path, arguments)


def test_interrupt_from_the_keyboard(faulty: Faulty, tmp_path: Path) -> None:
    """Ctrl-C goes to the whole group of processes, a private Ray and its engines among them."""
    out = tmp_path / "out"
    arguments = faulty.command("score", out)
    run = Command(tmp_path, *arguments, private=True, **slow(0.5))
    run.until(lambda: committed(out))
    time.sleep(0.7)
    before = committed(out)
    os.killpg(run.pid, signal.SIGINT)
    assert run.finish() == 3, run.errors
    assert run.last_error == "remit score: stopped by SIGINT; the same command again goes on"
    assert 1 <= len(committed(out)) - len(before) <= 2
    finishes(faulty, tmp_path, arguments)


def test_signal_that_ends_the_private_ray_too(faulty: Faulty, tmp_path: Path) -> None:
    """As `timeout` and systemd send it: to all processes of the command. What was committed stays, nothing hangs."""
    out = tmp_path / "out"
    arguments = faulty.command("score", out)
    run = Command(tmp_path, *arguments, private=True, **slow(2))
    run.until(lambda: committed(out))
    os.killpg(run.pid, signal.SIGTERM)
    assert run.finish() == 3, run.errors
    assert run.last_error == "remit score: stopped by SIGTERM; the same command again goes on"
    assert not (out / "_lease").exists()
    assert log_lines(out)[-1]["event"] == "stopped"
    finishes(faulty, tmp_path, arguments)


@pytest.mark.parametrize("process", ["raylet", pytest.param("gcs_server", marks=pytest.mark.slow)])
def test_private_ray_that_dies(faulty: Faulty, tmp_path: Path, process: str) -> None:
    """Killed by whoever needs memory, say: the run ends with a line that names it, and the same command goes on."""
    out = tmp_path / "out"
    arguments = faulty.command("score", out)
    run = Command(tmp_path, *arguments, private=True, **slow(2))
    run.until(lambda: committed(out))
    children = subprocess.check_output(["ps", "-ww", "--ppid", str(run.pid), "-o", "pid=,comm="], text=True).split("\n")
    victims = [int(line.split()[0]) for line in children if line.endswith(process)]
    assert len(victims) == 1, children
    os.kill(victims[0], signal.SIGKILL)
    assert run.finish() == 1, run.errors
    assert run.last_error == (
        f"remit score: error: Ray failed: RayGone: its {process} has ended, with -9; the same command again goes on"
    )
    assert not (out / "_lease").exists()
    finishes(faulty, tmp_path, arguments)


@pytest.mark.parametrize(
    ("number", "send"),
    [
        (signal.SIGTERM, os.kill),
        pytest.param(signal.SIGINT, os.kill, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, os.killpg, marks=pytest.mark.slow),
    ],
)
def test_signal_during_pack(
    faulty: Faulty, tmp_path: Path, number: signal.Signals, send: Callable[[int, int], None]
) -> None:
    """Files of a megabyte, one at a time."""
    corpus, out = tmp_path / "corpus", tmp_path / "out"
    write_corpus(corpus / "0.jsonl", source_texts(400, seed=7) * 12)
    for index in range(1, 6):
        shutil.copy(corpus / "0.jsonl", corpus / f"{index}.jsonl")
    arguments = [
        "pack", "--corpus", corpus, "--tokenizer", faulty.tokenizer, "--seq-len", 512, "--tokens-per-shard", 1 << 17,
        "--num-workers", 1,
    ]  # fmt: skip
    staging = tmp_path / ".out.staging"
    run = Command(tmp_path, *arguments, "--out", out, private=send is os.killpg)
    run.until(lambda: list(staging.glob("source-*.json")))
    send(run.pid, number)
    assert run.finish() == 3, run.errors
    assert run.last_error == f"remit pack: stopped by {number.name}; the same command again goes on"
    assert not (out / "_manifest.json").exists()
    assert not list(tmp_path.glob(".out.staging/.*.tmp"))
    assert not (out / "_lease").exists()
    for folder in (out, tmp_path / "whole"):
        again = Command(tmp_path, *arguments, "--out", folder)
        assert again.finish() == 0, again.errors
    assert content(out) == content(tmp_path / "whole")


@pytest.mark.parametrize("grace", [60.0, 0.0])
def test_stop_while_pack_writes_parts(faulty: Faulty, tmp_path: Path, grace: float) -> None:
    out = tmp_path / "out"
    config = PackConfig(
        [str(faulty.corpus)], str(faulty.tokenizer), str(out), SEQ_LEN, tokens_per_shard=SEQ_LEN * ROWS_PER_PART,
        grace_seconds=grace,
    )  # fmt: skip
    with pytest.raises(Stopped):
        pack(config, should_stop=lambda: bool(committed(out)))
    assert 0 < len(committed(out)) < faulty.num_parts
    assert not (out / "_lease").exists()
    seen: list[Path] = []
    while seen != (seen := sorted(out.rglob("*"))):  # one step a task may have begun while it had the lease
        time.sleep(1)
    assert 0 < len(committed(out)) < faulty.num_parts  # nobody goes on without a lease
    parts, records = {path.stem for path in out.glob("part-*.arrow")}, {name[:-5] for name in committed(out)}
    # a part cut off between its file and its record is written again; only who is given no time leaves one
    assert parts == records if grace else parts >= records
    pack(config)
    assert content(out) == faulty.undisturbed("pack")


# --- full disks -----------------------------------------------------------------------------------------


def test_engine_that_may_not_write_more(faulty: Faulty, tmp_path: Path) -> None:
    """EFBIG in the engine's process: the message says where and how much; the next run finishes."""
    out = tmp_path / "out"
    arguments = faulty.command("score", out)
    run = Command(tmp_path, *arguments, **slow(0.3))
    run.until(lambda: committed(out))
    pid = next(line["pid"] for line in log_lines(out) if line["event"] == "engine")
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, 4096))
    assert run.finish() == 1, run.errors
    assert "could not be written (File too large): needs about " in run.last_error
    assert f"{out}/part-" in run.last_error
    assert f"{out.name}/part-" in run.last_error
    assert " bytes, " in run.last_error
    assert " are free; nothing was committed; free some and run the same command again" in run.last_error
    assert 0 < len(committed(out)) < faulty.num_parts
    assert {path.stem for path in out.glob("part-*.arrow")} == {name[:-5] for name in committed(out)}
    assert not list(out.rglob("*.tmp"))
    last = log_lines(out)[-1]
    assert (last["event"], last["parts"]) == ("failed", len(committed(out)))
    finishes(faulty, tmp_path, arguments)


def write_limited(out: Path, limit: int, answer: Any) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    ids = [(7919 * index * index) % 100003 for index in range(9000)]
    row = {"input_ids": ids, "doc_lengths": [9000], "doc_ids": [0], "source": 0}
    try:
        write_part(out, "part-00000.arrow", row_schema(), {}, [pa.RecordBatch.from_pylist([row], schema=row_schema())])
        answer.send("written")
    except OSError as error:
        answer.send(str(error))


@pytest.mark.parametrize("limit", [1, 700, 3000, 16000])
def test_part_that_does_not_fit(tmp_path: Path, limit: int) -> None:
    """Wherever in the file the space ends."""
    start_server()
    out = tmp_path / "out"
    out.mkdir()
    ours, theirs = FORKS.Pipe()
    process = FORKS.Process(target=write_limited, args=(out, limit, theirs))
    process.start()
    assert ours.poll(300)
    text = ours.recv()
    process.join()
    assert f"{out}/part-00000.arrow: could not be written (File too large): needs about " in text
    assert "are free; nothing was committed" in text
    assert [path for path in out.rglob("*") if path.is_file()] == []


CAN_MOUNT = subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0
SCRIPT = """
mount -t tmpfs -o size={size}k tmpfs {disk}
({filler}) &
{command} 2> {result}/err
echo $? > {result}/code
wait
rm -f {disk}/filler
cp -a {disk} {result}/full
"""


def on_small_disk(folder: Path, size: int, command: list[object], filler: str = "true", **variables: str) -> None:
    """Run a command whose output is on a disk of `size` KiB, with a Ray of its own; result/full is that disk then."""
    disk, result = folder / "disk", folder / "result"
    disk.mkdir(exist_ok=True)
    result.mkdir()
    words = " ".join([sys.executable, "-m", "pipelines.cli", *map(str, command)])
    script = SCRIPT.format(size=size, disk=disk, result=result, command=words, filler=filler.format(disk=disk))
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    subprocess.run(["unshare", "-rm", "sh", "-c", script], env=environment | variables, timeout=900, check=True)


@pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace")
def test_disk_that_fills_up_while_scoring(faulty: Faulty, tmp_path: Path) -> None:
    filler = "until ls {disk}/out/_commits/*.json; do sleep 0.02; done; dd if=/dev/zero of={disk}/filler bs=1k; true"
    out, result = tmp_path / "disk" / "out", tmp_path / "result"
    on_small_disk(tmp_path, 1000, faulty.command("score", out), filler, **slow(0.1))
    error = (result / "err").read_text().strip().splitlines()[-1]
    assert (result / "code").read_text().strip() == "1"
    assert "No space left on device" in error
    assert f"{out}/" in error
    assert "needs about" in error
    assert "0 are free" in error
    shutil.copytree(result / "full" / "out", tmp_path / "out")
    full = tmp_path / "out"
    assert {path.stem for path in full.glob("part-*.arrow")} == {name[:-5] for name in committed(full)}
    assert 0 < len(committed(full)) < faulty.num_parts
    assert not list(full.rglob("*.tmp"))
    finishes(faulty, tmp_path, faulty.command("score", full))


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="needs a mount namespace")
@pytest.mark.parametrize(("size", "message"), [(1100, "No space left on device"), (1900, "writing the parts needs")])
def test_disk_that_is_too_small_for_pack(faulty: Faulty, tmp_path: Path, size: int, message: str) -> None:
    """Text that tokenises worse than the estimate before the first byte assumes."""
    import random

    letters = [chr(code) for code in range(0x4E00, 0x9FFF)]
    rng = random.Random(1)
    texts = ["".join(rng.choice(letters) for _ in range(1000)) for _ in range(320)]
    corpus, out = write_corpus(tmp_path / "c.jsonl", texts), tmp_path / "disk" / "out"
    on_small_disk(
        tmp_path, size,
        ["pack", "--corpus", corpus, "--tokenizer", faulty.tokenizer, "--out", out, "--seq-len", 512, "--tokens-per-shard",
         1 << 15],
    )  # fmt: skip
    error = (tmp_path / "result" / "err").read_text().strip().splitlines()[-1]
    assert (tmp_path / "result" / "code").read_text().strip() == "1"
    assert message in error
    assert "needs about" in error
    assert "are free" in error
    assert not list((tmp_path / "result" / "full").rglob("*.tmp"))
    assert committed(tmp_path / "result" / "full" / "out") == []


def test_too_little_space_is_refused_before_anything_is_written(
    faulty: Faulty, tmp_path: Path, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LocalStore, "free_bytes", lambda self: 5000)
    out = tmp_path / "out"
    for command in ("pack", "score"):
        code, _, error = remit(*faulty.command(command, out))
        line = error.strip().splitlines()[-1]
        assert code == 1
        assert f"{out}: " in line
        assert "5,000 are free; free some or choose another --out" in line
        assert committed(out) == []
        assert not list(out.glob("part-*")), command
        if command == "pack":
            assert not out.exists()
            assert not (tmp_path / ".out.staging").exists()
    monkeypatch.undo()
    code, _, error = remit(*faulty.command("score", out))
    assert code == 0, error
    assert content(out) == faulty.undisturbed("score")


# --- a rerun that asks for something else ---------------------------------------------------------------


def half_done(faulty: Faulty, command: str, out: Path) -> dict[str, bytes]:
    """A folder with its second part missing."""
    shutil.copytree(faulty.packed if command == "pack" else faulty.scored, out)
    (out / "part-00001.arrow").unlink()
    (out / "_commits" / "part-00001.json").unlink()
    return content(out)


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (["--dtype", "bfloat16"], "--dtype is 'float32' there, 'bfloat16' asked for now"),
        (["--context", "document"], "--context is 'packed' there, 'document' asked for now"),
        (["--logprob-step", 0.5], "--logprob-step is 0.015625 there, 0.5 asked for now"),
        (["--name", "sft"], "was scored with --name rl, --name sft asked for now"),
    ],
)
def test_score_with_other_options(
    faulty: Faulty, tmp_path: Path, remit: Remit, options: list[object], field: str
) -> None:
    out = tmp_path / "out"
    before = half_done(faulty, "score", out)
    code, _, error = remit(*faulty.command("score", out, *options))
    assert code == 1
    what = field if field.startswith("was") else f"holds another scoring: {field}"
    assert f"{out}: {what}" in error.strip().splitlines()[-1]
    assert content(out) == before


def test_score_with_other_weights_or_tokens(faulty: Faulty, tmp_path: Path, remit: Remit) -> None:
    out = tmp_path / "out"
    before = half_done(faulty, "score", out)
    other = tmp_path / "elsewhere" / faulty.model.name
    make_model(other, seed=77)
    arguments = faulty.command("score", out)
    code, _, error = remit(*[other if word == faulty.model else word for word in arguments])
    assert (code, "references.rl.weights_sha256 is " in error) == (1, True), error
    assert content(out) == before

    edited_model = Path(shutil.copytree(faulty.model, tmp_path / "edited" / faulty.model.name))
    settings = json.loads((edited_model / "config.json").read_text())
    (edited_model / "config.json").write_text(json.dumps(settings | {"rms_norm_eps": 0.125}))
    code, _, error = remit(*[edited_model if word == faulty.model else word for word in arguments])
    assert (code, "references.rl.config_sha256 is " in error) == (1, True), error
    assert content(out) == before

    tokenizer = make_tokenizer(tmp_path / "tokenizer", source_texts(90, seed=50))
    edited = Path(shutil.copytree(faulty.corpus, tmp_path / "corpus"))
    (edited / "1.jsonl").write_bytes((edited / "1.jsonl").read_bytes().replace(b"; ", b", ", 1))
    for settings, field in (
        ({"tokenizer": str(tokenizer)}, "tokenizer.fingerprint is "),
        ({"corpus": [str(edited)]}, "corpus[1].sha256 is "),
    ):
        shards = tmp_path / f"packed-{field[:3]}"
        values = {"corpus": [str(faulty.corpus)], "tokenizer": str(faulty.tokenizer)} | settings
        pack(PackConfig(**values, out=str(shards), seq_len=SEQ_LEN, tokens_per_shard=SEQ_LEN * ROWS_PER_PART))
        bare = make_model(tmp_path / f"bare-{field[:3]}" / faulty.model.name)  # without a tokenizer of its own
        words = [{faulty.packed: shards, faulty.model: bare}.get(word, word) for word in arguments]  # type: ignore[call-overload]
        code, _, error = remit(*words)
        assert code == 1
        assert f"holds another scoring: {field}" in error, error
        assert content(out) == before


def test_pack_of_another_corpus_or_tokenizer(faulty: Faulty, tmp_path: Path, remit: Remit) -> None:
    out, corpus = tmp_path / "out", tmp_path / "corpus"
    before = half_done(faulty, "pack", out)
    shutil.copytree(faulty.corpus, corpus)
    arguments: list[object] = [corpus if word == faulty.corpus else word for word in faulty.command("pack", out)]

    def refused(field: str, *more: object, words: list[object] = arguments) -> None:
        code, _, error = remit(*words, *more)
        assert code == 1
        assert "holds another pack: " in error
        assert field in error.strip().splitlines()[-1], error
        assert content(out) == before

    with open(corpus / "1.jsonl", "a") as file:
        file.write('{"text": "more"}\n')
    refused("corpus[1].size is ")
    text = (faulty.corpus / "1.jsonl").read_bytes()
    (corpus / "1.jsonl").write_bytes(text.replace(b"x", b"y", 1))
    refused("corpus[1].sha256 is ")
    shutil.copy(faulty.corpus / "1.jsonl", corpus)
    write_corpus(corpus / "3.jsonl", ["new"])
    refused("corpus has 3 entries there, 4 asked for now")
    (corpus / "3.jsonl").unlink()
    (corpus / "2.jsonl").rename(corpus / "two.jsonl")
    refused("corpus[2].path is '2.jsonl' there, 'two.jsonl' asked for now")
    (corpus / "two.jsonl").rename(corpus / "2.jsonl")
    refused("--seq-len is 48 there, 32 asked for now", "--seq-len", 32)
    refused(
        f"--tokens-per-shard is {SEQ_LEN * 20} there, {SEQ_LEN * 10} asked for now", "--tokens-per-shard", SEQ_LEN * 10
    )
    refused("--special-tokens is 'parse' there, 'text' asked for now", "--special-tokens", "text")
    tokenizer = make_tokenizer(tmp_path / "tokenizer", source_texts(90, seed=50))
    words: list[object] = [tokenizer if word == faulty.tokenizer else word for word in arguments]
    refused("tokenizer.fingerprint is ", words=words)

    code, _, error = remit(*arguments)  # the same again, though from a copy in another folder
    assert code == 0, error
    assert content(out) == faulty.undisturbed("pack")


# --- parts without a record -----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["pack", "score"])
def test_orphan_part(faulty: Faulty, tmp_path: Path, remit: Remit, command: str) -> None:
    out = tmp_path / "out"
    shutil.copytree(faulty.packed if command == "pack" else faulty.scored, out)
    same, other, short, empty = (out / f"part-{index:05d}.arrow" for index in range(4))
    for part in (same, other, short, empty):
        (out / "_commits" / part.with_suffix(".json").name).unlink()
    other.write_bytes(same.read_bytes())
    short.write_bytes(short.read_bytes()[:-1])
    empty.write_bytes(b"")
    inodes = {part: part.stat().st_ino for part in (same, other)}
    code, _, error = remit(*faulty.command(command, out))
    assert code == 0, error
    assert content(out) == faulty.undisturbed(command)
    assert same.stat().st_ino == inodes[same]  # taken as it is
    assert other.stat().st_ino != inodes[other]


# --- the log of a run -----------------------------------------------------------------------------------


def test_score_log(faulty: Faulty, tmp_path: Path, remit: Remit) -> None:
    out = tmp_path / "out"
    run = Command(tmp_path, *faulty.command("score", out), **slow(0.2))
    assert run.finish() == 0, run.errors
    lines = log_lines(out)
    assert [line["event"] for line in lines].count("engine") == 1
    progress = [line for line in lines if line["event"] == "progress"]
    assert len(progress) >= 2
    times = [line["time"] for line in progress]
    assert min(after - before for before, after in pairwise(times)) >= 0.95
    told = [line["event"] for line in lines if line["event"] not in ("progress", "engine", "engine_ready", "nodes")]
    assert told == ["done"]
    last, rows = lines[-1], read_rows(out)
    assert last["event"] == "done"
    tokens = sum(len(row["input_ids"]) for row in rows)
    assert (last["tokens"], last["tokens_total"], last["parts"], last["parts_total"]) == (
        tokens, tokens, faulty.num_parts, faulty.num_parts,
    )  # fmt: skip
    assert (last["retries"], last["engine_restarts"], last["parts_failed"], last["rows_quarantined"]) == (0, 0, 0, 0)
    assert last["seconds"] >= times[-1] - times[0]
    assert all(before["tokens"] <= after["tokens"] <= tokens for before, after in pairwise(progress))

    # a second run appends; it counts what the first one did, too
    (out / "part-00000.arrow").unlink()
    (out / "_commits" / "part-00000.json").unlink()
    assert remit(*faulty.command("score", out))[0] == 0
    more = log_lines(out)
    assert more[: len(lines)] == lines
    assert more[-1]["event"] == "done"
    assert (more[-1]["tokens"], more[-1]["parts"]) == (tokens, faulty.num_parts)
    assert ShardFolder(out).missing_parts() == []
