"""What of a folder is pushed: files with their size and hash, in the order in which they may appear in the repository."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path

from shards.folder import TOKENIZER, ShardFolder
from shards.manifest import MANIFEST
from shards.part import sha256_file
from shards.quarantine import rows_name
from shards.record import COMMITS, SUMS, record_name
from shards.side_table import FIELDS, table_name
from shards.store import Store

SMALL_BYTES = 10 << 20  # the hub keeps larger files outside of git
MODEL_FILES = (
    "*.json",
    "*.safetensors",
    "*.model",
    "*.txt",
    "*.jinja",
    "LICENSE*",
    "LICENCE*",
    "NOTICE*",
    "USE_POLICY*",
)
TEMPLATES = "additional_chat_templates"  # of a tokenizer, beside chat_template.jinja
MODEL_STALE = ("*.safetensors", "*.safetensors.index.json", f"{TEMPLATES}/*.jinja")
SHARD_STALE = (
    *("part-*.arrow", f"{COMMITS}/*", f"{SUMS}/*", f"{TOKENIZER}/*", f"{FIELDS}/*", "_quarantine/rows/*"),
    "_rejected.jsonl",  # never pushed: it says where documents lay, and quotes those that were left out on purpose
)


@dataclass(frozen=True)
class PushFile:
    """A file to push. name: in the folder; path: in the repository; git_oid: of git, for a small file alone."""

    name: str
    path: str
    size: int
    sha256: str
    git_oid: str | None


@dataclass(frozen=True)
class Files:
    """first: in any order; last: makes the folder one, and comes with the last commit. stale: patterns of paths that an
    earlier push may have left; left_out: names in the folder that are not pushed. at_once: all in one commit."""

    store: Store
    first: tuple[PushFile, ...]
    last: tuple[PushFile, ...]
    stale: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    at_once: bool = False

    @property
    def all(self) -> tuple[PushFile, ...]:
        return (*self.first, *self.last)

    @property
    def size(self) -> int:
        return sum(file.size for file in self.all)

    def foreign_names(self, there: Mapping[str, object], is_same: Callable[[PushFile, object], bool]) -> list[str]:
        """Of the files in a repository, by path, those of another folder in the same place: stale ones, and other bytes."""
        other = [file.path for file in self.all if file.path in there and not is_same(file, there[file.path])]
        return [*other, *self.stale_names(there)]

    def stale_names(self, there: Iterable[str]) -> list[str]:
        """Of the paths in a repository those that an earlier push left."""
        ours = {file.path for file in self.all}
        return [
            path
            for path in there
            if path not in ours and any(fnmatch(path, p) and path.count("/") == p.count("/") for p in self.stale)
        ]


def git_oid(data: bytes) -> str:
    """What git calls a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def small_file(store: Store, name: str, path: str) -> PushFile:
    """A small file of a folder. path: folder in the repository."""
    data = store.read(name)
    return PushFile(name, _join(path, name), len(data), hashlib.sha256(data).hexdigest(), git_oid(data))


def shard_files(folder: ShardFolder, path: str, hashed: Callable[[int], object]) -> Files:
    """The files of a whole shard folder. ValueError where a part is missing or its bytes are not those of its record.

    path: folder in the repository. hashed: told the bytes of each part that was read.
    """
    folder.require_complete()
    store, manifest = folder.store, folder.manifest

    def small(name: str) -> PushFile:
        return small_file(store, name, path)

    files = []
    for plan in manifest.parts:
        record = folder.record(plan.name)
        found = store.sha256(plan.name)
        if found != record.sha256:
            raise ValueError(
                f"{store.where(plan.name)}: sha256 {found[:12]}.. differs from its commit record {record.sha256[:12]}..; run remit "
                "verify --repair, then the command that writes this folder"
            )
        hashed(record.size)
        files += [PushFile(plan.name, _join(path, plan.name), record.size, record.sha256, None)]
        files += [small(record_name(plan.name))]
        files += [small(rows_name(plan.name))] if record.quarantined else []
    beside = [f"{TOKENIZER}/{name}" for name in folder.tokenizer_files()]
    beside += [record_name(plan.name, SUMS) for plan in manifest.parts] if store.names(SUMS) else []
    beside += [table_name(source) for source, file in enumerate(manifest.corpus) if file.fields_sha256]
    return Files(
        store, (*files, *map(small, beside)), (small(MANIFEST),), tuple(_join(path, name) for name in SHARD_STALE)
    )


def model_files(store: Store, hashed: Callable[[int], object]) -> Files:
    """The files of a model folder on this machine: config, weights as safetensors, tokenizer with its chat templates, licence.
    Nothing else goes along."""
    assert store.local is not None
    paths = [path for path in store.local.iterdir() if not path.name.startswith(".")]
    names = sorted(path.name for path in paths if path.is_file())
    taken = [name for name in names if any(fnmatch(name, pattern) for pattern in MODEL_FILES)]
    beside = sorted(f"{TEMPLATES}/{path.name}" for path in (store.local / TEMPLATES).glob("*") if path.is_file())
    taken += [name for name in beside if fnmatch(name, "*.jinja")]
    folders = sorted(f"{path.name}/" for path in paths if path.is_dir() and path.name != TEMPLATES)

    def file(name: str) -> PushFile:
        path = Path(store.local or "", name)
        size = path.stat().st_size
        oid = git_oid(path.read_bytes()) if size <= SMALL_BYTES else None
        found = PushFile(name, name, size, sha256_file(path), oid)
        hashed(size)
        return found

    last = [name for name in taken if name == "config.json" or name.endswith(".index.json")]
    first = tuple(file(name) for name in taken if name not in last)
    left_out = tuple(name for name in (*names, *beside, *folders) if name not in taken and name != "README.md")
    return Files(store, first, tuple(map(file, last)), MODEL_STALE, left_out, at_once=True)


def _join(path: str, name: str) -> str:
    return f"{path}/{name}" if path else name
