"""What the errors of stores mean, by the classes that gcsfs, adlfs, ossfs and aiohttp raise; none of them is installed."""

from typing import Any

import pytest

from shards.store_errors import StoreForbidden, StoreRefused, StoreSilent, answer_of, may_pass, plain

WHERE = "gs://bucket/folder/x"


class HttpError(Exception):
    """gcsfs.retry.HttpError: the code of the answer's JSON, or the status."""

    def __init__(self, code: int | str) -> None:
        super().__init__(f"text, {code}")
        self.code = code


class ClientResponseError(Exception):
    """Of aiohttp."""

    def __init__(self, status: int) -> None:
        super().__init__(f"{status}, message='', url='https://host/x'")
        self.status = status


class HttpResponseError(Exception):
    """Of azure.core, which adlfs lets through, or wraps; response: None where there was none."""

    def __init__(self, status: int) -> None:
        super().__init__("the service says no\nRequestId:1")
        self.status_code, self.response = status, None


class OssError(Exception):
    """Of oss2."""

    def __init__(self, status: int) -> None:
        super().__init__({"status": status})
        self.status, self.code = status, "SomeCode"


class ClientAuthenticationError(Exception):
    """Of azure.identity, before anything is asked."""


class DefaultCredentialsError(Exception):
    """Of google.auth."""


def wrapped(error: Exception) -> Exception:
    """As adlfs wraps what an upload raises."""
    try:
        raise RuntimeError(f"Failed to upload block: {error}!") from error
    except RuntimeError as outer:
        return outer


def of_gcsfs(status: int) -> Exception:
    """As gcsfs.retry.validate_response raises."""
    by_status: dict[int, Exception] = {
        403: OSError("Forbidden: https://storage.googleapis.com/b/bucket/o/x\nno access, or invalid"),
        404: FileNotFoundError("b/bucket/o/x"),
        412: FileExistsError("b/bucket/o/x"),
    }
    return by_status.get(status) or HttpError(status)


KINDS: list[Any] = [of_gcsfs, lambda s: HttpError(str(s)), ClientResponseError, HttpResponseError, OssError]
KINDS += [lambda s: wrapped(HttpResponseError(s))]


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 412, 425, 429, 500, 501, 502, 503, 504])
def test_each_status_has_its_meaning(make: Any, status: int) -> None:
    error = make(status)
    meaning = plain(error, WHERE)
    assert isinstance(meaning, OSError)
    again = status in (408, 409, 425, 429) or (status >= 500 and status != 501)
    assert may_pass(error) is again
    assert isinstance(meaning, StoreSilent) is again
    assert isinstance(meaning, PermissionError) is (status in (401, 403))
    if status in (401, 403):
        assert isinstance(meaning, StoreForbidden)
        assert f"{WHERE}: the store refuses, with status {status}" in str(meaning)
    elif not again and not isinstance(error, FileNotFoundError | FileExistsError):
        assert isinstance(meaning, StoreRefused)
        assert answer_of(error)[1] == status


def test_gcsfs_has_a_value_error_for_bad_requests() -> None:
    """Which must not pass for a fault of what is read: verify --repair would take the part out."""
    meaning = plain(ValueError("Bad Request: https://host/b/x\ninvalid key"), WHERE)
    assert isinstance(meaning, StoreRefused)
    assert "status 400" in str(meaning)


@pytest.mark.parametrize("error", [ClientAuthenticationError("none"), DefaultCredentialsError("none")])
def test_no_credentials_are_no_silence(error: Exception) -> None:
    assert not may_pass(error)
    assert isinstance(plain(error, WHERE), StoreForbidden)


@pytest.mark.parametrize(
    "error", [ConnectionError("reset"), TimeoutError(), OSError("8 bytes came instead of 9"), RuntimeError("x")]
)
def test_what_has_no_status_is_silence(error: Exception) -> None:
    assert may_pass(error)
    assert isinstance(plain(error, WHERE), StoreSilent)


def test_mistakes_of_ours_stay_what_they_are() -> None:
    for error in (ValueError("x is not a name"), TypeError("x"), KeyError("x")):
        assert not may_pass(error)
        assert plain(error, WHERE) is error
