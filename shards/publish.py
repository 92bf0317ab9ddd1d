"""Give a finished file its name without ever replacing another, on filesystems with hard links and on those without.

In: a temporary file, whole and on disk, in the folder where it is to stay. Out: the file under its name, or
FileExistsError. Both ways, a hard link and a rename that does not replace, are one step for the kernel: whoever looks
sees a whole file or none, and of two writers one is told that the name is taken.
"""

import ctypes
import errno
import os
import secrets
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
AT_FDCWD = -100  # paths are relative to the current folder
RENAME_NOREPLACE = 1
# the name is taken or a file is gone; the disk is full or may not be written to: another way would not help
FINAL = {errno.EEXIST, errno.ENOENT, errno.ENOSPC, errno.EDQUOT, errno.EROFS}
# what filesystems answer that cannot have a folder written to disk; an error of the disk itself is EIO
NO_FOLDER_SYNC = {
    *(errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR, errno.EPERM, errno.EACCES),
}  # fmt: skip


def give_name(temporary: Path, final: Path) -> None:
    """Call `temporary` `final`; FileExistsError where that name is taken. With a hard link, `temporary` stays too.

    OSError in one line where the filesystem can do neither, as gcsfuse and s3fs-fuse: a check followed by a rename
    could replace what another process has written in between.
    """
    try:
        os.link(temporary, final)  # unlike rename, link never replaces what is there
    except OSError as error:
        if error.errno in FINAL:
            raise
        try:
            _rename_without_replacing(temporary, final)
        except OSError as other:
            if other.errno in FINAL:
                raise
            raise OSError(
                f"{final.parent}: its filesystem has neither hard links ({os.strerror(error.errno or 0)}) nor a rename that never "
                f"replaces a file ({os.strerror(other.errno or 0)}), one of which keeps two commands from overwriting each "
                "other; choose a folder on another filesystem, or for a mounted object store its URL, s3:// or gs://",
            ) from None


def _rename_without_replacing(temporary: Path, final: Path) -> None:
    """renameat2 of Linux; OSError with ENOSYS where there is none."""
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), str(final))
    old, new = os.fsencode(temporary), os.fsencode(final)
    if rename(AT_FDCWD, old, AT_FDCWD, new, RENAME_NOREPLACE) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), str(temporary), None, str(final))


def fsync_folder(folder: Path) -> None:
    """Make renames and links in `folder` survive a power cut, as far as its filesystem can."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError as error:
        if error.errno in NO_FOLDER_SYNC:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_FOLDER_SYNC:
            raise OSError(error.errno, os.strerror(error.errno or 0), str(folder)) from None
    finally:
        os.close(descriptor)


def temporary_name(final: Path) -> Path:
    """A name in the same folder that no reader looks at and no other process uses."""
    return final.with_name(f".{final.name}.{os.getpid()}-{secrets.token_hex(4)}{TEMPORARY_SUFFIX}")
