"""A store that does not answer: who is told, and that a process which is to leave does not wait for it."""

import threading
import time
from collections.abc import Iterator

import pytest

from shards import asking
from shards.asking import asked_again, leave, silences, stay, tell_of_silence
from shards.store_errors import StoreSilent


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    told: list[str] = []
    before = tell_of_silence(told.append)
    monkeypatch.setattr(asking, "SAID_AFTER_SECONDS", 0.0)
    monkeypatch.setenv("REMIT_STORE_RETRY_SECONDS", "30")
    yield told
    tell_of_silence(before)
    stay()
    asking._silent_since.clear()


def test_silence_has_a_beginning_and_an_end(afresh: list[str]) -> None:
    answers = iter([ConnectionError("refused"), ConnectionError("refused"), "here"])

    def call() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            assert not silences() or silences()["s3://bucket"] >= 0
            raise answer
        return answer

    assert asked_again(call, "s3://bucket/folder/file") == "here"
    assert len(afresh) == 2
    assert afresh[0].startswith("s3://bucket: has not answered for 0 s (refused); asked again for up to 30 s")
    assert afresh[1].startswith("s3://bucket: answers again, after ")
    assert silences() == {}


def test_who_is_to_leave_does_not_wait(afresh: list[str]) -> None:
    def call() -> None:
        raise ConnectionError("refused")

    threading.Timer(0.5, leave).start()
    began = time.monotonic()
    with pytest.raises(StoreSilent):
        asked_again(call, "s3://bucket/file")
    with pytest.raises(StoreSilent):
        asked_again(call, "s3://bucket/other")
    assert time.monotonic() - began < 10


def test_a_long_call_that_breaks_off_is_no_silence_since_it_began(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upload of 20 minutes: readers of the bucket ask on as ever, and it is made five times itself."""
    clock, tries = [1000.0], list[float]()
    monkeypatch.setattr(asking, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda seconds: None)
    monkeypatch.setattr("tenacity.wait_random_exponential.__call__", lambda *state: 0.0)

    def upload() -> None:
        tries.append(clock[0])
        clock[0] += 1200
        raise ConnectionError("reset")

    with pytest.raises(StoreSilent):
        asked_again(upload, "s3://bucket/large", attempts=5)
    assert len(tries) == 5
    assert silences() == {}


def test_an_upload_rides_out_a_short_outage(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at once it is made again for as long as any call, and more often than five times."""
    answers, clock = iter([*[ConnectionError("refused")] * 12, "there"]), [0.0]
    monkeypatch.setattr(asking, "monotonic", lambda: clock[0])
    monkeypatch.setattr("tenacity.wait_random_exponential.__call__", lambda *state: 0.0)

    def upload() -> str:
        clock[0] += 1
        if isinstance(answer := next(answers), Exception):
            raise answer
        return answer

    assert asked_again(upload, "s3://bucket/large", attempts=5) == "there"


def test_who_may_not_ask_is_not_asked_again() -> None:
    """Before each try; its error is raised as it is, at once."""
    asked: list[str] = []

    def may_ask() -> None:
        asked.append("may")
        if len(asked) == 3:
            raise RuntimeError("taken over")

    def call() -> None:
        asked.append("call")
        raise ConnectionError("refused")

    began = time.monotonic()
    with pytest.raises(RuntimeError, match="taken over"):
        asked_again(call, "s3://bucket/file", may_ask)
    assert asked == ["may", "call", "may"]
    assert time.monotonic() - began < 10
