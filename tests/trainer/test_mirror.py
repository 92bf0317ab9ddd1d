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

import fsspec
import pytest
from processes import Command
from s3_server import BUCKET, REGION, S3Server
from test_distributed import VOLATILE, arguments, finish, launch, metrics_of

from shards.lease import LeaseLost
from shards.output_folder import writing
from shards.store import LocalStore, open_store
from shards.store_errors import StoreSilent
from shards.transfer import receive, send
from trainer import mirror as mirror_module
from trainer.checkpoint_files import checksum
from trainer.config import TrainConfig
from trainer.mirror_store import require_mirror
from trainer.train import train

SETTINGS: dict[str, Any] = {"max_steps": 6, "checkpoint_every": 2, "global_batch_size": 7, "dtype": "float32"}
MODEL = "model/model.safetensors"
FOLDERS = ("checkpoints", "model", "model-average", "exports", "tensorboard")


PATIENT = """
from trainer.mirror import Mirror
copy = Mirror.copy
Mirror.copy = lambda self, *words: self._worker.wait(60) and copy(self, *words)
"""
COPY = mirror_module.Mirror.copy


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each save waits for the copy before it, so that none is left out."""
    monkeypatch.setattr(mirror_module.Mirror, "copy", lambda self, *words: self._worker.wait(60) and COPY(self, *words))


def figures(out: Path) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in VOLATILE} for line in metrics_of(out)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def steps_in(files: dict[str, bytes]) -> set[int]:
    """Of whole checkpoints."""
    return {int(name[-22:-16]) for name in files if name.endswith("/checkpoint.json")}


def part(files: dict[str, bytes], *folders: str) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name.startswith(tuple(f"{folder}/" for folder in folders))}


@pytest.fixture(scope="module")
def start(annotated: dict[str, Path], models: dict[str, Path]) -> Callable:
    """Train into `out` with SETTINGS and others, for so many steps; whether it is finished, and the notes."""

    def begin(
        out: Path,
        steps: int = 1000,
        at_step: dict[int, Callable] | None = None,
        notes: list[str] | None = None,
        **settings: Any,
    ) -> tuple[bool, list[str]]:
        notes, asked = [] if notes is None else notes, 0

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
    """A finished run is there byte for byte; a lost OUT gets its last checkpoint from there, and exports it again."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    settings = {"mirror": f"file://{mirror}", "export_every": 4, "average": "last:2"}
    assert start(out, **settings)[0]
    ours, theirs = contents(out), contents(mirror)
    assert figures(out) == figures(whole)
    assert part(theirs, *FOLDERS) == part(ours, *FOLDERS)
    assert steps_in(theirs) == {4, 6}
    records = {"run.json", "metrics.jsonl", "exported.json"}
    assert {name: data for name, data in theirs.items() if "/" not in name} == {name: ours[name] for name in records}
    assert b"mirror" not in ours["run.json"]

    shutil.rmtree(out)
    finished, notes = start(out, **settings)
    assert finished
    assert f"fetched from file://{mirror}: checkpoints/step-000006" in notes
    again = contents(out)
    assert part(again, "model", "model-average") == part(ours, "model", "model-average")
    assert again["metrics.jsonl"] == ours["metrics.jsonl"]
    assert part(contents(mirror), *FOLDERS[:-1]) == part(theirs, *FOLDERS[:-1])
    assert not [*out.glob(".*"), *mirror.glob("_*")]


@pytest.mark.parametrize("damage", ["flip", "gone", "index"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, start: Callable, whole: Path, damage: str) -> None:
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    assert not start(out, steps=5, mirror=str(mirror))[0]
    assert steps_in(contents(mirror)) == {4, 5}
    file = mirror / "checkpoints/step-000005" / ("checkpoint.json" if damage == "index" else "__0_0.distcp")
    data = file.read_bytes()
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(data[:200] + bytes([data[200] ^ 1]) + data[201:])
    shutil.rmtree(out)
    finished, notes = start(out, steps=1, mirror=str(mirror))
    assert not finished
    assert part(contents(mirror), "checkpoints") == part(contents(out), "checkpoints")  # step 5 of both is whole again
    assert start(out, mirror=str(mirror))[0]
    assert "going on after step 4" in notes
    assert [line for line in notes if "passed over a damaged checkpoint" in line and "step-000005" in line]
    assert figures(out) == figures(whole)
    assert (out / MODEL).read_bytes() == (whole / MODEL).read_bytes() == (mirror / MODEL).read_bytes()
    assert part(contents(out), "checkpoints").items() <= contents(mirror).items()


def test_no_usable_checkpoint_is_no_beginning_anew(tmp_path: Path, start: Callable) -> None:
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    assert not start(out, steps=2, mirror=str(mirror))[0]
    (mirror / "checkpoints/step-000002/.metadata").write_bytes(b"")
    shutil.rmtree(out)
    with pytest.raises(
        ValueError, match=r"no checkpoint can be used: .*\.metadata: sha256 differs .*; delete them there"
    ):
        start(out, mirror=str(mirror))
    assert not contents(out)
    assert start(out, max_steps=1, mirror=str(tmp_path / "models"), checkpoint_every=0)[0]
    shutil.rmtree(out)
    with pytest.raises(ValueError, match=r"has the model of a finished run and no checkpoint to go on from"):
        start(out, max_steps=1, mirror=str(tmp_path / "models"), checkpoint_every=0)


def test_an_out_that_is_behind_is_refused_and_nothing_is_touched(tmp_path: Path, start: Callable) -> None:
    """Older than the mirror, damaged at its newest step, finished before the mirror went on, or another run: none may cost
    what the mirror has."""
    flat = {"schedule": "constant", "warmup_steps": 0}
    out, mirror, url = tmp_path / "out", tmp_path / "mirror", {"mirror": str(tmp_path / "mirror")}
    assert not start(out, steps=2, max_steps=4, export_every=1, **flat)[0]
    shutil.copytree(out, tmp_path / "old")
    assert not start(out, steps=1, max_steps=4, **url, **flat)[0]  # given late, it gets what is there
    assert steps_in(contents(mirror)) == {2, 3}
    assert part(contents(mirror), "exports") == part(contents(out), "exports")
    assert start(out, max_steps=4, **url, **flat)[0]
    shutil.copytree(out, tmp_path / "finished")
    assert start(out, max_steps=6, **url, **flat)[0]
    assert steps_in(contents(mirror)) == {4, 6}
    assert part(contents(mirror), "exports/step-000004") == part(contents(out), "exports/step-000004")
    assert (mirror / MODEL).read_bytes() == (out / MODEL).read_bytes()
    shutil.copytree(out, tmp_path / "damaged")
    shutil.rmtree(tmp_path / "damaged/model")
    (tmp_path / "damaged/checkpoints/step-000006/.metadata").write_bytes(b"")
    assert not start(tmp_path / "other", steps=7, max_steps=8, **flat)[0]
    before = contents(tmp_path)
    for folder, steps, message in (
        ("old", 6, "has a checkpoint of step 6, and the run in .*old is at step 2; an empty or another --out fetches"),
        ("finished", 4, "has a checkpoint of step 6, and the run in .*finished is at step 4"),
        ("finished", 6, "has a checkpoint of step 6, and the run in .*finished is at step 4"),
        ("damaged", 6, "has a checkpoint of step 6, and the run in .*damaged is at step 4"),
        ("other", 8, "holds another run: max_steps is 4 there, 8 asked for now; choose another --mirror"),
    ):
        with pytest.raises(ValueError, match=message):
            start(tmp_path / folder, max_steps=steps, **url, **flat)
    assert contents(tmp_path) == before


def test_a_longer_run_has_no_model_there_until_it_is_finished(tmp_path: Path, start: Callable) -> None:
    flat, mirror = {"schedule": "constant", "warmup_steps": 0}, tmp_path / "mirror"
    assert start(tmp_path / "out", max_steps=2, mirror=str(mirror), **flat)[0]
    first = (mirror / MODEL).read_bytes()
    shutil.rmtree(tmp_path / "out")
    assert not start(tmp_path / "out", steps=1, max_steps=4, mirror=str(mirror), **flat)[0]
    assert (mirror / MODEL).read_bytes() == first
    assert not (mirror / "model/config.json").exists()
    assert start(tmp_path / "out", max_steps=4, mirror=str(mirror), **flat)[0]
    assert part(contents(mirror), "model") == part(contents(tmp_path / "out"), "model")


def test_what_is_not_the_runs_own_stays(tmp_path: Path, start: Callable) -> None:
    """Folders of others and checkpoints that nothing proves to be the run's; of a step that is copied again what was cut off goes."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    assert not start(out, steps=2, mirror=str(mirror))[0]
    index = json.loads((mirror / "checkpoints/step-000002/checkpoint.json").read_text())
    del index["checksum"]
    index["settings"] = "0" * 64
    theirs = {
        "checkpoints/step-000001/checkpoint.json": json.dumps(index | {"checksum": checksum(index)}).encode(),
        "checkpoints/step-000000/weights": b"of another", "checkpoints/step-000003/half": b"x", "checkpoints/best/a": b"1",
        "notes/a/b": b"mine", "model-old/config.json": b"{}", "exports/step-000009/config.json": b"{}",
    }  # fmt: skip
    for name, data in (theirs | {"checkpoints/step-000004/__7_0.distcp": b"cut off"}).items():
        (mirror / name).parent.mkdir(parents=True, exist_ok=True)
        (mirror / name).write_bytes(data)
    assert start(out, mirror=str(mirror), keep_checkpoints=1)[0]
    there = contents(mirror)
    assert theirs.items() <= there.items()
    assert steps_in(there) == {1, 6}
    assert not (mirror / "checkpoints/step-000002").exists()
    assert not (mirror / "checkpoints/step-000004").exists()


def test_what_is_refused(tmp_path: Path, start: Callable, annotated: dict[str, Path]) -> None:
    """By name, and before anything is written."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    assert not start(out, steps=2, mirror=str(mirror))[0]
    for name in ("foreign/notes.txt", "deep/checkpoints/step-000001/weights", "hidden/.git/config"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("mine")
    other = "is not empty and not the mirror of a run .it has {}.; choose another --mirror"
    for settings, message in (
        ({"mirror": str(mirror), "learning_rate": 1e-5}, "holds another run: --learning-rate is 0.0003 there"),
        ({"mirror": str(tmp_path / "foreign")}, other.format("notes.txt")),
        ({"mirror": str(tmp_path / "deep")}, other.format("checkpoints")),
        ({"mirror": str(tmp_path / "hidden")}, other.format(".git")),
        ({"mirror": str(annotated["packed"])}, other.format("_manifest.json")),
        ({"mirror": "nosuch://bucket/run"}, "nosuch://bucket/run: nosuch:// is only read"),
        ({"mirror": "hf://datasets/a/b/run"}, "the hub is only read"),
        ({"mirror": "s3://bucket"}, "is a whole bucket; name a folder in it"),
        ({"mirror": str(tmp_path / "new" / "sub")}, "one is in the other"),
        ({"mirror": " "}, "expected a folder, as s3://bucket/run"),
    ):
        before = contents(tmp_path)
        with pytest.raises(ValueError, match=message):
            start(tmp_path / "new", **settings)
        assert contents(tmp_path) == before
    with writing(mirror) as lease_of_another:
        with pytest.raises(RuntimeError, match=r"another driver writes to this folder: .* choose another --mirror"):
            start(out, mirror=str(mirror))
        lease_of_another.check()


def test_a_store_that_fails_stops_no_training(
    tmp_path: Path, start: Callable, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said, the run is finished in OUT, the command fails in the end; the same command copies what is missing."""
    out, mirror, put, notes = tmp_path / "out", tmp_path / "mirror", LocalStore.put, list[str]()

    def fails(store: LocalStore, temporary: Path, name: str) -> None:
        if name.endswith((".distcp", ".safetensors")) and "step-000002" not in name:
            raise StoreSilent(f"{store.where(name)}: the store has not answered")
        put(store, temporary, name)

    with monkeypatch.context() as patch:
        patch.setattr(LocalStore, "put", fails)
        with pytest.raises(
            RuntimeError, match=r"lacks step 6, model \(.*has not answered\); the run is finished and whole"
        ):
            start(out, mirror=str(mirror), notes=notes)
    assert [line for line in notes if "step 6 could not be copied there" in line and "the training goes on" in line]
    assert figures(out) == figures(whole)
    assert (out / MODEL).read_bytes() == (whole / MODEL).read_bytes()
    assert not (mirror / "model/config.json").exists()
    assert steps_in(contents(mirror)) == {2}
    assert start(out, mirror=str(mirror))[0]
    assert part(contents(mirror), "model") == part(contents(out), "model")
    assert steps_in(contents(mirror)) == {2, 6}


def test_a_slow_store_is_not_waited_for(
    tmp_path: Path, start: Callable, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Checkpoints that come meanwhile are left out, the one that is copied stays in OUT so long, a signal waits within bounds;
    an export that its user deletes meanwhile is no failure."""
    out, mirror, go_on, put = tmp_path / "out", tmp_path / "mirror", threading.Event(), LocalStore.put

    def slow(store: LocalStore, temporary: Path, name: str) -> None:
        assert not name.endswith(".distcp") or go_on.wait(60)
        put(store, temporary, name)

    monkeypatch.setattr(LocalStore, "put", slow)
    monkeypatch.setattr(mirror_module.Mirror, "copy", COPY)
    began = time.monotonic()
    settings = {"mirror": str(mirror), "checkpoint_every": 1, "keep_checkpoints": 1}
    finished, notes = start(out, steps=3, timeout_seconds=1.0, **settings)
    assert not finished
    assert time.monotonic() - began < 30
    assert f"{mirror}: step 2 is not copied there, since the copy before it is still going on" in notes
    assert f"{mirror}: lacks step 3 (there was no time for it)" in notes[-1]
    at_step = {2: lambda: shutil.rmtree(out / "exports/step-000004"), 3: go_on.set}
    finished, notes = start(out, at_step=at_step, export_every=4, **settings)
    assert finished
    assert f"{mirror}: exports/step-000004 is no longer in {out}, and is not copied there" in notes
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000006"]
    assert part(contents(out), "checkpoints", "model").items() <= contents(mirror).items()
    assert steps_in(contents(mirror)) == {6}
    assert not (mirror / "exports").exists()
    assert figures(out) == figures(whole)


# --- processes and a server ----------------------------------------------------------------------------


def test_two_ranks_copy_and_fetch_their_shares(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], starts_processes: None
) -> None:
    """Sharded over two processes, which record who copied what; one of them fails once, which the next copy does not feel."""
    out, mirror = tmp_path / "out", tmp_path / "mirror"
    options = ("--sharding", "full", "--schedule", "constant", "--warmup-steps", 0, "--checkpoint-every", 2)
    first = f"""
import os
from shards.store import LocalStore
put = LocalStore.put
def record(store, temporary, name):
    if name == "checkpoints/step-000002/__0_0.distcp":
        raise OSError("the cable was pulled")
    open({str(tmp_path / "uploads")!r}, "a").write(os.environ["RANK"] + " " + name + "\\n")
    put(store, temporary, name)
LocalStore.put = record
"""
    undisturbed = launch(tmp_path / "whole", annotated["packed"], models["base"], 2, *options, "--max-steps", 6)
    words = (out, annotated["packed"], models["base"], 2, *options, "--mirror", mirror)
    output = finish(launch(*words, "--max-steps", 4, first=PATIENT + first))
    assert "step 2 could not be copied there" in output
    assert "could not copy its part: the cable was pulled" in output
    uploads = (tmp_path / "uploads").read_text().splitlines()
    names = [".metadata", "__0_0.distcp", "__1_0.distcp"]
    assert {line for line in uploads if "step-000004" in line} == {
        f"{rank} checkpoints/step-000004/{name}" for rank, name in zip((0, 1, 0, 0), (*names, "checkpoint.json"))
    }
    assert steps_in(contents(mirror)) == {4}
    assert part(contents(mirror), "model", "checkpoints/step-000004") == part(
        contents(out), "model", "checkpoints/step-000004"
    )
    assert not list(out.glob(".*"))
    shutil.rmtree(out)
    output = finish(launch(*words, "--max-steps", 6))
    assert "going on after step 4" in output
    finish(undisturbed)
    assert figures(out) == figures(tmp_path / "whole")
    assert (out / MODEL).read_bytes() == (tmp_path / "whole" / MODEL).read_bytes() == (mirror / MODEL).read_bytes()


@pytest.fixture(scope="module")
def server(starts_processes: None) -> Iterator[S3Server]:
    fsspec.filesystem("s3").clear_instance_cache()  # of tests before this one, with their servers
    server = S3Server()
    before = dict(os.environ)
    os.environ |= {
        "AWS_ENDPOINT_URL": server.endpoint, "AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "y",
        "AWS_DEFAULT_REGION": REGION, "AWS_EC2_METADATA_DISABLED": "true",
    }  # fmt: skip
    yield server
    fsspec.filesystem("s3").clear_instance_cache()
    os.environ.clear()
    os.environ.update(before)
    server.close()


def test_killed_in_an_upload_and_in_a_fetch(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], server: S3Server
) -> None:
    """kill -9 while step 6 goes to a bucket, OUT is deleted, kill -9 twice while an empty OUT fetches: the same command goes on
    from step 4, bit for bit."""
    out, url = tmp_path / "out", f"s3://{BUCKET}/runs/a run é"
    server.put("runs/a run é/", b"")  # as the console of a store makes a folder
    more = ("--max-steps", 8, "--checkpoint-every", 2, "--export-every", 4)
    environment = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}

    def command(folder: Path, *options: object, first: str = "") -> Command:
        words = arguments(folder, annotated["packed"], models["base"], (*more, *options))
        first = f"{PATIENT}\n{first}"
        return Command(tmp_path, *words, private=True, first=first, OMP_NUM_THREADS="1", **environment)

    quiet = command(tmp_path / "whole")
    for where, name in (
        ("shards.remote.RemoteStore.upload", "checkpoints/step-000006/checkpoint.json"),
        ("shards.remote.RemoteStore.fill", "checkpoints/step-000004/__0_0.distcp"),
        ("os.rename", "checkpoints/step-000004"),
    ):
        owner, last = where.rsplit(".", 1)
        first = f"""
import os, signal, shards.remote
do = {where}
def die(*words):
    if any(str(word).endswith({name!r}) for word in words):
        os.kill(os.getpid(), signal.SIGKILL)
    return do(*words)
{owner}.{last} = die
"""
        killed = command(out, "--mirror", url, first=first)
        assert killed.finish() == -signal.SIGKILL, killed.errors
        if last == "upload":
            shutil.rmtree(out)
        else:
            assert list(out.glob(".mirror-fetch.*"))
    again = command(out, "--mirror", url)
    assert again.finish() == 0, again.errors
    assert quiet.finish() == 0, quiet.errors
    assert "going on after step 4" in again.errors
    assert figures(out) == figures(tmp_path / "whole")
    there, here = server.files("runs/a run é"), contents(out)
    undisturbed = contents(tmp_path / "whole")
    assert here[MODEL] == undisturbed[MODEL]
    assert part(there, "checkpoints", "model") == part(here, "checkpoints", "model")
    assert part(there, "exports/step-000004") == part(undisturbed, "exports/step-000004")
    assert not [name for name in there if "_lease" in name or ".tmp" in name]
    assert not list(out.glob(".*"))


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
    """Files of several parts, one of a size that is no multiple of anything, an empty one, a missing one, a name that leads out."""
    sizes = {"large": (17 << 20) + 13, "part": 16 << 20, "empty": 0}
    for name, size in sizes.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    store = open_store(f"s3://{BUCKET}/pieces")
    send(store, {f"sub/{name}": tmp_path / name for name in sizes})
    assert server.files("pieces/sub") == {name: (tmp_path / name).read_bytes() for name in sizes}
    assert (store.folders(), store.folders("sub"), store.folders("none")) == (["sub"], [], [])
    with pytest.raises(ValueError, match=r"pieces: is not empty and not the mirror of a run .it has sub"):
        require_mirror(store)
    told: list[tuple[int, int]] = []
    assert receive(store, "sub", dict.fromkeys(sizes, ""), tmp_path / "got", lambda *now: told.append(now)) is None
    assert contents(tmp_path / "got") == {name: (tmp_path / name).read_bytes() for name in sizes}
    assert told[-1] == (sum(sizes.values()), sum(sizes.values()))
    for name in ("missing", "../large", "/etc/hostname"):
        assert "no such file" in (receive(store, "sub", {name: ""}, tmp_path / "got") or "")
    assert "sha256 differs" in (receive(store, "sub", {"large": "0" * 64}, tmp_path / "got") or "")

    def may_not() -> None:
        raise LeaseLost("taken over")

    for refused in (lambda: send(store, {"new": tmp_path / "part"}, may_not), lambda: store.remove("sub", may_not)):
        with pytest.raises(LeaseLost):  # at once, and nothing has happened
            refused()
    assert server.keys("pieces/") == [f"pieces/sub/{name}" for name in sorted(sizes)]
