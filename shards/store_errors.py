"""What the errors of object stores mean: an answer, a mistake of ours, or silence that may pass. No import of theirs."""

import os
from typing import Any

ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
MISTAKES = (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, NotImplementedError)
BAD_SETTINGS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "UnknownEndpointError",
    "ParamValidationError",
}  # fmt: skip
PASSING_STATUS = {408, 409, 425, 429}
PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}  # with status 400


class StoreSilent(OSError):
    """A remote store has not answered for as long as it is asked."""


class OtherBytes(OSError):
    """A store gives back other bytes than were written: it has altered them, or another process has written since."""


class NoTemporarySpace(OSError):
    """The local folder of temporary files is full, on this machine, which says nothing of the store."""


def retry_seconds() -> float:
    """How long a store that does not answer is asked again."""
    return float(os.environ.get("REMIT_STORE_RETRY_SECONDS", 600))


def text_of(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def answer_of(error: BaseException) -> tuple[str, int]:
    """Error code and HTTP status of what the store answered; "" and 0 where it did not."""
    for one in (error, error.__cause__):
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None)  # of httpx, which the hub's library uses
        if isinstance(status, int):
            return "", status
        if isinstance(response, dict):
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
    code: Any = getattr(error, "code", 0)  # of gcsfs
    return str(code or ""), code if isinstance(code, int) else 0


def exists_already(error: BaseException) -> bool:
    """Whether a store refused to create what is there."""
    text = str(error)
    return isinstance(error, FileExistsError) or "PreconditionFailed" in text or "pre-condition" in text.lower()


def may_pass(error: BaseException) -> bool:
    """Whether asking again may help: not where the store has answered, or cannot be asked at all."""
    if not isinstance(error, Exception) or isinstance(error, ANSWERS + MISTAKES) or exists_already(error):
        return False
    if type(error).__name__ in BAD_SETTINGS:
        return False
    code, status = answer_of(error)
    final = 300 <= status < 500 or status == 501  # such as: the store has no conditional put
    return not final or status in PASSING_STATUS or code in PASSING_CODES


def plain(error: Exception, where: str) -> Exception:
    """The error as its reader needs it: what the store answered, or that it did not."""
    code, status = answer_of(error)
    if code == "NoSuchBucket":
        return OSError(f"{bucket_of(where)}: there is no such bucket; create it, or correct the URL")
    if isinstance(error, PermissionError) or type(error).__name__ in BAD_SETTINGS:
        return PermissionError(f"{where}: the store cannot be used ({text_of(error)}); check credentials and region")
    if isinstance(error, ANSWERS + MISTAKES) or exists_already(error):
        return error
    if may_pass(error):
        return StoreSilent(
            f"{where}: the store has not answered for {retry_seconds():.0f} s ({text_of(error)}); check network and "
            "endpoint, then run the same command again"
        )
    kind = PermissionError if status in (401, 402, 403) else OSError
    return kind(f"{where}: the store refuses, with status {status} ({text_of(error)})")


def bucket_of(where: str) -> str:
    """Protocol and bucket of a URL."""
    return "/".join(where.split("/")[:3])
