"""A folder of a dataset on the Hugging Face hub, hf://datasets/OWNER/NAME[@REVISION]/FOLDER, which is read and never written.

REVISION is a branch, a tag or a commit (main unless given; a slash in it is written %2F). It is turned into its commit once,
when the folder is opened: all files are of that commit, whatever is pushed meanwhile. The token is that of `hf auth login`,
or HF_TOKEN; HF_ENDPOINT names another hub.
"""

import re
import threading
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn
from urllib.parse import quote, unquote

from shards.asking import asked_again
from shards.remote import RemoteStore
from shards.store import HUB, HUB_IS_READ

DATASETS = f"{HUB}datasets/"
EXPECTED = "expected hf://datasets/OWNER/NAME/FOLDER, or NAME@REVISION for a branch, tag or commit"

_PLACE = re.compile(r"([\w.-]+/[\w.-]+)(?:@(refs/pr/\d+|[^/]+))?(?:/(.*))?")


@dataclass(frozen=True)
class Place:
    """Where on the hub a folder is. dataset: OWNER/NAME; revision: None stands for main; folder: "" is the whole dataset."""

    dataset: str
    revision: str | None
    folder: str


def parse_place(url: str) -> Place:
    """What an hf:// URL of a shard folder names; ValueError for any other."""
    match = _PLACE.fullmatch(url.removeprefix(DATASETS)) if url.startswith(DATASETS) else None
    pieces = [] if match is None else (match[3] or "").split("/")
    if match is None or {".", ".."} & {*pieces}:
        raise ValueError(f"{url}: is no folder of a dataset on the hub, {EXPECTED}")
    return Place(match[1], unquote(match[2]) if match[2] else None, "/".join(piece for piece in pieces if piece))


def commit_of(url: str, place: Place) -> str:
    """The commit that the revision of a place has now; ValueError where the hub has no such dataset or revision."""
    from huggingface_hub import HfApi, get_token
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api = HfApi()
    try:
        commit = api.dataset_info(place.dataset, revision=place.revision).sha
    except GatedRepoError:
        raise ValueError(
            f"{url}: {place.dataset} is gated; ask for access on its page on the hub, and use a token of that account"
        ) from None
    except RepositoryNotFoundError:
        token = "the token here may not read it" if get_token() else "no token is set here (hf auth login, or HF_TOKEN)"
        raise ValueError(
            f"{url}: the hub has no dataset {place.dataset}, or it is private and {token}; check the name"
        ) from None
    except RevisionNotFoundError:
        near = _near(api, place)
        raise ValueError(
            f"{url}: {place.dataset} has no revision {place.revision!r}, expected a branch, a tag or a whole commit of it"
            f"{'; near it: ' + ', '.join(near) if near else ''}"
        ) from None
    except HFValidationError as error:
        raise ValueError(f"{url}: {' '.join(str(error).split())}; {EXPECTED}") from None
    except OfflineModeIsEnabled:
        raise ValueError(
            f"{url}: HF_HUB_OFFLINE is set, so the hub is not asked; unset it, or give a copy here"
        ) from None
    assert commit
    return commit


def _near(api: Any, place: Place) -> list[str]:
    """The branches and tags that are spelled most like the revision of a place."""
    refs = api.list_repo_refs(place.dataset, repo_type="dataset")
    return get_close_matches(place.revision or "", [ref.name for ref in [*refs.branches, *refs.tags]], 3)


_listing = threading.RLock()


@cache
def _files() -> Any:
    """The class of huggingface_hub, for several threads: while one fills its list of a folder, another would miss files in it."""
    from huggingface_hub import HfFileSystem

    class Files(HfFileSystem):
        def ls(self, *arguments: Any, **named: Any) -> Any:
            with _listing:
                return super().ls(*arguments, **named)

        def info(self, *arguments: Any, **named: Any) -> Any:
            with _listing:
                return super().info(*arguments, **named)

    return Files


class HubStore(RemoteStore):
    """A folder of a dataset at one commit. ValueError from the constructor where the hub has none, and from all that writes."""

    piece_options = MappingProxyType({"cache_type": "none"})  # its files would read five megabytes ahead of each piece

    def __init__(self, url: str, commit: str | None = None) -> None:
        self.url, place = url.rstrip("/"), parse_place(url)
        self.commit = commit or asked_again(lambda: commit_of(self.url, place), self.url)
        self._protocol = "hf"
        self._fs = _files()()
        self._root = f"datasets/{place.dataset}@{quote(self.commit, safe='')}/{place.folder}".rstrip("/")

    def __reduce__(self) -> tuple:
        return HubStore, (self.url, self.commit)

    def create(self, name: str, data: bytes, kind: str = "") -> None:
        self._refuse()

    def replace(self, name: str, data: bytes) -> None:
        self._refuse()

    def temporary(self, name: str) -> Path:
        self._refuse()

    def put(self, temporary: Path, name: str) -> None:
        self._refuse()

    def delete(self, name: str, may_delete: Any = None) -> None:
        self._refuse()

    def remove(self, folder: str = "", may_delete: Any = None) -> None:
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ValueError(HUB_IS_READ.format(self.url))
