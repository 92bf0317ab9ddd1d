"""Asking a remote store again while it does not answer: for how long, who is told, and when it is enough.

What is asked of a store that does not answer is asked again for REMIT_STORE_RETRY_SECONDS (600). Once this process is
to leave (`leave`), nothing is asked a second time any more.
"""

import threading
from collections.abc import Callable
from time import monotonic
from typing import TYPE_CHECKING, TypeVar

from shards.store_errors import bucket_of, may_pass, plain, retry_seconds, text_of

if TYPE_CHECKING:
    import tenacity

SAID_AFTER_SECONDS = 5.0
NO_ANSWER_SECONDS = 60.0
"""The libraries below wait for no answer longer: a call that fails after more has had answers before."""
T = TypeVar("T")

_silent_since: dict[str, float] = {}  # per bucket, until it answers: so that giving up once is enough
_said: set[str] = set()  # buckets of whose silence `_tell` was told
_leaving = threading.Event()
_tell: Callable[[str], None] | None = None


def tell_of_silence(tell: Callable[[str], None] | None) -> Callable[[str], None] | None:
    """Have `tell` called, from any thread, with a line when a store falls silent and one when it answers again.

    Returns what was told before.
    """
    global _tell
    before, _tell = _tell, tell
    return before


def leave() -> None:
    """Give up from now on on what does not answer: this process is to end."""
    _leaving.set()


def stay() -> None:
    """Take `leave` back, for a process that goes on after all (tests, a caller's own)."""
    _leaving.clear()


def silences() -> dict[str, float]:
    """Stores that do not answer this process, each with the seconds since when."""
    return {bucket: monotonic() - since for bucket, since in list(_silent_since.items())}


def asked_again(call: Callable[[], T], where: str, may_ask: Callable[[], None] = lambda: None, attempts: int = 1) -> T:
    """The result of `call`, which is made again, ever more slowly, while the store does not answer.

    where: URL that the call is about. may_ask: called before each try, raises where there must be none. attempts: of a call that
    may take long, an upload: it is made so often, however long each takes, unless the bucket was silent too long before it.
    FileNotFoundError and FileExistsError as the store answers them; StoreSilent where the bucket has not answered for
    retry_seconds(), at once where that was so before; OSError for the rest.
    """
    import tenacity

    bucket, seconds = bucket_of(where), retry_seconds()
    was_silent = _is_silent(bucket, seconds)
    refused: list[Exception] = []
    failed: list[float] = []  # when each try did

    def gave_up(state: "tenacity.RetryCallState") -> bool:
        if attempts > 1:
            is_enough = len(failed) >= attempts and monotonic() - failed[0] >= seconds
            return _leaving.is_set() or was_silent or is_enough
        return _leaving.is_set() or _is_silent(bucket, seconds) or tenacity.stop_after_delay(seconds)(state)

    def ask() -> T:
        try:
            may_ask()
        except Exception as error:
            refused.append(error)
            raise
        began = monotonic()
        try:
            result = call()
        except Exception as error:
            if may_pass(error):
                failed.append(monotonic())
                _silent(bucket, began, error)
            else:
                _answered(bucket)
            raise
        _answered(bucket)
        return result

    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(lambda error: not refused and may_pass(error)),
        wait=tenacity.wait_random_exponential(0.2, max=min(10, seconds / 5)),
        stop=gave_up,
        sleep=tenacity.sleep_using_event(_leaving),
        reraise=True,
    )
    try:
        return retry(ask)
    except Exception as error:
        if refused:
            raise
        meaning = plain(error, where)
        if meaning is error:
            raise
        raise meaning from None


def _is_silent(bucket: str, seconds: float) -> bool:
    return monotonic() - _silent_since.get(bucket, monotonic()) >= seconds


def _silent(bucket: str, began: float, error: Exception) -> None:
    now = monotonic()
    if now - began > 2 * NO_ANSWER_SECONDS:  # a long upload that broke off: the store answered until then
        _answered(bucket)
        return
    seconds = now - _silent_since.setdefault(bucket, max(began, now - NO_ANSWER_SECONDS))
    if _tell is not None and bucket not in _said and seconds >= SAID_AFTER_SECONDS and not _leaving.is_set():
        _said.add(bucket)
        _tell(
            f"{bucket}: has not answered for {seconds:.0f} s ({text_of(error)}); asked again for up to "
            f"{retry_seconds():.0f} s"
        )


def _answered(bucket: str) -> None:
    since = _silent_since.pop(bucket, None)
    if since is None or bucket not in _said:
        return
    _said.discard(bucket)
    if _tell is not None:
        _tell(f"{bucket}: answers again, after {monotonic() - since:.0f} s")
