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
