"""What the errors of object stores mean: an answer, a mistake of ours, or silence that may pass. No import of theirs."""

import os
from typing import Any

ANSWERS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
MISTAKES = (ValueError, TypeError, KeyError, AttributeError, AssertionError, ImportError, NotImplementedError)
BAD_SETTINGS = {
    "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "NoRegionError", "UnknownEndpointError",
    "ParamValidationError", "DefaultCredentialsError", "ClientAuthenticationError", "CredentialUnavailableError",
}  # fmt: skip
STATUS_OF_TEXT = {"Forbidden: ": 403, "Bad Request: ": 400}
"""How gcsfs begins the text of what is a plain OSError, or a ValueError, without a number."""
PASSING_STATUS = {408, 409, 425, 429}
PASSING_CODES = {"RequestTimeout", "IncompleteBody", "BadDigest", "XAmzContentSHA256Mismatch"}  # with status 400


class StoreSilent(OSError):
    """A remote store has not answered for as long as it is asked."""


class StoreRefused(OSError):
    """A remote store has answered that it does not do what it is asked. It says nothing of the bytes of a file."""


class StoreForbidden(StoreRefused, PermissionError):
    """The same for want of rights, or of credentials that are valid now."""


class OtherBytes(OSError):
    """A store gives back other bytes than were written: it has altered them, or another process has written since."""


class NoTemporarySpace(OSError):
    """The local folder of temporary files is full, on this machine, which says nothing of the store."""


NOT_THE_FILES = (StoreSilent, StoreRefused, *ANSWERS)
"""Errors while a file is read that say nothing of what is in it."""


def retry_seconds() -> float:
    """How long a store that does not answer is asked again."""
    return float(os.environ.get("REMIT_STORE_RETRY_SECONDS", 600))


def text_of(error: BaseException) -> str:
    """The first line of an error's text, or its type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def answer_of(error: BaseException) -> tuple[str, int]:
    """Error code and HTTP status of what the store answered; "" and 0 where it did not."""
    for one in (error, error.__cause__):
        if one is None:
            continue
        response = getattr(one, "response", None)
        status = getattr(response, "status_code", None)  # of httpx, which the hub's library uses, and of azure.core
        if isinstance(status, int):
            return "", status
        if isinstance(response, dict):  # of botocore
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            return str(response.get("Error", {}).get("Code", "")), int(status)
        if status := _own_status(one):
            return str(getattr(one, "code", "") or ""), status
    return "", 0


def _own_status(error: BaseException) -> int:
    """The status that an error itself has: code of gcsfs, status of aiohttp and oss2, status_code of azure.core, or its text."""
    for name in ("status_code", "status", "code"):
        value: Any = getattr(error, name, None)
        if isinstance(value, str) and value.isdecimal():
            value = int(value)
        if isinstance(value, int) and 100 <= value < 600:
            return value
    return _status_of_text(error)


def _status_of_text(error: BaseException) -> int:
    plain = type(error) in (OSError, ValueError)
    return next((status for text, status in STATUS_OF_TEXT.items() if plain and str(error).startswith(text)), 0)


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
        return StoreRefused(f"{bucket_of(where)}: there is no such bucket; create it, or correct the URL")
    if isinstance(error, PermissionError) or type(error).__name__ in BAD_SETTINGS:
        return StoreForbidden(f"{where}: the store cannot be used ({text_of(error)}); check credentials and region")
    if (isinstance(error, ANSWERS + MISTAKES) and not _status_of_text(error)) or exists_already(error):
        return error
    if may_pass(error):
        return StoreSilent(
            f"{where}: the store has not answered for {retry_seconds():.0f} s ({text_of(error)}); check network and "
            "endpoint, then run the same command again"
        )
    kind = StoreForbidden if status in (401, 402, 403) else StoreRefused
    return kind(f"{where}: the store refuses, with status {status} ({text_of(error)})")


def bucket_of(where: str) -> str:
    """Protocol and bucket of a URL."""
    return "/".join(where.split("/")[:3])
