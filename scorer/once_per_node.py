"""Weights hashed once per node: engines of one node, and those that replace them, share what the first has found.

A found fingerprint is kept in the temporary folder under what the files are: path, inode, size, times of content and of
inode. Nobody but the user can write there.
"""

import fcntl
import hashlib
import os
import tempfile
import time
from pathlib import Path

from shards.fingerprint import weights_fingerprint

SETTLED_SECONDS = 2.0  # a file changed less long ago may change again without its times showing it


def user_folder(name: str) -> Path:
    """A folder of this user alone in the temporary folder; OSError where somebody else has it."""
    folder = Path(tempfile.gettempdir()) / f"{name}-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise OSError(f"{folder}: belongs to somebody else; remove it, or set TMPDIR")
    return folder


def node_weights_fingerprint(model_folder: Path) -> str:
    """`weights_fingerprint` of a model folder; while one process of the node computes it, others wait for the result."""
    files = sorted(model_folder.glob("*.safetensors"))
    if not files:
        return weights_fingerprint(model_folder)  # raises, and says what is missing
    facts = [(f"{file.name} {file.resolve()}", file.stat()) for file in files]  # its name is hashed too
    is_settled = max(stat.st_ctime for _, stat in facts) < time.time() - SETTLED_SECONDS
    identity = "\n".join(
        f"{path} {s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}" for path, s in facts
    )
    try:
        place = user_folder("remit-fingerprints") / hashlib.sha256(identity.encode()).hexdigest()
        lock = os.open(place, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError:  # a full or foreign temporary folder costs only the time of hashing
        return weights_fingerprint(model_folder)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)  # goes with the process, however it ends
        known = os.pread(lock, 65, 0).decode("ascii", "replace")
        if is_settled and len(known) == 65 and known.endswith("\n"):
            return known[:64]
        found = weights_fingerprint(model_folder)
        try:
            os.pwrite(lock, f"{found}\n".encode(), 0)
        except OSError:
            pass
        return found
    finally:
        os.close(lock)
