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


def asked_again(call: Callable[[], T], where: str) -> T:
    """The result of `call`, which is made again, ever more slowly, while the store does not answer.

    where: URL that the call is about. FileNotFoundError and FileExistsError as the store answers them; StoreSilent
    where the bucket has not answered for retry_seconds(), at once where that was so before; OSError for the rest.
    """
    import tenacity

    bucket, seconds = bucket_of(where), retry_seconds()

    def gave_up(state: "tenacity.RetryCallState") -> bool:
        return _leaving.is_set() or monotonic() - _silent_since.get(bucket, monotonic()) >= seconds

    def ask() -> T:
        began = monotonic()
        try:
            result = call()
        except Exception as error:
            if may_pass(error):
                _silent(bucket, began, error)
            else:
                _answered(bucket)
            raise
        _answered(bucket)
        return result

    retry = tenacity.Retrying(
        retry=tenacity.retry_if_exception(may_pass),
        wait=tenacity.wait_random_exponential(0.2, max=min(10, seconds / 5)),
        stop=lambda state: gave_up(state) or tenacity.stop_after_delay(seconds)(state),
        sleep=tenacity.sleep_using_event(_leaving),
        reraise=True,
    )
    try:
        return retry(ask)
    except Exception as error:
        meaning = plain(error, where)
        if meaning is error:
            raise
        raise meaning from None


def _silent(bucket: str, began: float, error: Exception) -> None:
    since = _silent_since.setdefault(bucket, began)
    seconds = monotonic() - since
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
