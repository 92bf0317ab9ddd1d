"""--mirror: a copy of the run in another folder or a bucket, from which another machine goes on bit for bit."""

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from processes import Command
from s3_server import BUCKET, REGION, S3Server
from test_distributed import VOLATILE, arguments, finish, launch, metrics_of

from shards.output_folder import writing
from shards.store import LocalStore, open_store
from shards.store_errors import StoreSilent
from shards.transfer import receive, send
from trainer import mirror as mirror_module
from trainer import mirror_fetch
from trainer.config import TrainConfig
from trainer.going_on import newest_step
from trainer.mirror_store import share
from trainer.train import train

SETTINGS: dict[str, Any] = {"max_steps": 6, "checkpoint_every": 2, "global_batch_size": 7, "dtype": "float32"}
MODEL = "model/model.safetensors"


def figures(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in metrics_of(out)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def part(files: dict[str, bytes], *folders: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith(tuple(f"{folder}/" for folder in folders))}


@pytest.fixture(scope="module")
def start(annotated: dict[str, Path], models: dict[str, Path]) -> Callable:
    """Train into `out` with SETTINGS and others, for so many steps; whether it is finished, and the notes."""

    def begin(
        out: Path, steps: int = 1000, at_step: dict[int, Callable] | None = None, **settings: Any
    ) -> tuple[bool, list[str]]:
        notes, asked = [], 0

        def should_stop() -> bool:  # it is asked once a step
            nonlocal asked
            asked += 1
            (at_step or {}).get(asked, lambda: None)()
            return asked >= steps

        config = TrainConfig((str(annotated["packed"]),), str(models["base"]), out, **(SETTINGS | settings))
        result = train(config, should_stop=should_stop, note=notes.append)
        return result.finished, notes

    return begin


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, start: Callable) -> Path:
    """A run without a mirror that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert start(out)[0]
    return out


def test_the_mirror_has_the_run_and_gives_it_back(tmp_path: Path, start: Callable, whole: Path) -> None:
    """A finished run: checkpoints, exports and records are there byte for byte; without OUT the models come back from there."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    settings = {"mirror": f"file://{mirror}", "export_every": 4, "average": "last:2"}
    assert start(out, **settings)[0]
    ours, theirs = contents(out), contents(mirror)
    assert figures(out) == figures(whole)
    folders = ("checkpoints", "model", "model-average", "exports", "tensorboard")
    assert part(theirs, *folders) == part(ours, *folders)
    assert {name.split("/")[1] for name in part(theirs, "checkpoints")} == {"step-000004", "step-000006"}
    records = {"run.json", "metrics.jsonl", "exported.json"}
    assert {name: theirs[name] for name in records} == {name: ours[name] for name in records}
    assert {name for name in theirs if "/" not in name} == {*records, "mirror.json"}
    assert not (mirror / "_lease").exists()

    shutil.rmtree(out)
    finished, notes = start(out, **settings)
    assert finished
    assert f"fetched from file://{mirror}: model, model-average" in notes
    again = contents(out)
    assert part(again, "model", "model-average") == part(ours, "model", "model-average")
    assert again["metrics.jsonl"] == ours["metrics.jsonl"]
    assert contents(mirror).keys() == theirs.keys()


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "index"])
def test_a_run_goes_on_from_the_newest_whole_checkpoint(
    tmp_path: Path, start: Callable, whole: Path, damage: str
) -> None:
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    assert not start(out, steps=5, mirror=str(mirror))[0]
    newest = mirror / "checkpoints" / "step-000005"
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-000004", "step-000005"]
    file = newest / ("checkpoint.json" if damage == "index" else "__0_0.distcp")
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:-100] if damage == "cut" else data[:200] + bytes([data[200] ^ 1]) + data[201:])
    if damage == "index":  # a copy that was cut off: no checkpoint at all, so there is nothing to say
        (mirror / "checkpoints" / "step-000009").mkdir()
        (mirror / "checkpoints" / "step-000009" / "__0_0.distcp").write_bytes(b"half")
    shutil.rmtree(out)
    finished, notes = start(out, mirror=str(mirror))
    assert finished
    assert "going on after step 4" in notes
    passed_over = [line for line in notes if "passed over a damaged checkpoint" in line]
    assert len(passed_over) == 1
    assert "step-000005" in passed_over[0]
    assert figures(out) == figures(whole)
    assert (out / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert part(contents(mirror), "checkpoints", "model") == part(contents(out), "checkpoints", "model")


def test_no_whole_checkpoint_is_no_beginning_anew(tmp_path: Path, start: Callable) -> None:
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    assert not start(out, steps=2, mirror=str(mirror))[0]
    (mirror / "checkpoints/step-000002/.metadata").write_bytes(b"")
    shutil.rmtree(out)
    with pytest.raises(
        ValueError, match=r"no checkpoint can be used: .*\.metadata: sha256 differs .*; delete that folder"
    ):
        start(out, mirror=str(mirror))
    assert not contents(out)


def test_a_mirror_that_comes_late_and_an_out_that_is_behind(
    tmp_path: Path, start: Callable, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint from before --mirror is copied at once; an OUT with an older one gets the mirror's, killed meanwhile or not."""

    def killed_here(*values: Any) -> None:
        raise KeyboardInterrupt

    out, mirror, stale = tmp_path / "out", tmp_path / "mirror", tmp_path / "stale"
    assert not start(out, steps=3)[0]
    shutil.copytree(out, stale)
    assert not start(out, steps=1, mirror=str(mirror))[0]
    assert {name.split("/")[1] for name in part(contents(mirror), "checkpoints")} == {"step-000003", "step-000004"}
    with monkeypatch.context() as killed:
        killed.setattr(mirror_fetch, "_fetch_records", killed_here)
        with pytest.raises(KeyboardInterrupt):
            start(stale, mirror=str(mirror))
    assert newest_step(stale) == 3
    finished, notes = start(stale, mirror=str(mirror))
    assert finished
    assert "going on after step 4" in notes
    assert figures(stale) == figures(whole)
    assert (stale / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert not [*stale.glob(".*"), *(stale / "checkpoints").glob(".*")]


def test_a_finished_run_goes_on_from_its_mirror(tmp_path: Path, start: Callable) -> None:
    """A longer one, whose first model stays as an export; and OUT as it was when it was finished is not taken for the run."""
    mirror, out, early = tmp_path / "mirror", tmp_path / "out", tmp_path / "early"
    settings = {"schedule": "constant", "warmup_steps": 0}
    assert start(tmp_path / "whole", max_steps=6, **settings)[0]
    assert start(out, max_steps=3, mirror=str(mirror), **settings)[0]
    first = (out / MODEL).read_bytes()
    shutil.copytree(mirror, tmp_path / "damaged")
    (tmp_path / "damaged/checkpoints/step-000003/.metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"is of a finished run of 3 steps, whose last checkpoint is damaged"):
        start(tmp_path / "new", max_steps=6, mirror=str(tmp_path / "damaged"), **settings)
    assert not contents(tmp_path / "new")
    assert (tmp_path / "damaged" / MODEL).read_bytes() == first
    out.rename(early)
    assert start(out, max_steps=6, mirror=str(mirror), **settings)[0]
    assert figures(out) == figures(tmp_path / "whole")
    assert (out / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes() == (mirror / MODEL).read_bytes()
    assert (mirror / "exports/step-000003/model.safetensors").read_bytes() == first
    before = contents(mirror)
    for steps in (3, 6):
        with pytest.raises(ValueError, match=r"is at step 6, and .*early is of a run that was finished before it"):
            start(early, max_steps=steps, mirror=str(mirror), **settings)
    assert contents(mirror) == before


def test_what_is_refused(tmp_path: Path, start: Callable, annotated: dict[str, Path]) -> None:
    """By name, and before anything is written."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    assert not start(out, steps=2, mirror=str(mirror))[0]
    shutil.copytree(mirror, tmp_path / "held")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "notes.txt").write_text("mine")
    for settings, message in (
        ({"mirror": str(mirror), "learning_rate": 1e-5}, "holds another run: --learning-rate is 0.0003 there"),
        ({"mirror": str(foreign)}, "is not empty and not the mirror of a run .*choose another --mirror"),
        ({"mirror": str(annotated["packed"])}, "is a shard folder and not the mirror of a run"),
        ({"mirror": "nosuch://bucket/run"}, "--mirror nosuch://bucket/run: nosuch:// cannot be used here"),
        ({"mirror": "hf://datasets/a/b/run"}, "the hub is only read"),
        ({"mirror": "s3://bucket"}, "is a whole bucket; name a folder in it"),
        ({"mirror": str(tmp_path / "new" / "sub")}, "one is in the other"),
        ({"mirror": " "}, "expected a folder, as s3://bucket/run"),
    ):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            start(tmp_path / "new", **settings)
        assert contents(tmp_path) == before
    with writing(tmp_path / "held") as lease_of_another:
        with pytest.raises(
            RuntimeError, match=r"held: another driver writes to this folder: .* choose another --mirror"
        ):
            start(out, mirror=str(tmp_path / "held"))
        lease_of_another.check()


def test_a_store_that_fails_stops_no_training(
    tmp_path: Path, start: Callable, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, the run is finished in OUT, the command fails in the end; the same command copies what is missing."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    upload = LocalStore.upload

    def fails(store: LocalStore, path: Path, name: str) -> None:
        if name.endswith((".distcp", ".safetensors")):
            raise StoreSilent(f"{store.where(name)}: the store has not answered")
        upload(store, path, name)

    monkeypatch.setattr(LocalStore, "upload", fails)
    notes: list[str] = []
    with pytest.raises(
        RuntimeError, match=r"lacks model, step 6 \(.*the store has not answered\); the run is finished and whole"
    ):
        notes += start(out, mirror=str(mirror))[1]
    assert figures(out) == figures(whole)
    assert (out / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert not (mirror / "model/config.json").exists()
    assert not list(mirror.rglob("checkpoint.json"))
    monkeypatch.setattr(LocalStore, "upload", upload)
    assert start(out, mirror=str(mirror))[0]
    assert part(contents(mirror), "model") == part(contents(out), "model")
    assert {name.split("/")[1] for name in part(contents(mirror), "checkpoints")} == {"step-000006"}


def test_a_slow_store_is_not_waited_for(
    tmp_path: Path, start: Callable, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints that come meanwhile are not copied, the one that is copied stays in OUT so long, the last one is copied; a
    signal waits for it within bounds."""
    out, mirror, go_on = tmp_path / "out", tmp_path / "mirror", threading.Event()
    upload = LocalStore.upload

    def slow(store: LocalStore, path: Path, name: str) -> None:
        if name.endswith(".distcp"):
            assert go_on.wait(60)
        upload(store, path, name)

    monkeypatch.setattr(LocalStore, "upload", slow)
    monkeypatch.setattr(mirror_module, "BUSY_SECONDS", 0.1)
    began = time.monotonic()
    finished, notes = start(
        out, steps=5, mirror=str(mirror), checkpoint_every=1, keep_checkpoints=1, timeout_seconds=1.0
    )
    assert not finished
    assert time.monotonic() - began < 30
    assert sum("the copy of step 1 is still going on" in line for line in notes) == 4
    assert f"{mirror}: lacks step 5 (there was no time for it)" in notes[-1]
    go_on.set()
    finished, notes = start(out, mirror=str(mirror), keep_checkpoints=1)
    assert finished
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000006"]
    assert part(contents(mirror), "checkpoints", "model") == part(contents(out), "checkpoints", "model")
    assert figures(out) == figures(whole)


@pytest.mark.parametrize(("written_by", "ranks"), [(3, 3), (3, 2), (12, 5), (1, 4)])
def test_each_file_is_copied_by_one_rank(written_by: int, ranks: int) -> None:
    files = {".metadata", *(f"__{rank}_{number}.distcp" for rank in range(written_by) for number in range(2))}
    index = {"files": dict.fromkeys(files, ""), "world_size": written_by}
    shares = [share(index, rank, ranks) for rank in range(ranks)]
    assert sorted(name for own in shares for name in own) == sorted(files)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    if written_by == ranks:  # its own
        assert all(name.startswith((f"__{rank}_", ".")) for rank, own in enumerate(shares) for name in own)


# --- processes and a server ----------------------------------------------------------------------------


def test_two_ranks_copy_and_fetch_their_shares(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], starts_processes: None
) -> None:
    """Sharded over two processes, which record who copied what; one of them fails once."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    options = (
        "--mirror",
        mirror,
        "--sharding",
        "full",
        "--schedule",
        "constant",
        "--warmup-steps",
        0,
        "--checkpoint-every",
        2,
    )
    first = f"""
import os
from shards.store import LocalStore
upload = LocalStore.upload
failed = []
def record(store, path, name):
    if name == "checkpoints/step-000004/__1_0.distcp" and not failed:
        failed.append(name)
        raise OSError("the cable was pulled")
    open({str(tmp_path / "uploads")!r}, "a").write(os.environ["RANK"] + " " + name + "\\n")
    upload(store, path, name)
LocalStore.upload = record
"""
    undisturbed = launch(tmp_path / "whole", annotated["packed"], models["base"], 2, *options[2:], "--max-steps", 6)
    words = (out, annotated["packed"], models["base"], 2, *options)
    output = finish(launch(*words, "--max-steps", 4, first=first))
    assert "rank 1 could not save its part: the cable was pulled); OUT has it" in output  # and it is tried once more
    uploads = (tmp_path / "uploads").read_text().splitlines()
    for step in (2, 4):
        assert {line for line in uploads if f"step-00000{step}" in line} == {
            f"{rank} checkpoints/step-00000{step}/{name}"
            for rank, name in ((0, "__0_0.distcp"), (1, "__1_0.distcp"), (0, ".metadata"), (0, "checkpoint.json"))
        }
    assert part(contents(mirror), "checkpoints", "model") == part(contents(out), "checkpoints", "model")
    assert not list((out / "checkpoints").glob(".*"))
    shutil.rmtree(out)
    output = finish(launch(*words, "--max-steps", 6))
    assert "going on after step 4" in output
    finish(undisturbed)
    assert figures(out) == figures(tmp_path / "whole")
    assert (out / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes() == (mirror / MODEL).read_bytes()


@pytest.fixture(scope="module")
def server(starts_processes: None) -> Iterator[S3Server]:
    server = S3Server()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    yield server
    os.environ.clear()
    os.environ.update(before)
    server.close()


def test_killed_in_an_upload_and_the_folder_lost(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], server: S3Server
) -> None:
    """kill -9 while step 6 goes to a bucket, then OUT is deleted: the same command goes on from step 4, bit for bit."""
    out, url = tmp_path / "out", f"s3://{BUCKET}/runs/a run é"
    more = ("--max-steps", 8, "--checkpoint-every", 2, "--export-every", 4)
    words = lambda folder, *options: arguments(folder, annotated["packed"], models["base"], (*more, *options))  # noqa: E731
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")} | {
        "OMP_NUM_THREADS": "1"
    }
    quiet = Command(tmp_path, *words(tmp_path / "whole"), private=True, **environment)
    first = """
import os, signal
from shards.remote import RemoteStore
upload = RemoteStore.upload
def die(store, path, name):
    if name == "checkpoints/step-000006/checkpoint.json":
        os.kill(os.getpid(), signal.SIGKILL)
    upload(store, path, name)
RemoteStore.upload = die
"""
    killed = Command(tmp_path, *words(out, "--mirror", url), private=True, first=first, **environment)
    assert killed.finish() == -signal.SIGKILL, killed.errors
    steps = {key.split("/")[3] for key in server.keys("runs/") if "/checkpoints/" in key}
    assert steps == {"step-000002", "step-000004", "step-000006"}
    shutil.rmtree(out)
    again = Command(tmp_path, *words(out, "--mirror", url), private=True, **environment)
    assert again.finish() == 0, again.errors
    assert quiet.finish() == 0, quiet.errors
    assert "going on after step 4" in again.errors
    assert figures(out) == figures(tmp_path / "whole")
    assert (out / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()
    there, here = server.files("runs/a run é"), contents(out)
    for name in ("checkpoints", "model", "exports/step-000004"):
        assert part(there, name) == part(here, name) or name == "exports/step-000004"
    assert (
        there["exports/step-000004/model.safetensors"]
        == contents(tmp_path / "whole")["exports/step-000004/model.safetensors"]
    )
    assert {name.split("/")[1] for name in part(there, "checkpoints")} == {"step-000006", "step-000008"}
    assert {"model", "exports/step-000004"} == {*json.loads(here["exported.json"])["models"]}
    assert not [name for name in there if "_lease" in name or ".tmp" in name]

    shutil.rmtree(out)
    last = Command(tmp_path, *words(out, "--mirror", url), private=True, **environment)
    assert last.finish() == 0, last.errors
    assert "nothing to do, trained before: 8 steps" in last.output.with_suffix(".out").read_text()
    assert (out / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes()


def test_an_outage_of_the_store(
    tmp_path: Path, start: Callable, whole: Path, server: S3Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is away from step 3 to the end: said, finished in OUT, and copied by the same command once it is back."""
    monkeypatch.setenv("REMIT_STORE_RETRY_SECONDS", "1")
    monkeypatch.setattr(mirror_module, "RELEASE_SECONDS", 0.5)
    out, settings = tmp_path / "out", {"mirror": f"s3://{BUCKET}/outage"}
    with pytest.raises(RuntimeError, match=r"s3://bucket/outage: lacks .*the store has not answered for 1 s"):
        start(out, at_step={3: lambda: server.tell("stop")}, **settings)
    assert figures(out) == figures(whole)
    server.tell("start")
    open_store(settings["mirror"]).remove("_lease")  # which could not be given back; its process is this one, and alive
    assert start(out, **settings)[0]
    assert part(server.files("outage"), "model") == part(contents(out), "model")
    assert "checkpoints/step-000006/checkpoint.json" in server.files("outage")


def test_large_files_go_and_come_in_pieces(tmp_path: Path, server: S3Server) -> None:
    """Files of several parts, one of a size that is no multiple of anything, an empty one, a missing one and a name that leads out."""
    sizes = {"large": (17 << 20) + 13, "part": 16 << 20, "empty": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    store = open_store(f"s3://{BUCKET}/pieces")
    send(store, {f"sub/{name}": tmp_path / name for name in sizes})
    assert server.files("pieces/sub") == {name: (tmp_path / name).read_bytes() for name in sizes}
    assert store.folders() == ["sub"]
    told: list[tuple[int, int]] = []
    assert (
        receive(store, "sub", dict.fromkeys(sizes, ""), tmp_path / "got", lambda *numbers: told.append(numbers)) is None
    )
    assert contents(tmp_path / "got") == {name: (tmp_path / name).read_bytes() for name in sizes}
    assert told[-1] == (sum(sizes.values()), sum(sizes.values()))
    for name in ("missing", "../large", "/etc/hostname"):
        assert "no such file" in (receive(store, "sub", {name: ""}, tmp_path / "got") or "")
    assert "sha256 differs" in (receive(store, "sub", {"large": "0" * 64}, tmp_path / "got") or "")
