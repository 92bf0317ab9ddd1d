"""What a folder was made of: an output that is an input, another one in the way, and how both are said."""

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import pytest

from pipelines.posttrain.settings import SftConfig
from scorer.config import PackConfig, ScoreConfig, SelectConfig
from shards.lease import Lease
from shards.output_folder import RUN, differences, refuse_other, require_empty, same_folder, writing, writing_run
from shards.store import open_store
from shards.writable import require_writable
from trainer.config import TrainConfig


def test_one_folder_under_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "a" / "shards"
    folder.mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (tmp_path / "way").symlink_to(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    for name in (f"{folder}/", f"file://{folder}", "a/shards", "./a/../a/shards/", "link", "way/shards", folder):
        assert same_folder(folder, name), name
        assert same_folder(name, str(folder)), name
    for name in ("a", "a/shards2", "s3://a/shards", "elsewhere"):
        assert not same_folder(folder, name), name
    assert not same_folder("org/model", "org/model")  # a name of the hub, with which an output may be called


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("s3://bucket/a", "s3://bucket/a/", True),
        ("s3://bucket/a", "s3://bucket//./a", True),
        ("s3://bucket/a", "s3a://bucket/a", True),
        ("gs://bucket/a", "gcs://bucket/a/", True),
        ("s3://bucket/a", "s3://bucket/a/b", False),
        ("s3://bucket/a", "gs://bucket/a", False),
        ("s3://bucket/a", "bucket/a", False),
    ],
)
def test_one_folder_of_a_store(one: str, other: str, same: bool) -> None:
    assert same_folder(one, other) is same
    assert same_folder(other, one) is same


@pytest.mark.parametrize("protocol", ["abfs", "az", "oss", "ftp", "webhdfs", "local", "simplecache::s3"])
def test_stores_without_an_exclusive_create_are_only_read(protocol: str, tmp_path: Path) -> None:
    """Two drivers could replace each other's files there. It is told before anything is asked of the store."""
    out, expected = f"{protocol}://place/out", f"{protocol}://place/out: {protocol}:// is only read"
    for make in (
        lambda: PackConfig(corpus=["c.jsonl"], tokenizer="t", out=out),
        lambda: ScoreConfig(shards="shards", model="m", name="rl", out=out),
        lambda: SelectConfig(shards="shards", out=out, teacher="a", small="b"),
        lambda: require_writable(out),
    ):
        with pytest.raises(ValueError, match=re.escape(expected)):
            make()
    for url in (
        "s3://b/x",
        "s3a://b/x",
        "gs://b/x",
        "gcs://b/x",
        "hdfs://h/x",
        "memory://x",
        str(tmp_path),
        "file:///x",
    ):
        require_writable(url)


def test_a_store_that_is_only_read_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").pipe_file("/kept/folder/x", b"there")
    monkeypatch.setattr("shards.writable.EXCLUSIVE", frozenset())
    store = open_store("memory://kept/folder")
    assert (store.read("x"), store.names(), store.size("x")) == (b"there", ["x"], 5)
    temporary = store.temporary("y")
    for write in (lambda: store.create("y", b""), lambda: store.replace("y", b""), lambda: Lease(store).acquire()):
        with pytest.raises(ValueError, match="memory:// is only read"):
            write()
    for write in (store.publish, store.put):
        temporary.write_bytes(b"z")
        with pytest.raises(ValueError, match="memory:// is only read"):
            write(temporary, "y")
        assert not temporary.exists()
    assert store.names() == ["x"]
    fsspec.filesystem("memory").rm("/kept", recursive=True)


@pytest.mark.parametrize("name", ["{shards}", "{shards}/", "file://{shards}", "{link}"])
def test_an_output_that_is_the_input_is_bad_usage(
    tmp_path: Path, remit: Callable[..., tuple[int, str, str]], name: str
) -> None:
    """Before anything is read: the folder is not even one of shards."""
    shards, link = tmp_path / "shards", tmp_path / "link"
    shards.mkdir()
    link.symlink_to(shards)
    out = name.format(shards=shards, link=link)
    began = time.monotonic()
    for command, option, more in (
        ("pack", "corpus", ["--tokenizer", "nowhere"]),
        ("score", "shards", ["--model", "nowhere"]),
        ("select", "shards", ["--teacher", "rl", "--small", "sft"]),
        ("train", "shards", ["--model", "nowhere"]),
        ("train", "eval-shards", ["--model", "nowhere", "--shards", "elsewhere"]),
        ("train", "model", ["--shards", "elsewhere"]),
    ):
        if command == "train" and out.startswith("file://"):
            continue  # what it writes to is a path
        code, _, error = remit(command, f"--{option}", shards, "--out", out, *more)
        assert code == 2
        shown = Path(out) if command == "train" else out
        line = f"--out {shown} is the folder of --{option}; remit {command} writes a new folder and leaves that one as"
        assert re.sub(r"\s", "", line) in re.sub(r"[\s│]", "", error)  # bad usage is in a box, which breaks words
    assert time.monotonic() - began < 10
    assert list(shards.iterdir()) == []


def test_an_output_in_a_bucket_that_is_the_input() -> None:
    for make in (
        lambda url: ScoreConfig(shards="s3://b/shards", model="m", out=url),
        lambda url: SelectConfig(shards="s3://b/shards", teacher="a", small="b", out=url),
        lambda url: PackConfig(corpus=["s3://b/x", "s3://b/shards"], tokenizer="t", out=url),
    ):
        with pytest.raises(ValueError, match="writes a new folder and leaves that one as it is"):
            make("s3a://b//shards/")
        make("s3://b/shards2")


def test_an_output_that_is_the_start_of_post_training(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is the folder of --model; post-training writes a new folder"):
        SftConfig(model=str(tmp_path), data=tmp_path / "data.jsonl", out=tmp_path / ".." / tmp_path.name)


HASHES = "0123456789abcdef" * 4, "fedcba9876543210" * 4


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ({"a": 1}, {"a": 1}, []),
        ({"a": 1}, {"a": 2}, [("a", "is 2 there, 1 asked for now")]),
        ({"a": {"b": "x"}}, {"a": {"b": "y"}}, [("a.b", "is 'y' there, 'x' asked for now")]),
        ({"a": HASHES[0]}, {"a": HASHES[1]}, [("a", "is fedcba987654.. there, 0123456789ab.. asked for now")]),
        ({"a": None}, {"a": True}, [("a", "is true there, not set now")]),
        ({"a": 0.5}, {}, [("a", "is not set there, 0.5 asked for now")]),
        ({"a": {"b": 1, "c": 2}}, {}, [("a", "is not set there, 2 fields asked for now")]),
        ({"a": [1, 2]}, {"a": [1]}, [("a", "has 1 entries there, 2 asked for now")]),
        ({"a": [{"b": 1}]}, {"a": [{"b": 2}], "c": 3}, [("a[0].b", "is 2 there, 1 asked for now"),
                                                      ("c", "is 3 there, not set now")]),
    ],
)  # fmt: skip
def test_differences(ours: dict[str, Any], theirs: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert differences(ours, theirs) == expected


def test_the_first_difference_and_the_names_of_some_others() -> None:
    ours, theirs = dict.fromkeys("abcdef", 1), dict.fromkeys("abcdef", 2)
    with pytest.raises(ValueError, match="holds") as refused:
        refuse_other("OUT", "run", ours, theirs, options={"a": "--a-word", "c": "--c"}, hints={"a": " (of late)"})
    assert str(refused.value) == (
        "OUT: holds another run: --a-word is 2 there, 1 asked for now (of late) (also: b, --c, d and 2 more); "
        "choose another --out"
    )


def test_what_is_in_the_way(tmp_path: Path) -> None:
    require_empty(tmp_path / "new", RUN, "a run")
    out = tmp_path / "out"
    for name in ("_lease", ".hidden", "lost+found"):
        (out / name).mkdir(parents=True)
    require_empty(out, RUN, "a run")
    (out / "folder").mkdir()
    with pytest.raises(ValueError, match=r"is not empty and not a run \(it has folder\); choose another --out"):
        require_empty(out, RUN, "a run")
    (out / RUN).write_text("{}")
    require_empty(out, RUN, "a run")


def test_one_writer(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with writing(out) as lease:
        (out / "_lease" / ".00000001.json.9-dead.tmp").touch()
        with pytest.raises(RuntimeError, match="another driver writes to this folder"), writing(out):
            raise AssertionError
        lease.check()
        (out / "kept").touch()
    assert [path.name for path in out.iterdir()] == ["kept"]
    with pytest.raises(KeyError), writing(out):
        raise KeyError
    with writing(out):
        pass


def test_a_finished_run_and_other_processes_take_no_lease(tmp_path: Path) -> None:
    held = Lease(tmp_path).acquire()
    with writing_run(tmp_path, "a run", first=False) as lease:
        assert lease is None
    (tmp_path / "model").mkdir()
    with writing_run(tmp_path, "a run") as lease:
        assert lease is None
    held.release()


def test_a_run_may_be_called_like_a_model_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    TrainConfig(shards="s", model="org/model", out=Path("org/model"))
