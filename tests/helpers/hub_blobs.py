"""What a hub on loopback keeps: files as git and LFS name them, commits and branches of a repository."""

import hashlib
from dataclasses import dataclass, field
from typing import Any


def sha1(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@dataclass(frozen=True)
class Blob:
    """A file. lfs: whether it is kept outside of git, under the sha256 of its bytes."""

    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def oid(self) -> str:
        """Of git: of the file, or of the pointer that stands for it."""
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
        data = pointer.encode() if self.lfs else self.data
        return sha1(f"blob {len(data)}\0".encode() + data)

    def entry(self, path: str) -> dict[str, Any]:
        lfs = {"lfs": {"oid": self.sha256, "size": len(self.data), "pointerSize": 134}} if self.lfs else {}
        return {"type": "file", "oid": self.oid, "size": len(self.data), "path": path, **lfs}


@dataclass
class Repo:
    """branches: commit of each; commits: the files of each; messages: of each, oldest first."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, branch: str, files: dict[str, Blob], message: str) -> str:
        oid = sha1(f"{len(self.commits)} {branch} {sorted(files)}".encode())
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def find(self, revision: str) -> str | None:
        oid = self.branches.get(revision, revision)
        return oid if oid in self.commits else None


class Refused(Exception):
    """An answer that is an error: status, X-Error-Code and text."""
