"""A folder that a command writes: what it was made of, one writer at a time, finished by the same command.

One file in it, written first, says what the folder was made of: settings, and inputs by their
content. It is _manifest.json in a shard folder and never changes; it is run.json in that of a training,
where later commands may add what they change. The same command again finds its own
values there and finishes the folder; another one is refused with the field and both values. Who writes holds the
folder's lease (shards/lease.py), and a writer that lost it publishes and deletes nothing more.
"""

import contextlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shards.crash import crash_point
from shards.fingerprint import RUN
from shards.folder import TOKENIZER, ShardFolder
from shards.lease import LEASE, Lease, LeaseLost
from shards.manifest import FORMAT_VERSION, MANIFEST, Manifest
from shards.part import publish_json
from shards.publish import fsync_folder
from shards.quarantine import QUARANTINE
from shards.record import COMMITS, SUMS, encode_json
from shards.side_table import FIELDS, copy_tables
from shards.store import HUB_IS_READ, Store, is_remote, open_store, temporary_name
from shards.writable import require_writable

MODEL = "model"
"""The last thing that a run writes into its folder."""
SHARD_FOLDERS = ("", COMMITS, SUMS, LEASE, TOKENIZER, FIELDS, f"{QUARANTINE}/rows", f"{QUARANTINE}/failed")
"""Where the writers of a shard folder have temporary files."""
ALIASES = {"s3a": "s3", "gcs": "gs"}  # two names of one protocol
NAMED_DIFFERENCES = 3
NO_NAMES: Mapping[str, str] = MappingProxyType({})
_HASH = re.compile(r"[0-9a-f]{40,}")
_IGNORED = ("lost+found",)  # in the root of a mounted disk


@contextlib.contextmanager
def writing(
    folder: Store | Path | str,
    on_wait: Callable[[str], None] = lambda line: None,
    temporary: tuple[str, ...] = (LEASE,),
) -> Iterator[Lease]:
    """Be the only writer of `folder` for the block, which is made where it does not exist.

    RuntimeError names the host and pid that write to it now. The block calls lease.check() before it publishes or
    deletes something, which raises LeaseLost once another process has taken the folder over. on_wait: told where it takes
    a while to see that a writer on another machine is dead. temporary: folders in it whose temporary files, of writers
    that died, are deleted before the block and after it.
    """
    out = open_store(folder)
    lease = Lease(out).acquire(on_wait)
    try:
        _clean(out, temporary)
        yield lease
    finally:
        with contextlib.suppress(LeaseLost, OSError):
            lease.check()
            _clean(out, temporary)
        lease.release()


def _clean(out: Store, temporary: tuple[str, ...]) -> None:
    for name in temporary:
        out.clean(name)


def require_empty(folder: Store | Path | str, record: str, what: str) -> None:
    """ValueError where `folder` holds something and no `record`, the file that every folder of its kind begins with.

    what: the kind, for the message. Names that begin with a dot or an underscore do not count.
    """
    out = open_store(folder)
    if out.size(record) is not None:
        return
    names = out.names()
    if out.local is not None and out.local.is_dir():
        names = sorted(os.listdir(out.local))
    foreign = [name for name in names if not name.startswith((".", "_")) and name not in _IGNORED]
    if foreign:
        raise ValueError(
            f"{out.url}: is not empty and not {what} (it has {foreign[0]}); choose another --out or empty it"
        )


def as_begun(out: Store, manifest: Manifest) -> Manifest:
    """The plan in the format that `out` was begun in: an earlier release may have left a folder of format 1 half written.

    A folder has parts of one format; in a new one this is the newest.
    """
    version = FORMAT_VERSION if out.size(MANIFEST) is None else Manifest.read(out).format_version
    return replace(manifest, format_version=version)


def begin_shards(shards: ShardFolder, out: Store, manifest: Manifest, lease: Lease) -> ShardFolder:
    """Freeze `manifest` in `out`, with a copy of the tokenizer of `shards` and of its list of ids, unless it is frozen there."""
    if out.size(MANIFEST) is None:
        lease.check()
        out.remove(TOKENIZER)  # of a run that died while it copied one
        shards.copy_tokenizer_to(out)
        out.remove(FIELDS)
        copy_tables(shards, out)
        crash_point("output.begun")
        lease.check()
        manifest.write(out)
    return ShardFolder(out)


def instead_of(there: ShardFolder) -> str:
    """The remedy where a shard folder is in the way, which says what would be lost with it."""
    manifest = there.manifest
    names = ", ".join(map(repr, manifest.references))
    rows = f"{'selected' if manifest.selections else 'packed'} rows {f'with log-probs of {names}' if names else ''}"
    rows = f"{rows.strip()}{', unfinished' if there.missing_parts() else ''}"
    return f"choose another --out; that folder holds {rows}: delete it only if nothing needs them"


@contextlib.contextmanager
def writing_run(
    out: Path,
    what: str,
    first: bool = True,
    on_wait: Callable[[str], None] = lambda line: None,
    goes_on: bool = False,
) -> Iterator[Lease | None]:
    """Be the only writer of the folder of a run for the block, as `writing`, on the first of its processes.

    None on the other processes, and where the run is finished: it writes no more, unless it `goes_on`. what: the kind of
    run, for the ValueError where the folder holds something else.
    """
    if not first or ((out / MODEL).exists() and not goes_on):
        yield None
        return
    if (out / MANIFEST).exists():
        raise ValueError(f"{out}: is a shard folder and not {what}; choose another --out")
    require_empty(out, RUN, what)
    with writing(out, on_wait) as lease:
        yield lease


def read_record(folder: Store | Path | str) -> dict[str, Any] | None:
    """What the folder of a run was made of, None where none has begun in it."""
    out = open_store(folder)
    try:
        value: dict[str, Any] = json.loads(out.read(RUN))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{out.where(RUN)}: not valid JSON ({error}); restore it, or choose another --out") from None
    return value


def write_record(folder: Store | Path | str, settings: dict[str, Any]) -> None:
    """Freeze what the run in `folder` is made of, before its first step; a run that goes on keeps what it has."""
    out = open_store(folder)
    if out.size(RUN) is None:
        publish_json(out, RUN, encode_json(settings), "")


def replace_record(folder: Path, record: dict[str, Any]) -> None:
    """Write another record in place of the one of a run that its writer holds the lease of; whole or not at all."""
    temporary = temporary_name(folder / RUN)
    with open(temporary, "wb") as file:
        file.write(encode_json(record))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / RUN)
    fsync_folder(folder)


def refuse_other(
    where: str,
    what: str,
    ours: dict[str, Any],
    theirs: dict[str, Any],
    remedy: str = "choose another --out",
    options: Mapping[str, str] = NO_NAMES,
    hints: Mapping[str, str] = NO_NAMES,
) -> None:
    """ValueError where the folder `where` was made of `theirs` and `ours` is asked for: the first field, both values.

    what: the kind of thing that it holds. options: what the user calls a field. hints: more about a field.
    """
    found = differences(ours, theirs)
    if not found:
        return
    field, how = found[0]
    others = [options.get(name, name) for name, _ in found[1:]]
    also = f" (also: {', '.join(others[:NAMED_DIFFERENCES])}" if others else ""
    also += f" and {len(others) - NAMED_DIFFERENCES} more" if len(others) > NAMED_DIFFERENCES else ""
    raise ValueError(
        f"{where}: holds another {what}: {options.get(field, field)} {how}{hints.get(field, '')}{also}"
        f"{')' if also else ''}; {remedy}"
    )


def differences(ours: Any, theirs: Any, field: str = "") -> list[tuple[str, str]]:
    """The fields in which two JSON values differ, each with how: `seq_len`, `is 64 there, 128 asked for now`."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        names = [*ours, *(name for name in theirs if name not in ours)]
        return [
            difference
            for name in names
            for difference in differences(ours.get(name), theirs.get(name), f"{field}.{name}" if field else name)
        ]
    if isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = enumerate(zip(ours, theirs))
        return [difference for index, pair in pairs for difference in differences(*pair, f"{field}[{index}]")]
    if ours == theirs:
        return []
    if isinstance(ours, list) and isinstance(theirs, list):
        return [(field, f"has {len(theirs)} entries there, {len(ours)} asked for now")]
    now = "not set now" if ours is None else f"{_text(ours)} asked for now"
    return [(field, f"is {'not set' if theirs is None else _text(theirs)} there, {now}")]


def _text(value: Any) -> str:
    if isinstance(value, dict | list):
        return f"{len(value)} {'fields' if isinstance(value, dict) else 'entries'}"
    if isinstance(value, str):
        return f"{value[:12]}.." if _HASH.fullmatch(value) else repr(value)
    return json.dumps(value)


def same_folder(one: str | Path, other: str | Path) -> bool:
    """Whether two paths or URLs mean one folder, through links, slashes and other names of a protocol.

    What is on this machine exists: a name of the hub may look like a path.
    """
    if is_remote(one) or is_remote(other):
        return is_remote(one) and is_remote(other) and _plain_url(one) == _plain_url(other)
    with contextlib.suppress(OSError):  # where one of them does not exist
        return os.path.samefile(*(str(path).removeprefix("file://") for path in (one, other)))
    return False


def _plain_url(url: str | Path) -> tuple[str, ...]:
    protocol, _, path = str(url).partition("://")
    return (ALIASES.get(protocol, protocol), *(piece for piece in path.split("/") if piece not in ("", ".")))


def require_new_folder(out: str | Path, command: str, **inputs: str | Path | None) -> None:
    """ValueError where --out is the folder of an input, or in a store that is only read. inputs: by the name of the option, such as shards."""
    if str(out).startswith("hf:/"):  # a Path has one slash
        raise ValueError(HUB_IS_READ.format(f"--out {out}"))
    require_writable(out)
    for name, given in inputs.items():
        if given is not None and same_folder(out, given):
            raise ValueError(
                f"--out {out} is the folder of --{name.replace('_', '-')}; {command} writes a new folder and leaves that one "
                "as it is; choose another --out"
            )
