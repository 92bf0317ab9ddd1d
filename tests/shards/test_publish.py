"""Filesystems without hard links, without fsync of folders: every command works there, also after kills, or says so."""

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from annotated import annotate, by_model
from faulty import Faulty
from processes import Command, content

from shards.lease import Lease
from shards.output_folder import writing
from shards.publish import fsync_folder, give_name
from shards.store import LocalStore

ROOT = Path(__file__).parents[2]
# what runs first in the commands, and what Python imports first in every process that they start, Ray's workers among them
SITE = """
import errno, os, stat

real = os.fsync

def link(*arguments, **options):
    raise OSError(getattr(errno, os.environ["NO_LINK"]), "no links here", *map(str, arguments[:1]))

def fsync(file):
    if stat.S_ISDIR(os.fstat(file if isinstance(file, int) else file.fileno()).st_mode):
        raise OSError(getattr(errno, os.environ["NO_SYNC"]), "no fsync of folders")
    real(file)

os.link, os.fsync = link, fsync
"""
NO_LINKS = [errno.EPERM, errno.ENOSYS, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.EINVAL, errno.EACCES]


@pytest.fixture
def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*arguments: object, **options: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


@pytest.fixture
def no_renames(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(temporary: Path, final: Path) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr("shards.publish._rename_without_replacing", rename)


@pytest.mark.parametrize("code", NO_LINKS)
def test_a_file_gets_its_name_and_never_replaces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def link(*arguments: object, **options: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", link)
    store = LocalStore(tmp_path)
    store.create("a", b"first")
    with pytest.raises(FileExistsError):
        store.create("a", b"second")
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileExistsError):
        store.create("folder", b"third")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "folder"]  # nothing temporary stays
    assert (tmp_path / "a").read_bytes() == b"first"


def test_errors_that_another_way_would_not_cure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for code in (errno.ENOSPC, errno.EROFS, errno.ENOENT):
        monkeypatch.setattr(os, "link", lambda *paths, code=code: (_ for _ in ()).throw(OSError(code, "no")))
        with pytest.raises(OSError, match="no") as error:
            give_name(tmp_path / "a", tmp_path / "b")
        assert error.value.errno == code
    monkeypatch.undo()
    with pytest.raises(FileNotFoundError):
        give_name(tmp_path / "a", tmp_path / "b")


def test_of_many_writers_one_gets_the_name(tmp_path: Path, no_links: None) -> None:
    store = LocalStore(tmp_path)
    for name in map(str, range(30)):
        won: list[int] = []
        barrier = threading.Barrier(8)

        def write(writer: int, name: str, won: list[int], barrier: threading.Barrier) -> None:
            barrier.wait()
            try:
                store.create(name, str(writer).encode() * 1000)
                won.append(writer)
            except FileExistsError:
                pass

        threads = [threading.Thread(target=write, args=(writer, name, won, barrier)) for writer in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert (tmp_path / name).read_bytes() == str(won[0]).encode() * 1000


def test_a_lease_without_hard_links(tmp_path: Path, no_links: None) -> None:
    held = Lease(tmp_path / "out").acquire()
    with pytest.raises(RuntimeError, match="another driver writes to this folder"):
        Lease(tmp_path / "out").acquire()
    held.release()
    Lease(tmp_path / "out").acquire().release()


Remit = Callable[..., tuple[int, str, str]]


def test_neither_links_nor_such_renames(
    tmp_path: Path,
    no_links: None,
    no_renames: None,
    remit: Remit,
    faulty: Faulty,
    packed: Path,
    models: dict[str, Path],
) -> None:
    """Refused in one line, before there is anything to lose."""
    out = tmp_path / "out"
    train = [
        "train",
        "--shards",
        packed,
        "--model",
        models["base"],
        "--objective",
        "ntp",
        "--max-steps",
        1,
        "--out",
        out,
    ]
    for command in (faulty.command("pack", out), faulty.command("score", out), train):
        code, _, error = remit(*command)
        assert (code, error.count("its filesystem has neither hard links")) == (1, 1), error
        assert "choose a folder on another filesystem" in error.splitlines()[-1]
        assert not list(tmp_path.rglob("*.tmp"))
        assert not out.exists()
    with pytest.raises(OSError, match="neither hard links"), writing(tmp_path / "deep" / "down"):
        raise AssertionError
    assert not (tmp_path / "deep" / "down").exists()


@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EPERM])
def test_folders_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fsync)
    fsync_folder(tmp_path)
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match=rf"Input/output error: '{tmp_path}'"):
        fsync_folder(tmp_path)


# --- the commands, as processes without links ------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command with a Ray of its own: run("pack", "--seq-len", 64) -> (exit code, stdout, stderr)."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SITE)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def of(*arguments: object, link: str = "EPERM", sync: str = "EINVAL", **more: str) -> tuple[int, str, str]:
        own = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "NO_LINK": link, "NO_SYNC": sync}
        command = Command(tmp_path, *arguments, private=True, first=SITE, **own, **more)
        return command.finish(), command.output.with_suffix(".out").read_text(), command.errors

    return of


def test_pack_and_score_without_links_also_after_kills(run: Run, tmp_path: Path, faulty: Faulty) -> None:
    out = tmp_path / "packed"
    for point in ("manifest.linked", "driver.committed"):
        code, _, error = run(*faulty.command("pack", out), REMIT_CRASH_AT=point)
        assert code == -signal.SIGKILL, error
    marker = tmp_path / "marker"
    code, _, error = run(
        *faulty.command("pack", out), link="ENOSYS", sync="ENOTSUP", REMIT_CRASH_AT=f"part.linked@{marker}"
    )
    assert (code, marker.exists()) == (0, True), error
    assert content(out) == faulty.undisturbed("pack")

    scored, marker = tmp_path / "scored", tmp_path / "marker-of-score"
    code, _, error = run(
        *faulty.command("score", scored), link="ENOTSUP", sync="EBADF", REMIT_CRASH_AT="driver.committed"
    )
    assert code == -signal.SIGKILL, error
    code, _, error = run(*faulty.command("score", scored), link="EXDEV", REMIT_CRASH_AT=f"record.linked@{marker}")
    assert (code, marker.exists()) == (0, True), error
    assert content(scored) == faulty.undisturbed("score")


def test_train_select_and_flywheel_without_links(
    run: Run, tmp_path: Path, small: Path, models: dict[str, Path], faulty: Faulty
) -> None:
    one = annotate(small, tmp_path / "one", by_model(models["reference"], "packed", 1 / 64), "packed", 1 / 64)
    both = annotate(one, tmp_path / "both", by_model(models["base"], "packed", 1 / 64), "packed", 1 / 64, name="small")
    kept = tmp_path / "kept"
    code, output, error = run("select", "--shards", both, "--teacher", "rl", "--small", "small", "--out", kept)
    assert (code, output[:8]) == (0, "selected"), error
    options = ["--max-steps", 4, "--checkpoint-every", 2, "--export-every", 2, "--global-batch-size", 8]
    train = ["train", "--shards", kept, "--model", models["base"], "--out", tmp_path / "run", *options]
    for expected in ("trained 4 steps", "nothing to do"):
        code, output, error = run(*train, link="ENOSYS")
        assert (code, output.startswith(expected)) == (0, True), error

    (tmp_path / "own.sh").write_text('cp -r "$REMIT_MODEL"/* "$REMIT_OUTPUT"\n')
    loop = {
        "base": str(faulty.model), "corpus": str(faulty.corpus), "out": str(tmp_path / "loop"), "seq_len": 48, "rounds": 0,
        "train": {"max_steps": 2, "global_batch_size": 4}, "posttrain": [{"command": ["bash", str(tmp_path / "own.sh")]}],
    }  # fmt: skip
    (tmp_path / "loop.yaml").write_text(yaml.safe_dump(loop))
    code, _, error = run("flywheel", "--config", tmp_path / "loop.yaml", link="ENOTSUP")
    assert code == 0, error
