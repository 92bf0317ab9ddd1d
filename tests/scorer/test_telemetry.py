"""The log of a run: whole lines, and never in the way of the run."""

import json
import threading
import time
from pathlib import Path

import pytest

from scorer import telemetry
from scorer.telemetry import ScoreLog
from shards.store import LocalStore


def until(condition: object, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Away(LocalStore):
    """A folder that cannot be written for a while."""

    away = True

    def path(self, name: str) -> Path:
        if self.away:
            raise OSError(28, "No space left on device")
        return super().path(name)


def test_a_log_that_cannot_be_written_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "LOCAL_AGAIN_SECONDS", 0.05)
    store, told, done = Away(tmp_path), list[str](), list[int]()
    log = ScoreLog(store, told.append)
    log.write("nodes", {"line": "first"})
    log.also(lambda: done.append(1) if not store.away else store.path("x"))
    until(lambda: told)
    assert told[0].endswith("_score.jsonl: cannot be written now ([Errno 28] No space left on device); the run goes on")
    log.write("done", {"line": "second"})
    time.sleep(0.2)
    assert len(told) == 1
    store.away = False
    until(lambda: len(told) == 2)
    assert told[1].endswith("is written again, no event is missing in it")
    log.write("last", {})
    log.close()
    lines = [json.loads(line) for line in (tmp_path / "_score.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["nodes", "done", "last"]
    assert done == [1]


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk on which the last bytes have no room."""
    file = tmp_path / "_score.jsonl"
    file.write_text('{"event": "earlier"}\n')
    room, plain = 30, open

    def limited(*arguments: object, **options: object) -> object:
        opened = plain(*arguments, **options)  # type: ignore[call-overload]

        class File:
            def write(self, data: bytes) -> int:
                return opened.write(data[: room - opened.tell()])

            def __getattr__(self, name: str) -> object:
                return getattr(opened, name)

            def __enter__(self) -> "File":
                return self

            def __exit__(self, *_: object) -> None:
                opened.close()

        return File()

    monkeypatch.setattr(telemetry, "open", limited, raising=False)
    told: list[str] = []
    log = ScoreLog(LocalStore(tmp_path), told.append)
    log.write("event", {})
    until(lambda: told)
    assert "No space left on device" in told[0]
    assert file.read_text() == '{"event": "earlier"}\n'
    room = 10**6
    log.close()
    assert [json.loads(line)["event"] for line in file.read_text().splitlines()] == ["earlier", "event"]


def test_a_filesystem_that_hangs_does_not_keep_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(telemetry, "CLOSING_SECONDS", 0.2)
    free = threading.Event()

    class Hanging(LocalStore):
        def path(self, name: str) -> Path:
            free.wait(30)
            return super().path(name)

    log = ScoreLog(Hanging(tmp_path))
    began = time.monotonic()
    log.write("done", {})
    log.close()
    assert time.monotonic() - began < 5
    free.set()
