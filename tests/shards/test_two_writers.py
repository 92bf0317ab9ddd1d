"""Two processes write one part at once, each with bytes of its own, as GPUs give them: every order of their steps.

A step is one request to a store. What a writer does next depends on the answers that it has had so far, and on nothing else;
so all orders are walked through by running `write_part` anew with the answers up to a step, and no order is left out.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from damage import rows, write_folder

import shards.part
import shards.remote
from shards import row_schema, write_part
from shards.part import CommittedAlready
from shards.record import read_record, record_name
from shards.remote import RemoteStore
from shards.store import Store

PART = "part-00000.arrow"
Files = tuple[tuple[str, bytes], ...]
"""Names and contents, sorted."""
Step = tuple[Any, ...]
"""What is asked of the store: a verb, a name, the bytes to write."""
History = tuple[Any, ...]
"""Answers so far: values, or classes of exceptions."""


class Pause(BaseException):
    """The writer wants a step that has no answer yet."""


def answer(files: Files, step: Step) -> tuple[Files, Any]:
    """What a store does: names are created once, and everything is done at once."""
    there, (verb, name, *data) = dict(files), step
    if verb == "size":
        return files, len(there[name]) if name in there else None
    if verb == "create":
        if name in there:
            return files, FileExistsError
        there[name] = data[0]
    elif verb == "delete":
        there.pop(name, None)
    elif name not in there:
        return files, FileNotFoundError
    else:
        return files, there[name] if verb == "read" else hashlib.md5(there[name]).hexdigest()
    return tuple(sorted(there.items())), None


class Replay:
    """Answers from a history; the first question beyond it is kept and ends the run."""

    def __init__(self, history: History) -> None:
        self._answers = iter(history)
        self.asked: Step | None = None

    def ask(self, *step: Any) -> Any:
        found = next(self._answers, Pause)
        if found is Pause or self.asked is not None:
            self.asked = self.asked or step
            raise Pause
        if isinstance(found, type):
            raise found(step[1])
        return found


class Folder(Store):
    """A local folder: linking and unlinking are one step each, nothing is read back."""

    def __init__(self, replay: Replay, temporary: Path) -> None:
        self._ask, self._temporary, self.url = replay.ask, temporary, "folder"

    def size(self, name: str) -> int | None:
        return self._ask("size", name)

    def read(self, name: str) -> bytes:
        return self._ask("read", name)

    def buffer(self, name: str) -> pa.Buffer:
        return pa.py_buffer(self.read(name))

    def create(self, name: str, data: bytes, kind: str = "") -> None:
        self._ask("create", name, data)

    def temporary(self, name: str) -> Path:
        return self._temporary

    def publish(self, temporary: Path, name: str, kind: str = "part") -> str:
        data = temporary.read_bytes()
        temporary.unlink()
        self._ask("create", name, data)
        return ""

    def delete(self, name: str, may_delete: Callable[[], None] = lambda: None) -> None:
        may_delete()
        self._ask("delete", name)


class Bucket:
    """As much of s3fs as a RemoteStore needs: each request is a step."""

    def __init__(self, replay: Replay) -> None:
        self._ask = replay.ask

    def info(self, path: str, **options: Any) -> dict[str, Any]:
        size = self._ask("size", path)
        if size is None:
            raise FileNotFoundError(path)
        return {"type": "file", "size": size}

    def cat_file(self, path: str) -> bytes:
        return self._ask("read", path)

    def ukey(self, path: str) -> str:
        return self._ask("version", path)

    def pipe_file(self, path: str, data: bytes, mode: str) -> None:
        assert mode == "create"
        self._ask("create", path, data)

    def rm_file(self, path: str) -> None:
        self._ask("delete", path)


def bucket_store(replay: Replay, temporary: Path) -> RemoteStore:
    store = object.__new__(RemoteStore)
    store.url, store._protocol, store._root, store._fs = "s3://bucket", "s3", "", Bucket(replay)
    store.path = lambda name: name  # type: ignore[method-assign]
    return store


class Writers:
    """write_part by name of the writer; its bytes have the name in them."""

    def __init__(self, kind: str, tmp_path: Path) -> None:
        self._kind, self._temporary = kind, tmp_path / "temporary"
        self._known: dict[tuple[str, History], tuple[Step | None, Any]] = {}

    def next(self, name: str, history: History) -> tuple[Step | None, Any]:
        """The step that the writer takes after these answers; None and its end where it takes none."""
        if (name, history) not in self._known:
            self._known[name, history] = self._run(name, history)
        return self._known[name, history]

    def _run(self, name: str, history: History) -> tuple[Step | None, Any]:
        replay = Replay(history)
        store = Folder(replay, self._temporary) if self._kind == "folder" else bucket_store(replay, self._temporary)
        try:
            return None, write(store, name)
        except Pause:
            return replay.asked, None
        except (CommittedAlready, OSError) as error:
            assert replay.asked is None
            return None, error


def write(store: Store | Path, name: str) -> Any:
    row = {"input_ids": [5, 6, 0], "doc_lengths": [3], "doc_ids": [0], "source": 0}
    batch = pa.RecordBatch.from_pylist([row], schema=row_schema())
    return write_part(store, PART, row_schema(), {"written by": name * 3}, [batch])


def fits(files: Files) -> bool:
    """Whether there is no record, or one of the bytes that are there."""
    there = dict(files)
    if record_name(PART) not in there:
        return True
    replay = Replay((there[record_name(PART)],))
    record = read_record(Folder(replay, Path()), PART)
    assert record is not None
    return hashlib.sha256(there.get(PART, b"")).hexdigest() == record.sha256


def ends(writers: Writers, start: Files, may_die: bool = False) -> set[tuple[str, str, Files, str]]:
    """Every end of two writers: how each of them ended, what is there then, and whose step changed that last.

    may_die: or one of them is killed, after any step.
    """
    seen, found = set(), set()
    stack: list[tuple[Files, tuple[History | None, History | None], bool, str]] = [(start, ((), ()), may_die, "")]
    while stack:
        state = files, histories, may, last = stack.pop()
        if state in seen:
            continue
        seen.add(state)
        steps = [
            (None, "killed") if history is None else writers.next(name, history)
            for name, history in zip("AB", histories)
        ]
        if all(step is None for step, _ in steps):
            names = [end if end == "killed" else type(end).__name__ for _, end in steps]
            found.add((names[0], names[1], files, last))
        for place, (step, _) in enumerate(steps):
            history = histories[place]
            if step is None or history is None:
                continue
            after, said = answer(files, step)
            changed = last if after == files else "AB"[place]
            stack.append((after, _with(histories, place, (*history, said)), may, changed))
            if may:
                stack.append((files, _with(histories, place, None), False, last))
    return found


def _with(histories: tuple, place: int, history: History | None) -> tuple:
    return (history, histories[1]) if place == 0 else (histories[0], history)


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, bytes]]:
    """The part and the record of each writer when it was alone. From then on nobody encodes its file again."""
    found, records = {}, {}
    for name in "ABCD":
        records[name * 3] = write(tmp_path / name, name)
        found[name] = {one: (tmp_path / name / one).read_bytes() for one in (PART, record_name(PART))}

    def write_file(store: Store, temporary: Path, part: str, schema: Any, metadata: dict[str, Any], *rest: Any) -> Any:
        temporary.write_bytes(found[metadata["written by"][0]][PART])
        return records[metadata["written by"]]

    monkeypatch.setattr(shards.part, "_write_file", write_file)
    monkeypatch.setattr(shards.part, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(shards.part, "TRIES", 2)

    def ask(call: Callable[[], Any], where: str, may_ask: Callable[[], None] = lambda: None) -> Any:
        may_ask()
        return call()

    monkeypatch.setattr(shards.remote, "asked_again", ask)  # which takes most of the time
    return found


CASES = [
    ("folder", "nothing", 2), ("folder", "an orphan", 2), ("folder", "a part", 2), ("folder", "another record", 1),
    ("bucket", "nothing", 2), ("bucket", "an orphan", 1), ("bucket", "a part", 2), ("bucket", "another record", 1),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "before", "tries"), CASES)
def test_file_and_record_fit_whatever_the_order(
    kind: str, before: str, tries: int, alone: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards.part, "TRIES", tries)
    there = {
        "nothing": {},
        "an orphan": {PART: alone["C"][PART]},
        "a part": alone["C"],
        "another record": alone["C"] | {PART: alone["D"][PART]},
    }[before]
    found = ends(Writers(kind, tmp_path), tuple(sorted(there.items())))
    assert [end for end in found if not fits(end[2])] == []
    if before == "a part":
        assert {end[:2] for end in found} == {("CommittedAlready", "CommittedAlready")}
        return
    assert {("CommitRecord", "CommittedAlready"), ("CommittedAlready", "CommitRecord")} <= {end[:2] for end in found}
    # who was told that it is committed may be wrong only where the other one took the record back and then gave up
    lost = [end for end in found if record_name(PART) not in dict(end[2])]
    assert all({"OSError", "OtherBytes"} & {*end[:2]} for end in lost)


def test_a_writer_that_is_killed_anywhere_leaves_what_the_next_one_mends(alone: dict, tmp_path: Path) -> None:
    writers = Writers("folder", tmp_path)
    found = ends(writers, (), may_die=True)
    for end in found:
        assert fits(end[2]) or end["AB".index(end[3])] == "killed"  # by the one that was killed, with its last step
    for end in found:
        files, history = end[2], ()
        while (step := writers.next("C", history)[0]) is not None:
            files, said = answer(files, step)
            history = (*history, said)
        assert fits(files)
        assert record_name(PART) in dict(files)


def test_a_rerun_names_a_part_that_its_record_does_not_fit(tmp_path: Path) -> None:
    """Before it says that there is nothing to do, or begins to work."""
    folder = write_folder(tmp_path, rows())
    folder.require_sizes()
    part, record = tmp_path / PART, tmp_path / record_name(PART)
    whole = part.read_bytes()
    part.write_bytes(whole[:-1])
    with pytest.raises(ValueError, match=rf"{PART}: {len(whole) - 1} bytes, its commit record says {len(whole)}; run "):
        folder.require_sizes()
    part.unlink()
    with pytest.raises(ValueError, match=f"{PART}: is committed but missing; run remit verify --repair"):
        folder.require_sizes()
    part.write_bytes(whole)
    record.unlink()
    folder.require_sizes()  # a part that is to be written, whatever is there
