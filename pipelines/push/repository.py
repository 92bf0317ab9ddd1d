"""A repository on the hub as remit push writes it: what is there already, batches of files, one commit after the other.

huggingface_hub uploads and commits. The files of a commit are those that the hub does not have yet by their hash, so a push that
was interrupted, or whose answer was lost, goes on; and what the hub holds at the end is compared with what was hashed here.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal
from urllib.parse import quote

from pipelines.push.files import Files, PushFile, git_oid
from pipelines.terminal import ShouldStop
from shards.asking import asked_again
from shards.store_errors import text_of

Kind = Literal["dataset", "model"]
COMMIT_FILES, COMMIT_BYTES = 250, 20 << 30
UPLOAD_FILES, UPLOAD_BYTES = 16, 1 << 30  # between two looks at whether to stop; of another store they are in memory
MAIN, README = "main", "README.md"


class Repository:
    """A dataset or model on the hub. ValueError from the constructor where there is no token, or none that the hub knows."""

    def __init__(self, name: str, kind: Kind, branch: str) -> None:
        from huggingface_hub import HfApi, get_token

        self.name, self.kind, self.branch = name, kind, branch
        self.url = f"hf://{'datasets/' if kind == 'dataset' else ''}{name}"
        if not get_token():
            raise ValueError(
                f"{self.url}: no token of the hub is set here; run hf auth login, or set HF_TOKEN to one that may write"
            )
        self._api = HfApi()
        try:
            self.user = str(self._ask(self._api.whoami)["name"])
        except PermissionError:
            raise ValueError(
                f"{self.url}: the hub at {self._api.endpoint} does not know the token that is set here; run hf auth login, or set "
                "HF_TOKEN to a valid one"
            ) from None

    def _ask(self, call: Callable[[], Any]) -> Any:
        return asked_again(call, self.url)

    def require(self, public: bool) -> None:
        """ValueError where the repository is public and `public` is False."""
        if self._is_private() is False and not public:
            raise ValueError(f"{self.url}: is public, and --public is not given; give it, or choose another name")

    def _is_private(self) -> bool | None:
        """None where there is no such repository."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def private() -> bool | None:
            try:
                return bool(self._api.repo_info(self.name, repo_type=self.kind).private)
            except RepositoryNotFoundError:
                return None

        found: bool | None = self._ask(private)
        return found

    def make(self, public: bool) -> bool:
        """Make the repository and the branch unless they are there; whether it is private. ValueError where the token may not."""
        create = partial(self._api.create_repo, self.name, repo_type=self.kind, private=not public, exist_ok=True)
        branch = partial(self._api.create_branch, self.name, branch=self.branch, repo_type=self.kind, exist_ok=True)
        try:
            if self._is_private() is None:
                self._ask(create)
            if self.branch != MAIN:
                self._ask(branch)
        except PermissionError as error:
            raise ValueError(
                f"{self.url}: the token of {self.user} may not write there ({text_of(error)}); use one that may, or another OWNER"
            ) from None
        return bool(self._is_private())

    def entries(self, below: str = "", revision: str | None = None) -> dict[str, Any]:
        """The files in the repository, or in one folder of it, by path, with size and hashes as the hub gives them."""
        from huggingface_hub import RepoFile
        from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError

        def listed() -> dict[str, Any]:
            try:
                tree = self._api.list_repo_tree(
                    self.name, below or None, recursive=True, revision=revision or self.branch, repo_type=self.kind
                )
                return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}
            except (EntryNotFoundError, RepositoryNotFoundError, RevisionNotFoundError):
                return {}

        found: dict[str, Any] = self._ask(listed)
        return found

    def read_card(self) -> str | None:
        """README.md of the repository, None without one."""
        from huggingface_hub import HfFileSystem

        where = f"{'datasets/' if self.kind == 'dataset' else ''}{self.name}@{quote(self.branch, safe='')}/{README}"
        try:
            data: bytes = self._ask(lambda: HfFileSystem(skip_instance_cache=True).cat_file(where))
        except FileNotFoundError:
            return None
        return data.decode("utf-8", "replace")

    def push(
        self, files: Files, card: bytes, message: str, sent: Callable[[int], object], should_stop: ShouldStop
    ) -> str | None:
        """Upload what is not there, and last the card and what makes the folder one; the commit, None where it was stopped.

        sent: told the bytes of what is there now. OSError where the hub holds other bytes afterwards than were hashed.
        """
        there = self.entries()
        missing = [file for file in files.first if not same(file, there.get(file.path))]
        sent(sum(file.size for file in files.first) - sum(file.size for file in missing))
        pending: list[Any] = []
        for batch in batches(missing, COMMIT_FILES, COMMIT_BYTES):
            operations: list[Any] = []
            for group in batches(batch, UPLOAD_FILES, UPLOAD_BYTES):
                if should_stop():
                    return None
                additions = self._additions(files, group)
                self._ask(partial(self._upload, additions))
                operations += additions
                sent(sum(file.size for file in group))
            if files.at_once:
                pending += operations
            else:
                self._ask(partial(self._commit, operations, message))
        head = None if files.at_once else self._check(files.first)
        commit: str = self._ask(partial(self._finish, files, pending, card, message, head))
        if files.at_once:
            self._check(files.all)
        sent(sum(file.size for file in files.last))
        return commit

    def _finish(self, files: Files, pending: list[Any], card: bytes, message: str, head: str | None) -> str:
        """The last commit; one that was made, and whose answer was lost, is found."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        there = self.entries()
        stale = files.stale_names(there)
        readme = there.get(README)
        is_there = all(same(file, there.get(file.path)) for file in files.all)
        if is_there and not stale and readme is not None and readme.blob_id == git_oid(card):
            return self._head()
        operations = [*pending, *self._additions(files, files.last)]
        operations += [CommitOperationAdd(path_in_repo=README, path_or_fileobj=card)]
        operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
        return self._commit(operations, message, head)

    def _additions(self, files: Files, chosen: Sequence[PushFile]) -> list[Any]:
        from huggingface_hub import CommitOperationAdd

        local = files.store.local
        return [
            CommitOperationAdd(
                path_in_repo=file.path,
                path_or_fileobj=files.store.read(file.name) if local is None else str(local / file.name),
            )
            for file in chosen
        ]

    def _upload(self, additions: list[Any]) -> None:
        """Bring the bytes of large files to the hub, where they wait for a commit; they are not kept in memory here."""
        self._api.preupload_lfs_files(self.name, additions, repo_type=self.kind, revision=self.branch)

    def _commit(self, operations: list[Any], message: str, parent: str | None = None) -> str:
        info = self._api.create_commit(
            self.name,
            operations,
            commit_message=message,
            repo_type=self.kind,
            revision=self.branch,
            parent_commit=parent,
        )
        return str(info.oid)

    def _head(self) -> str:
        """The newest commit."""
        return str(self._api.repo_info(self.name, repo_type=self.kind, revision=self.branch).sha)

    def _check(self, files: Sequence[PushFile]) -> str:
        """The newest commit, in which all `files` are there with their bytes; OSError where one is not."""
        head: str = self._ask(self._head)
        there = self.entries(revision=head)
        for file in files:
            if not same(file, there.get(file.path)):
                has = "has not got it" if file.path not in there else "holds other bytes"
                raise OSError(
                    f"{self.url}/{file.path}: was pushed and the hub {has} than were hashed here; run the same command again"
                )
        return head


def same(file: PushFile, entry: Any) -> bool:
    """Whether the hub holds these bytes. entry: what it says of the file, None where it has none."""
    if entry is None or entry.size != file.size:
        return False
    if entry.lfs is not None:
        return bool(entry.lfs.sha256 == file.sha256)
    return bool(entry.blob_id == file.git_oid)


def batches(files: Sequence[PushFile], most: int, most_bytes: int) -> Iterator[list[PushFile]]:
    """The files in order, at most so many and so many bytes at once, but one at least."""
    batch: list[PushFile] = []
    size = 0
    for file in files:
        if batch and (len(batch) >= most or size + file.size > most_bytes):
            yield batch
            batch, size = [], 0
        batch.append(file)
        size += file.size
    if batch:
        yield batch
