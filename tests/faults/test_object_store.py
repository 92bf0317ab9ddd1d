"""Corpus, shards and output in a bucket: the same bytes as in folders, through outages, and nothing left behind."""

import bz2
import gzip
import hashlib
import io
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs
import pytest
import ray
import token_files
from annotated import annotate, by_model
from botocore.exceptions import ClientError
from conftest import make_model, source_texts, write_corpus
from fsspec.implementations.memory import MemoryFileSystem
from s3_server import BUCKET, REGION, S3Server
from s3fs.errors import translate_boto_error
from test_score import compare

from scorer.cluster import ray_cluster
from scorer.corpus import read_documents
from scorer.known import hashes_now
from scorer.pack_tasks import stage_source
from scorer.sources import find_corpus, find_sources
from scorer.tokens.read import Reading, read_tokens
from shards import ShardFolder, write_part
from shards.lease import Lease
from shards.remote import RemoteStore
from shards.store import open_store
from shards.store_errors import StoreSilent, may_pass, plain
from shards.verify import verify_folder
from trainer.data import RowReader

Remit = Callable[..., tuple[int, str, str]]
SEQ_LEN, ROWS_PER_PART = 32, 24
STEP_SECONDS = 0.05  # of the fake engine, for eight rows
RETRY_SECONDS = 20


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    server = S3Server()
    yield server
    server.close()


@pytest.fixture(scope="module", autouse=True)
def cluster(
    server: S3Server, ray_session: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Iterator[Path]:
    """Ray workers that know the server, and a folder for temporary files that is known to be empty."""
    tmp_path_factory.getbasetemp()  # of the whole test run, so not below the folder that goes with this module
    before = dict(os.environ)
    temporary = Path(tempfile.mkdtemp(prefix="s3-"))
    ray.shutdown()
    os.environ |= {
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true", "TMPDIR": str(temporary),
        "RAY_TMPDIR": "/tmp", "REMIT_FAKE_ENGINE": json.dumps({"seconds": STEP_SECONDS}),
        "REMIT_STORE_RETRY_SECONDS": str(RETRY_SECONDS),
    }  # fmt: skip
    tempfile.tempdir = None
    with ray_cluster():
        yield temporary
    os.environ.clear()
    os.environ.update(before)
    tempfile.tempdir = None
    shutil.rmtree(temporary)
    following = ExitStack()  # for the tests after this module
    following.enter_context(ray_cluster())
    request.config.add_cleanup(following.close)


def temporary_files(folder: Path) -> list[Path]:
    return [
        path for path in folder.glob("remit-*") if not path.name.startswith(("remit-cores-", "remit-fingerprints-"))
    ]


@pytest.fixture(autouse=True)
def nothing_left(cluster: Path, server: S3Server) -> Iterator[None]:
    """No lease, no staging and no temporary file, in the bucket or here, whatever the test did."""
    yield
    left = [key for key in server.keys("") if re.search(r"_lease|staging|\.tmp", key)]
    assert left == []
    assert temporary_files(cluster) == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory, server: S3Server) -> Path:
    """Files whose order differs between paths and keys (sub-1/ is before sub/ as a string), and some to pass over."""
    folder = tmp_path_factory.mktemp("s3") / "corpus"
    write_corpus(folder / "a b é.jsonl", source_texts(40, seed=2))
    write_corpus(folder / "sub" / "c.jsonl.zst", source_texts(30, seed=3))
    write_corpus(folder / "sub-1" / "d.parquet", source_texts(30, seed=4))
    write_corpus(folder / ".hidden.jsonl", ["hidden"])
    write_corpus(folder / "_trash" / "x.jsonl", ["trash"])
    (folder / "README.md").write_text("no corpus")
    server.upload(folder, "corpus")
    server.put("corpus/sub/", b"")  # what consoles make for a folder
    server.put("corpus-2/x.jsonl", b'{"text": "another folder"}\n')
    return folder


def pack_arguments(corpus: object, tokenizer: Path, out: object) -> list[object]:
    tokens = SEQ_LEN * ROWS_PER_PART
    return ["pack", "--corpus", corpus, "--tokenizer", tokenizer, "--out", out, "--seq-len", SEQ_LEN,
            "--tokens-per-shard", tokens]  # fmt: skip


def score_arguments(shards: object, model: Path, out: object) -> list[object]:
    return ["score", "--engine", "fake", "--num-engines", 1, "--shards", shards, "--model", model, "--out", out]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def without_log(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != "_score.jsonl"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Path:
    folder = make_model(tmp_path_factory.mktemp("model") / "tiny", seed=1)
    shutil.copytree(tokenizer_folder, folder, dirs_exist_ok=True)
    return folder


def run_here(arguments: list[object]) -> None:
    from pipelines.cli import main

    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    assert not end.value.code


@pytest.fixture(scope="module")
def local(corpus: Path, tokenizer_folder: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """packed/ and scored/ (by the fake engine) as folders of this machine: what the bucket is compared with."""
    folder = tmp_path_factory.mktemp("local")
    run_here(pack_arguments(corpus, tokenizer_folder, folder / "packed"))
    run_here(score_arguments(folder / "packed", model, folder / "scored"))
    assert len(list((folder / "scored").glob("*.arrow"))) >= 8
    return folder


@pytest.fixture(scope="module")
def packed(local: Path, server: S3Server) -> str:
    return server.upload(local / "packed", "packed")


@pytest.fixture(scope="module")
def scored(local: Path, server: S3Server) -> str:
    return server.upload(local / "scored", "scored")


class Outage(threading.Thread):
    """Stops the server once `due` says so, starts it again after `seconds`. reached: what was there then."""

    def __init__(self, server: S3Server, prefix: str, at_least: int, seconds: float) -> None:
        super().__init__(daemon=True)
        self.server, self.prefix, self.at_least, self.seconds = server, prefix, at_least, seconds
        self.reached = self.began = 0.0
        self.start()

    def run(self) -> None:
        while (found := len(self.server.keys(self.prefix))) < self.at_least:
            time.sleep(0.02)
        self.server.tell("stop")
        self.reached, self.began = found, time.monotonic()
        time.sleep(self.seconds)
        self.server.tell("start")


# --- the same bytes -------------------------------------------------------------------------------------


def test_pack_gives_the_bytes_of_a_local_run(
    corpus: Path, tokenizer_folder: Path, server: S3Server, local: Path, remit: Remit
) -> None:
    before = server.files("")
    code, _, error = remit(*pack_arguments(f"s3://{BUCKET}/corpus", tokenizer_folder, f"s3://{BUCKET}/out"))
    assert code == 0, error
    assert server.files("out") == contents(local / "packed")
    assert {key: data for key, data in server.files("").items() if not key.startswith("out/")} == before


@pytest.mark.parametrize("entry", ["corpus", "corpus/", "corpus/*/*", "corpus/*.jsonl*", "corpus/sub/c.jsonl.zst"])
def test_the_same_files_are_found(corpus: Path, entry: str) -> None:
    """In the same order, and with the same bytes."""
    here, there = find_sources([f"{corpus.parent}/{entry}"]), find_sources([f"s3://{BUCKET}/{entry}"])
    assert [source.name for source in here] == [source.name for source in there]
    assert [source.sha256() for source in here] == [source.sha256() for source in there]
    # a glob takes what begins with _ too
    assert ("_trash/x.jsonl" in " ".join(source.name for source in there)) == (entry == "corpus/*/*")


def test_the_same_command_again_packs_nothing_and_another_corpus_is_refused(
    packed: str, corpus: Path, local: Path, tokenizer_folder: Path, server: S3Server, remit: Remit
) -> None:
    code, _, error = remit(*pack_arguments(f"s3://{BUCKET}/corpus", tokenizer_folder, packed))
    assert code == 0, error
    code, _, error = remit(*pack_arguments(f"s3://{BUCKET}/corpus-2", tokenizer_folder, packed))
    assert code == 1
    assert "holds another pack: corpus has 3 entries there, 1 asked for now" in error
    assert server.files("packed") == contents(local / "packed")


def test_odd_files_are_read_and_passed_over_as_in_a_folder(server: S3Server, tmp_path: Path) -> None:
    folder = tmp_path / "odd"
    line = json.dumps({"text": "x"}).encode() + b"\n"
    contents = {
        "B.JSONL": line, "a.json": line * 2, "c.json.gz": gzip.compress(line), "d.ndjson.bz2": bz2.compress(line),
        "long.json": json.dumps({"text": "x" * 100_000}).encode(), "stats.json": b'{"n": 1}', "array.json": b"[1]",
        "pretty.json": b'{\n"text": "x"}', "x.csv": b"", "sub/y.csv.gz": b"", "sub/README": b"", "sub/e.Parquet": b"PAR1",
        ".git/a": b"", ".git/b/c": b"", "_x.jsonl": line,
    }  # fmt: skip
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    url = server.upload(folder, "odd")
    server.put("odd/sub/", b"")
    for below in ("", "/*", "/*/*", "/*.js*"):
        ours, theirs = find_corpus([f"{folder}{below}"]), find_corpus([f"{url}{below}"])
        assert [source.name for source in ours.sources] == [source.name for source in theirs.sources]
        assert ours.passed_over == theirs.passed_over
    assert find_corpus([url]).passed_over == {
        "hidden": 2, ".csv": 1, ".csv.gz": 1, "no suffix": 1, ".json without an object a line": 3
    }  # fmt: skip
    texts = [
        text for source in find_sources([f"{url}/*.*"]) for batch, _ in read_documents(source, "text") for text in batch
    ]
    assert texts == ["x", "x", "x", "x", "x", "x", "x" * 100_000]
    with pytest.raises(ValueError, match=r"array\.json: is one JSON array, expected one object a line"):
        find_sources([f"{url}/array.json"])
    with pytest.raises(ValueError, match=r"no corpus file there \(there are \.csv\.gz \(y\.csv\.gz\)\)"):
        find_sources([f"{url}/sub/*.gz"])


def test_files_of_a_bucket_are_not_read_again(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REMIT_CACHE", str(tmp_path))
    server.put("known/a.jsonl", b"aaa")
    server.put("known/b.jsonl", b"bbb")
    url = f"s3://{BUCKET}/known"
    packed = [hashlib.sha256(data).hexdigest() for data in (b"aaa", b"bbb")]
    before = int(server.tell("requests"))
    assert hashes_now("out", find_sources([url]), packed) == packed
    read = int(server.tell("requests")) - before
    assert hashes_now("out", find_sources([url]), packed) == packed
    assert int(server.tell("requests")) - before - read <= read - 4
    server.put("known/b.jsonl", b"ccc")
    assert hashes_now("out", find_sources([url]), packed) == [packed[0], hashlib.sha256(b"ccc").hexdigest()]


def test_a_listing_is_enough(corpus: Path, server: S3Server) -> None:
    """Requests one after the other, several for each of many files, would take long before any work begins."""
    before = int(server.tell("requests"))
    sources = find_sources([f"s3://{BUCKET}/corpus"])
    sizes = [source.size() for source in sources]
    assert int(server.tell("requests")) - before <= 4
    assert sizes == [(corpus / source.name).stat().st_size for source in sources]


def test_a_file_that_changes_is_refused(server: S3Server, tokenizer_folder: Path) -> None:
    server.put("changing/x.jsonl", b'{"text": "one"}\n')
    (source,) = find_sources([f"s3://{BUCKET}/changing"])
    settings = {
        "seq_len": SEQ_LEN, "rows_per_batch": 8, "text_field": "text", "on_bad_document": "stop",
        "tokenizer": {"special_tokens": "parse", "eos_token_id": 0},
    }  # fmt: skip
    staging = RemoteStore(f"s3://{BUCKET}/changing-stages")
    tokenizer_json = (tokenizer_folder / "tokenizer.json").read_text()
    updates = stage_source(source, 0, staging, tokenizer_json, settings, 1)
    next(updates)
    server.put("changing/x.jsonl", b'{"text": "two"}\n')
    with pytest.raises(ValueError, match=r"changing/x\.jsonl: changed while it was read"):
        next(updates)
    assert staging.names() == []
    server.put("changing/x.jsonl", b'{"text": "three"}\n')
    with pytest.raises(ValueError, match=r"changing/x\.jsonl: changed since it was listed"):
        next(stage_source(source, 0, staging, tokenizer_json, settings, 1))


def test_paths_and_urls_can_be_mixed(corpus: Path, tokenizer_folder: Path, tmp_path: Path) -> None:
    sources = find_sources([str(corpus / "sub"), f"s3://{BUCKET}/corpus-2"])
    assert [Path(source.name).name for source in sources] == ["c.jsonl.zst", "x.jsonl"]
    assert not Path(sources[0].name).is_absolute()


def test_a_whole_bucket_is_no_output(tokenizer_folder: Path, corpus: Path, remit: Remit, server: S3Server) -> None:
    before = server.files("")
    code, _, error = remit(*pack_arguments(f"s3://{BUCKET}/corpus-2", tokenizer_folder, f"s3://{BUCKET}/"))
    assert code == 1
    assert f"s3://{BUCKET}: is a whole bucket; name a folder in it" in error.strip().splitlines()[-1]
    assert server.files("") == before


def test_score_gives_the_bytes_of_a_local_run(
    packed: str, model: Path, local: Path, server: S3Server, remit: Remit
) -> None:
    code, _, error = remit(*score_arguments(packed, model, f"s3://{BUCKET}/score-bytes"))
    assert code == 0, error
    files = server.files("score-bytes")
    assert without_log(files) == without_log(contents(local / "scored"))
    events = [json.loads(line)["event"] for line in files["_score.jsonl"].splitlines()]
    assert events[-1] == "done"


# --- who reads it ---------------------------------------------------------------------------------------


def test_verify_and_inspect(scored: str, local: Path, remit: Remit) -> None:
    for command in (["verify"], ["inspect"], ["inspect", "--row", "3"]):
        outputs = [remit(command[0], "--shards", shards, *command[1:]) for shards in (scored, local / "scored")]
        assert [code for code, _, _ in outputs] == [0, 0], outputs
        assert outputs[0][1].replace(scored, "X") == outputs[1][1].replace(str(local / "scored"), "X")
    assert "OK" in remit("verify", "--shards", scored)[1]


def test_row_reader(scored: str, local: Path) -> None:
    readers = [RowReader(ShardFolder(folder), "packed", "rl", 10**6) for folder in (scored, local / "scored")]
    places = np.array([(block, 0) for block in range(len(readers[0].block_rows))])
    rows = [reader.rows(places) for reader in readers]
    assert len(places) >= 8
    for ours, theirs in zip(*rows, strict=True):
        assert np.array_equal(ours.input_ids, theirs.input_ids)
        assert ours.columns["logprobs"].tobytes() == theirs.columns["logprobs"].tobytes()


def test_pyarrow_opens_the_folder(scored: str, local: Path, server: S3Server) -> None:
    filesystem = pyarrow.fs.S3FileSystem(
        endpoint_override=f"127.0.0.1:{server.port}", scheme="http", access_key="x", secret_key="y", region=REGION
    )
    table = pyarrow.dataset.dataset(f"{BUCKET}/scored", format="arrow", filesystem=filesystem).to_table()
    assert table.num_rows > 8 * ROWS_PER_PART - ROWS_PER_PART
    assert table.equals(pyarrow.dataset.dataset(local / "scored", format="arrow").to_table())


@pytest.mark.slow
def test_vllm_scores_into_the_bucket(packed: str, model: Path, server: S3Server, tmp_path: Path, remit: Remit) -> None:
    arguments = ["--model", model, "--num-engines", 1, "--dtype", "float32"]
    code, _, error = remit("score", "--shards", packed, "--out", f"s3://{BUCKET}/by-vllm", *arguments)
    assert code == 0, error
    for name, data in server.files("by-vllm").items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert compare(ShardFolder(tmp_path), model, "rl", "packed", 1 / 128 + 1e-4, every=4) > 1000


def test_the_trainer_learns_from_the_bucket(
    local: Path, model: Path, server: S3Server, tmp_path: Path, remit: Remit
) -> None:
    here = annotate(local / "packed", tmp_path / "annotated", by_model(model, "packed", 1 / 64), "packed", 1 / 64)
    losses = []
    for shards, run in ((server.upload(here, "annotated"), tmp_path / "remote"), (here, tmp_path / "here")):
        code, _, error = remit(
            "train", "--shards", shards, "--model", model, "--out", run, "--max-steps", 2, "--global-batch-size", 4,
            "--dtype", "float32", "--checkpoint-every", 0,
        )  # fmt: skip
        assert code == 0, error
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines])
        assert (run / "model" / "model.safetensors").exists()
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


# --- never replacing ------------------------------------------------------------------------------------


def test_create_never_replaces(server: S3Server) -> None:
    store = RemoteStore(f"s3://{BUCKET}/create")
    store.create("x", b"first")
    with pytest.raises(FileExistsError, match=f"s3://{BUCKET}/create/x"):
        store.create("x", b"second")
    temporary = store.temporary("x")
    temporary.write_bytes(b"third")
    with pytest.raises(FileExistsError):
        store.publish(temporary, "x")
    assert not temporary.exists()
    assert server.get("create/x") == b"first"
    store.create("x", b"first")  # the same content counts as done
    store.replace("x", b"other")
    assert server.get("create/x") == b"other"


def test_lost_answer_counts_as_done(server: S3Server) -> None:
    store = RemoteStore(f"s3://{BUCKET}/lost")
    before = int(server.tell("requests"))
    server.tell("lose lost/x")
    store.create("x", b"mine")  # the first put arrives, its answer does not, the second is refused
    assert int(server.tell("requests")) - before >= 3
    assert server.get("lost/x") == b"mine"


RACE = """
import sys, time
from shards.remote import RemoteStore
store = RemoteStore(sys.argv[1])
store.names()
print("ready", flush=True)
start = float(sys.stdin.readline())
for index in range(40):
    time.sleep(max(0, start + index * 0.05 - time.time()))
    try:
        store.create(f"{index}", sys.argv[2].encode() * 1000)
        print(index, flush=True)
    except FileExistsError:
        pass
"""


def test_of_two_processes_one_creates(server: S3Server) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, f"s3://{BUCKET}/race", letter],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )
        for letter in "ab"
    ]  # fmt: skip
    for process in processes:
        assert process.stdout
        assert process.stdout.readline() == "ready\n"
    outputs = []
    start = time.time() + 0.2
    for process in processes:
        assert process.stdin
        process.stdin.write(f"{start}\n")
        process.stdin.flush()
    for process in processes:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0
        outputs.append({int(line) for line in output.split()})
    assert outputs[0] | outputs[1] == set(range(40))
    assert not outputs[0] & outputs[1]
    for letter, won in zip("ab", outputs):
        assert all(server.get(f"race/{index}") == letter.encode() * 1000 for index in won)


class RenamingFileSystem(MemoryFileSystem):
    """Stands in for HDFS: a rename onto a file is refused, at once with the look whether there is one."""

    protocol = "renaming"
    store: dict[str, Any] = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012
    turn = threading.Lock()
    lose_answer = False

    def mv(self, path1: str, path2: str, **kwargs: Any) -> None:
        path1, path2 = self._strip_protocol(path1), self._strip_protocol(path2)
        with self.turn:
            if path2 in self.store:
                raise OSError(f"rename {path1} to {path2}: failed")
            self.store[path2] = self.store.pop(path1)
        if self.lose_answer:
            type(self).lose_answer = False
            raise ConnectionError("the answer was lost")

    @classmethod
    def _strip_protocol(cls, path: str) -> str:
        return "/" + path.removeprefix("renaming://").strip("/")


def test_creation_by_rename_never_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.register_implementation("renaming", RenamingFileSystem, clobber=True)
    monkeypatch.setattr("shards.writable.EXCLUSIVE", {"renaming"})
    store = open_store("renaming://host/folder")
    assert isinstance(store, RemoteStore)
    store.create("sub/x", b"first")
    with pytest.raises(FileExistsError):
        store.create("sub/x", b"second")
    store.create("sub/x", b"first")
    assert (store.read("sub/x"), store.names("sub")) == (b"first", ["x"])

    # both see that there is nothing yet, and then both rename
    exists, barrier = RenamingFileSystem.exists, threading.Barrier(2)

    def slow_exists(self: RenamingFileSystem, path: str, **kwargs: Any) -> bool:
        found = exists(self, path, **kwargs)
        if not found:
            barrier.wait(10)
        return found

    monkeypatch.setattr(RenamingFileSystem, "exists", slow_exists)

    def create(data: bytes) -> bool:
        try:
            store.create("race", data)
            return True
        except FileExistsError:
            return False

    with ThreadPoolExecutor(2) as pool:
        won = list(pool.map(create, [b"a", b"b"]))
    monkeypatch.setattr(RenamingFileSystem, "exists", exists)
    assert sorted(won) == [False, True]
    assert store.read("race") == (b"a" if won[0] else b"b")

    RenamingFileSystem.lose_answer = True
    store.create("answer", b"mine")
    assert store.names() == ["answer", "race"]  # and no temporary file
    assert Lease(store).acquire().number == 1
    with pytest.raises(RuntimeError, match="another driver"):
        Lease(store).acquire()
    for name in store.names("_lease"):
        store.delete(f"_lease/{name}")


def test_memory_filesystem_by_rename() -> None:
    store = open_store("memory://here/folder")
    assert isinstance(store, RemoteStore)
    store.create("x", b"first")
    with pytest.raises(FileExistsError):
        store.create("x", b"second")
    assert (store.read("x"), store.names(), store.size("x"), store.size("y")) == (b"first", ["x"], 5, None)
    assert store.open("x").read() == b"first"
    store.remove()
    assert store.names() == []


def test_a_part_that_the_store_alters_is_not_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Altering(MemoryFileSystem):
        protocol, alters = "altering", True

        def pipe_file(self, path: str, value: bytes, **kwargs: Any) -> None:
            super().pipe_file(path, value[:-1] + b"?" if "part" in path and self.alters else value, **kwargs)

    fsspec.register_implementation("altering", Altering, clobber=True)
    monkeypatch.setattr("shards.writable.EXCLUSIVE", {"altering"})
    store = open_store("altering://folder")
    part = pa.record_batch({"input_ids": pa.array([[1, 2]], pa.list_(pa.int32()))})
    with pytest.raises(OSError, match=r"part-00000.arrow: the store gives back other bytes than were written"):
        write_part(store, "part-00000.arrow", part.schema, {}, [part])
    assert store.names("_commits") == []  # so it does not exist for any reader
    Altering.alters = False
    record = write_part(store, "part-00000.arrow", part.schema, {}, [part])  # nor is it in the way of the next attempt
    assert hashlib.sha256(store.read("part-00000.arrow")).hexdigest() == record.sha256
    assert store.names("_commits") == ["part-00000.json"]


# --- a store that is away -------------------------------------------------------------------------------


def test_outage_while_it_scores(packed: str, model: Path, local: Path, server: S3Server, remit: Remit) -> None:
    outage = Outage(server, "out-score/_commits/", 2, 5)
    code, _, error = remit(*score_arguments(packed, model, f"s3://{BUCKET}/out-score"))
    outage.join()
    assert code == 0, error
    assert time.monotonic() - outage.began > 5
    assert 2 <= outage.reached < len(list((local / "scored").glob("*.arrow"))) - 2
    files = server.files("out-score")
    assert without_log(files) == without_log(contents(local / "scored"))
    log = [json.loads(line) for line in files["_score.jsonl"].splitlines()]
    assert (log[-1]["event"], log[-1]["retries"], log[-1]["engine_restarts"]) == ("done", 0, 0)


@pytest.mark.slow
def test_outage_while_it_packs(
    corpus: Path, tokenizer_folder: Path, local: Path, server: S3Server, remit: Remit
) -> None:
    outage = Outage(server, "out-pack/_commits/", 2, 10)
    code, _, error = remit(*pack_arguments(f"s3://{BUCKET}/corpus", tokenizer_folder, f"s3://{BUCKET}/out-pack"))
    outage.join()
    assert code == 0, error
    assert time.monotonic() - outage.began > 10
    assert 2 <= outage.reached < len(list((local / "packed").glob("*.arrow")))
    assert server.files("out-pack") == contents(local / "packed")


@pytest.mark.slow
def test_server_that_starts_late(
    corpus: Path, tokenizer_folder: Path, local: Path, server: S3Server, remit: Remit
) -> None:
    outage = Outage(server, "", 0, 3)
    while not outage.began:
        time.sleep(0.01)
    code, _, error = remit(*pack_arguments(f"s3://{BUCKET}/corpus", tokenizer_folder, f"s3://{BUCKET}/late"))
    outage.join()
    assert code == 0, error
    assert server.files("late") == contents(local / "packed")


def test_open_file_survives_an_outage_in_the_middle(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shards.remote.READ_BYTES", 1 << 16)
    data = random.Random(0).randbytes(1 << 20)
    server.put("big/file", data)
    file = RemoteStore(f"s3://{BUCKET}/big").open("file")
    assert file.size() == 1 << 20
    read = [file.read(100_000)]
    outage = Outage(server, "", 0, 1)
    while not outage.began:
        time.sleep(0.01)
    while piece := file.read(100_000):
        read.append(piece)
    outage.join()
    assert b"".join(read) == data
    file.seek(1000)
    assert (file.read(10), file.tell()) == (data[1000:1010], 1010)


@contextmanager
def listener(answers: bool) -> Iterator[tuple[str, list[float]]]:
    """An endpoint that takes connections and says nothing, or (answers) status 503; with the times of connections."""
    times: list[float] = []
    with socket.create_server(("127.0.0.1", 0)) as sock:
        kept = []

        def take() -> None:
            while True:
                try:
                    connection, _ = sock.accept()
                except OSError:
                    return
                times.append(time.monotonic())
                kept.append(connection)
                if answers:
                    connection.recv(1 << 16)
                    connection.sendall(b"HTTP/1.1 503 Slow Down\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
                    connection.close()

        threading.Thread(target=take, daemon=True).start()
        yield f"http://127.0.0.1:{sock.getsockname()[1]}", times
        sock.shutdown(socket.SHUT_RDWR)
    for connection in kept:
        connection.close()


def last_line(error: str, command: str) -> str:
    assert "Traceback" not in error
    line = error.strip().splitlines()[-1]
    assert line.startswith(f"remit {command}: error: ")
    assert "internal error" not in line
    return line


@pytest.mark.parametrize(
    ("command", "kind"), [("verify", "refuses"), ("verify", "silent"), ("verify", "overloaded"), ("pack", "silent")]
)
def test_store_that_never_answers(
    tokenizer_folder: Path, remit: Remit, monkeypatch: pytest.MonkeyPatch, command: str, kind: str
) -> None:
    patience = 6 if kind == "overloaded" else 2  # long enough to ask three times on a loaded machine
    monkeypatch.setenv("REMIT_STORE_RETRY_SECONDS", str(patience))
    with listener(kind == "overloaded") as (endpoint, times):
        if kind == "refuses":
            with socket.create_server(("127.0.0.1", 0)) as free:
                endpoint = f"http://127.0.0.1:{free.getsockname()[1]}"
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        fsspec.filesystem("s3").clear_instance_cache()
        began = time.monotonic()
        arguments: list[object] = ["verify", "--shards", f"s3://{kind}-{command}/shards"]
        if command == "pack":
            corpus = write_corpus(Path(tempfile.gettempdir()) / "here.jsonl", ["text"])
            arguments = pack_arguments(corpus, tokenizer_folder, f"s3://{kind}-{command}/shards")
        code, _, error = remit(*arguments)
        seconds = time.monotonic() - began
    fsspec.filesystem("s3").clear_instance_cache()
    assert code == 1
    assert f"s3://{kind}-{command}/shards" in last_line(error, command)
    assert f"has not answered for {patience} s" in last_line(error, command)
    assert seconds < 60  # multiplied by what botocore and s3fs repeat it was an hour
    if kind != "refuses":
        assert len(times) >= (1 if kind == "silent" else 3)
        assert len(times) < 25


@pytest.mark.parametrize(
    ("status", "code", "again"),
    [
        (301, "PermanentRedirect", False), (400, "InvalidArgument", False), (400, "InvalidBucketName", False),
        (403, "AccessDenied", False), (403, "403", False), (404, "NoSuchKey", False), (412, "PreconditionFailed", False),
        (501, "NotImplemented", False), (400, "RequestTimeout", True), (400, "IncompleteBody", True),
        (409, "ConditionalRequestConflict", True), (429, "TooManyRequests", True), (500, "InternalError", True),
        (503, "SlowDown", True), (503, "503", True),
    ],
)  # fmt: skip
def test_which_answers_are_asked_for_again(status: int, code: str, again: bool) -> None:
    response: Any = {"Error": {"Code": code, "Message": code}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error = translate_boto_error(ClientError(response, "PutObject"))
    assert may_pass(error) is again
    assert isinstance(plain(error, "s3://bucket/x"), OSError)
    assert isinstance(plain(error, "s3://bucket/x"), StoreSilent) is again


def test_requests_are_not_multiplied(monkeypatch: pytest.MonkeyPatch) -> None:
    """What botocore and s3fs repeat on their own would be waited for once per repetition of ours."""
    monkeypatch.setenv("REMIT_STORE_RETRY_SECONDS", "2")
    with listener(answers=False) as (endpoint, times):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        fsspec.filesystem("s3").clear_instance_cache()
        store = RemoteStore("s3://silent/folder")
        began = time.monotonic()
        with pytest.raises(StoreSilent):
            store.read("x")
        assert time.monotonic() - began < 60  # 2 s and what a loaded machine adds; multiplied it was an hour
        assert len(times) <= 2
    fsspec.filesystem("s3").clear_instance_cache()


def test_a_store_that_came_back_is_waited_for_again(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REMIT_STORE_RETRY_SECONDS", "4")
    store = RemoteStore(f"s3://{BUCKET}/back")
    server.tell("stop")
    with pytest.raises(StoreSilent):
        store.names()
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(StoreSilent):  # having waited once is enough
            store.names()
    assert time.monotonic() - began < 8  # and not three times four seconds
    server.tell("start")
    assert store.names() == []
    monkeypatch.setenv("REMIT_STORE_RETRY_SECONDS", "5")
    outage = Outage(server, "", 0, 2)
    while not outage.began:
        time.sleep(0.01)
    assert store.names() == []
    outage.join()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["score", "--shards", "s3://no-such-bucket/x"], "s3://no-such-bucket: there is no such bucket"),
        (["verify", "--shards", "s3://no-such-bucket/x"], "s3://no-such-bucket: there is no such bucket"),
        (["verify", "--shards", f"s3://{BUCKET}/nothing"], f"s3://{BUCKET}/nothing: has no _manifest.json"),
        (["pack", "--out", "s3://no-such-bucket/x"], "s3://no-such-bucket: there is no such bucket"),
        (["pack", "--corpus", "s3://no-such-bucket/x"], "s3://no-such-bucket: there is no such bucket"),
        (["pack", "--corpus", f"s3://{BUCKET}/nothing"], f"s3://{BUCKET}/nothing: no corpus file there"),
        (["pack", "--corpus", f"s3://{BUCKET}/nothing/*.jsonl"], "nothing/*.jsonl: no corpus file there"),
        (["pack", "--corpus", f"s3://{BUCKET}/corpus/README.md"], "README.md: not a corpus file"),
        (["inspect", "--shards", "gs://bucket/x"], "gs:// cannot be used here (Please install gcsfs"),
        (["inspect", "--shards", "nope://bucket/x"], "nope:// cannot be used here (Protocol not known: nope)"),
        (["inspect", "--shards", "hdfs://127.0.0.1:9/x"], "hdfs:// cannot be used here"),
        (["pack", "--out", "gs://bucket/x"], "pip install gcsfs"),
    ],
)
def test_one_clear_line(
    corpus: Path, tokenizer_folder: Path, model: Path, remit: Remit, tmp_path: Path, arguments: list[str], message: str
) -> None:
    command = arguments[0]
    if command == "pack":
        arguments = [*arguments, "--tokenizer", str(tokenizer_folder), "--seq-len", "32"]
        arguments += [] if "--corpus" in arguments else ["--corpus", str(corpus)]
        arguments += [] if "--out" in arguments else ["--out", str(tmp_path / "out")]
    if command == "score":
        arguments = [*arguments, "--model", str(model), "--out", str(tmp_path / "out")]
    began = time.monotonic()
    code, _, error = remit(*arguments)
    assert code == 1
    assert message in last_line(error, command)
    assert time.monotonic() - began < 120


def test_wrong_and_missing_credentials(remit: Remit, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    strict = S3Server(INITIAL_NO_AUTH_ACTION_COUNT="1")  # from the second request on, keys must be known
    try:
        monkeypatch.setenv("AWS_ENDPOINT_URL", strict.endpoint)
        for environment in ({}, {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": ""}):
            for name, value in environment.items():
                monkeypatch.setenv(name, value)
            monkeypatch.setenv("HOME", str(tmp_path))
            fsspec.filesystem("s3").clear_instance_cache()
            began = time.monotonic()
            code, _, error = remit("verify", "--shards", f"s3://{BUCKET}/x")
            assert code == 1
            line = last_line(error, "verify")
            assert f"s3://{BUCKET}/x/_manifest.json: the store cannot be used (" in line
            assert "check credentials" in line
            assert time.monotonic() - began < 120
    finally:
        strict.close()
        fsspec.filesystem("s3").clear_instance_cache()


# --- one driver, and damage -----------------------------------------------------------------------------


def test_second_driver_refuses_and_takes_over_from_the_dead(
    packed: str, model: Path, local: Path, server: S3Server, remit: Remit, cluster: Path
) -> None:
    out = f"s3://{BUCKET}/leased"
    arguments = score_arguments(packed, model, out)
    driver = subprocess.Popen(
        [sys.executable, "-m", "pipelines.cli", *map(str, arguments)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        env=os.environ | {
            "REMIT_FAKE_ENGINE": '{"seconds": 0.3}', "RAY_ADDRESS": ray.get_runtime_context().gcs_address,
        },
    )  # fmt: skip
    try:
        while not server.keys("leased/_commits/"):
            assert driver.poll() is None
            time.sleep(0.1)
        code, _, error = remit(*arguments)
        assert code == 1
        line = last_line(error, "score")
        assert f"{out}: another driver writes to this folder: host {socket.gethostname()}, pid {driver.pid}," in line
    finally:
        driver.send_signal(signal.SIGKILL)
        driver.wait()
    assert server.keys("leased/_lease/")
    done = len(server.keys("leased/_commits/"))
    code, _, error = remit(*arguments)
    assert code == 0, error
    assert "waiting up to" not in error  # as for a lease of another machine
    assert 1 <= done < len(list((local / "scored").glob("*.arrow")))
    assert without_log(server.files("leased")) == without_log(contents(local / "scored"))
    deadline = time.monotonic() + 60
    while temporary_files(cluster) and time.monotonic() < deadline:
        time.sleep(0.5)  # workers of the dead driver may end a little later than it
        open_store(out).clean()


def test_temporary_files_of_the_dead_are_removed(cluster: Path) -> None:
    store = RemoteStore(f"s3://{BUCKET}/clean")
    ours = store.temporary("part-00000.arrow")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    theirs = Path(str(ours).replace(f"-{os.getpid()}-", f"-{dead.pid}-"))
    assert theirs != ours
    for path in (ours, theirs):
        path.write_bytes(b"x")
    store.clean()
    assert (ours.exists(), theirs.exists()) == (True, False)
    ours.unlink()


@pytest.mark.parametrize("damage", ["bit", "cut", "gone"])
def test_damage_is_found(scored: str, local: Path, server: S3Server, remit: Remit, damage: str) -> None:
    folder = server.upload(local / "scored", f"damaged-{damage}")
    key = f"damaged-{damage}/part-00002.arrow"
    data = bytearray(server.get(key))
    data[len(data) // 2] ^= 1
    if damage == "gone":
        RemoteStore(folder).delete("part-00002.arrow")
    else:
        server.put(key, bytes(data) if damage == "bit" else bytes(data[:-100]))
    expected = {"bit": "sha256 .* differs from its commit record", "cut": "its commit record says", "gone": "missing"}
    code, output, error = remit("verify", "--shards", folder)
    assert code == 1
    assert re.search(rf"{folder}/part-00002.arrow: .*{expected[damage]}", error)
    assert "FAILED" in output
    reader = RowReader(ShardFolder(folder), "packed", "rl", 10**6)
    reader.rows(np.array([[0, 0]]))
    with pytest.raises(ValueError, match=expected[damage]):
        reader.rows(np.array([[2, 0]]))


# --- details of the store -------------------------------------------------------------------------------


def test_listings_are_never_stale(server: S3Server) -> None:
    store, other = RemoteStore(f"s3://{BUCKET}/listing"), RemoteStore(f"s3://{BUCKET}/listing")
    assert (store.names(), store.names("sub"), store.size("a")) == ([], [], None)
    server.put("listing/a", b"1")
    server.put("listing/sub/b", b"2")
    server.put("listing-2/c", b"3")
    assert (store.names(), store.names("sub"), store.size("a")) == (["a"], ["b"], 1)
    assert other.size("sub") is None  # a folder is no file
    server.put("listing/a", b"12")
    assert (store.size("a"), store.read("a"), store.sha256("a")[:8]) == (2, b"12", "6b51d431")
    other.delete("a")
    assert (store.names(), store.size("a")) == ([], None)
    store.delete("a")
    store.remove()
    assert server.keys("listing") == ["listing-2/c"]
    store.remove()


def test_names_stay_inside_the_folder() -> None:
    store = RemoteStore(f"s3://{BUCKET}/inside")
    for name in ("../other", "/abs", "a/../../b"):
        with pytest.raises(ValueError, match="is not a name inside this folder"):
            store.read(name)


def test_store_in_ray_workers_and_in_threads(server: S3Server) -> None:
    """A worker unpickles the store and uses it from several threads, in one task after another."""
    server.put("workers/x", b"1" * 1000)

    @ray.remote(num_cpus=0)
    class Worker:
        def __init__(self, store: RemoteStore) -> None:
            self.store = store

        def read(self) -> list[bytes]:
            with ThreadPoolExecutor(4) as pool:
                return list(pool.map(lambda _: self.store.read("x"), range(8)))

        def threads(self) -> int:
            return sum("fsspec" in thread.name for thread in threading.enumerate())

    worker: Any = Worker.remote(RemoteStore(f"s3://{BUCKET}/workers"))
    for _ in range(3):
        assert ray.get(worker.read.remote()) == [b"1" * 1000] * 8
    assert ray.get(worker.threads.remote()) <= 1
    ray.kill(worker)


@pytest.mark.slow
def test_large_objects_are_uploaded_in_pieces(server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 100 MiB s3fs uploads in parts; the condition stands on the request that ends it."""
    store = RemoteStore(f"s3://{BUCKET}/large")
    data = bytes(101 << 20)
    store.create("x", data)
    assert store.size("x") == len(data)
    with pytest.raises(FileExistsError):
        store.create("x", b"1" + data[1:])
    assert store.sha256("x") == hashlib.sha256(data).hexdigest()
    store.remove()


def test_pa_file_from_the_store(server: S3Server) -> None:
    """Arrow reads at random places of a file in the bucket."""
    table = pa.table({"x": np.arange(100_000)})
    sink = io.BytesIO()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=1000)
    server.put("arrow/x.arrow", sink.getvalue())
    with RemoteStore(f"s3://{BUCKET}/arrow").open("x.arrow") as file:
        reader = pa.ipc.open_file(file)
        assert reader.get_batch(77)["x"][3].as_py() == 77_003
        assert reader.read_all().equals(table)


def test_token_ids_are_read_as_in_a_folder(server: S3Server, tmp_path: Path, tokenizer_folder: Path) -> None:
    """By ranges of the files, which the requests show: no file is asked for as a whole, and a folder is listed once."""
    documents = [[5, 6, 0], [7, 0], [8] * 40 + [0]]
    folder = tmp_path / "ids"
    token_files.write_ds(folder / "ds", documents)
    token_files.write_megatron(folder / "megatron", [[ids] for ids in documents])
    token_files.write_raw_npy(folder / "x.npy", documents)
    (folder / "x.csv.gz").write_bytes(gzip.compress(b"0,3\n3,5\n5,46\n"))
    (folder / "model.bin").write_bytes(b"weights")
    url = server.upload(folder, "ids")
    reading = Reading(None, "auto", 521, 0)
    for below in ("", "/*/*", "/x.npy", "/ds/*.ds"):
        ours, theirs = find_corpus([f"{folder}{below}"]), find_corpus([f"{url}{below}"])
        assert [source.name for source in ours.sources] == [source.name for source in theirs.sources]
        assert ours.passed_over == theirs.passed_over
        for one, other in zip(ours.sources, theirs.sources):
            assert [name.rpartition("/")[2] for name in one.beside] == [
                name.rpartition("/")[2] for name in other.beside
            ]
            assert one.sha256_beside() == other.sha256_beside()
            blocks = [list(read_tokens(source, reading, 1 << 27)) for source in (one, other)]
            assert [block.ids.tolist() for block in blocks[0]] == [block.ids.tolist() for block in blocks[1]]
            assert [block.lengths.tolist() for block in blocks[0]] == [block.lengths.tolist() for block in blocks[1]]
    assert find_corpus([url]).passed_over == {".bin without .idx": 1}
    run_here(pack_arguments(folder, tokenizer_folder, tmp_path / "local"))
    run_here(pack_arguments(url, tokenizer_folder, f"s3://{BUCKET}/ids-packed"))
    assert without_log(server.files("ids-packed")) == without_log(contents(tmp_path / "local"))


def test_kept_fields_in_a_bucket(server: S3Server, tmp_path: Path, tokenizer_folder: Path, model: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        lines = "".join(
            json.dumps({"text": f"some text {number}", "url": f"{name}/{number}"}) + "\n" for number in range(9)
        )
        server.put(f"kept/{name}", lines.encode())
        (tmp_path / "kept").mkdir(exist_ok=True)
        (tmp_path / "kept" / name).write_text(lines)
    more = ["--keep-fields", "url"]
    run_here([*pack_arguments(tmp_path / "kept", tokenizer_folder, tmp_path / "local"), *more])
    run_here([*pack_arguments(f"s3://{BUCKET}/kept", tokenizer_folder, f"s3://{BUCKET}/kept-packed"), *more])
    assert server.files("kept-packed") == contents(tmp_path / "local")
    run_here(score_arguments(f"s3://{BUCKET}/kept-packed", model, f"s3://{BUCKET}/kept-scored"))
    scored = server.files("kept-scored")
    assert all(
        scored[name] == data for name, data in contents(tmp_path / "local").items() if name.startswith("_fields/")
    )
    assert not verify_folder(ShardFolder(f"s3://{BUCKET}/kept-scored")).problems
