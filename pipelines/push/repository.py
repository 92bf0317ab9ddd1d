"""A repository on the hub as remit push writes it: what is there already, batches of files, one commit after the other.

huggingface_hub uploads and commits. The files of a commit are those that the hub does not have yet by their hash, so a push that
was interrupted, or whose answer was lost, goes on; and what the hub holds at the end is compared with what was hashed here.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from http import HTTPStatus
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
FINISH_TRIES = 8  # while others commit, too

Card = Callable[[str | None], str]
"""The card that a repository gets, given the one that it has."""


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

    def is_fresh(self) -> bool:
        """Whether the branch has nothing of its own: it is not there yet, or its newest commit is that of main."""
        from huggingface_hub.errors import RepositoryNotFoundError

        def heads() -> dict[str, str]:
            try:
                refs = self._api.list_repo_refs(self.name, repo_type=self.kind)
            except RepositoryNotFoundError:
                return {}
            return {branch.name: branch.target_commit for branch in refs.branches}

        found: dict[str, str] = self._ask(heads)
        return self.branch != MAIN and found.get(self.branch) in (None, found.get(MAIN))

    def require_ours(self, ours: PushFile) -> None:
        """ValueError where the branch holds another file in the place of `ours`, the manifest of a shard folder; not where the
        branch has nothing of its own, which `begin` then takes out."""
        there = self.entries(ours.path.rpartition("/")[0]).get(ours.path)
        if there is not None and not same(ours, there) and not self.is_fresh():  # its parts have the names of ours
            raise ValueError(
                f"{self.url}/{ours.path}: is there, of other rows or another scoring than the folder that is pushed; give another "
                "--path, --revision or NAME, or delete that folder on the hub"
            )

    def begin(self, files: Files, message: str) -> bool:
        """See that readers find no other folder's manifest over our files; whether one was taken out.

        A new branch has what main has. Where that is another shard folder in this place, it goes with the first commit;
        main keeps it. ValueError where the branch has another folder of its own, which may have come since `require_ours`.
        """
        return bool(not files.at_once and self._ask(partial(self._begin, files, message)))

    def _begin(self, files: Files, message: str) -> bool:
        from huggingface_hub import CommitOperationDelete

        head = self._head()
        there = self.entries(revision=head)
        if all(file.path not in there or same(file, there[file.path]) for file in files.last):
            return False
        for file in files.last:
            self.require_ours(file)
        gone = files.foreign_names(there, same)
        self._commit([CommitOperationDelete(path_in_repo=path) for path in gone], message, head)
        return True

    def read_card(self, revision: str | None = None) -> str | None:
        """README.md of the repository, None without one."""
        from huggingface_hub import HfFileSystem

        at = quote(revision or self.branch, safe="")
        where = f"{'datasets/' if self.kind == 'dataset' else ''}{self.name}@{at}/{README}"
        try:
            data: bytes = self._ask(lambda: HfFileSystem(skip_instance_cache=True).cat_file(where))
        except FileNotFoundError:
            return None
        return data.decode("utf-8", "replace")

    def push(
        self, files: Files, card: Card, message: str, sent: Callable[[int], object], should_stop: ShouldStop
    ) -> tuple[str, str] | None:
        """Upload what is not there, and last the card and what makes the folder one; the commit and the card, None where it was
        stopped.

        card: called at the end, with the card that is there by then. sent: told the bytes of what is there now. OSError where
        the hub holds other bytes afterwards than were hashed.
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
        for _ in range(FINISH_TRIES):
            head: str = self._ask(self._head) if files.at_once else self._check(files.first)
            text = card(self.read_card(head))
            commit = self._ask(partial(self._finish, files, pending, text.encode(), message, head))
            if commit is not None:
                break
        else:
            raise OSError(
                f"{self.url}: others commit to it all the time; run the same command again when they are done"
            )
        if files.at_once:
            self._check(files.all)
        sent(sum(file.size for file in files.last))
        return str(commit), text

    def _finish(self, files: Files, pending: list[Any], card: bytes, message: str, head: str) -> str | None:
        """The last commit, on top of `head`; None where the branch has a newer one by now. That may be ours, whose answer was
        lost: then all is there the next time."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete
        from huggingface_hub.errors import HfHubHTTPError

        there = self.entries(revision=head)
        stale = files.stale_names(there)
        readme = there.get(README)
        is_there = all(same(file, there.get(file.path)) for file in files.all)
        if is_there and not stale and readme is not None and readme.blob_id == git_oid(card):
            return head
        operations = [*pending, *self._additions(files, files.last)]
        operations += [CommitOperationAdd(path_in_repo=README, path_or_fileobj=card)]
        operations += [CommitOperationDelete(path_in_repo=path) for path in stale]
        try:
            return self._commit(operations, message, head)
        except HfHubHTTPError as error:
            if error.response.status_code != HTTPStatus.PRECONDITION_FAILED:
                raise
            return None

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
