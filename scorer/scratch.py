"""A temporary folder of an engine's own, which goes when the engine's process ends, however it ends.

vLLM leaves files in the temporary folder (vllm_dist_..., over which an engine's processes find each other) and engines end
by kill -9: when a run is done, when they hang, when a machine runs out of memory.
"""

import getpass
import os
import subprocess
import sys
import tempfile
from pathlib import Path

# Reads until the last process that holds the other end has gone. Twice removed, so that it is nobody's child: Ray ends
# those of its workers.
_REMOVER = """
import os, shutil, sys
if os.fork():
    os._exit(0)
os.setsid()
sys.stdin.buffer.read()
shutil.rmtree(sys.argv[1], ignore_errors=True)
"""
_held: list[object] = []  # what must stay open for as long as this process lives


def own_temporary_folder() -> Path:
    """Make a folder, have tempfile and child processes of this one use it from now on, and see to its removal."""
    # compiled kernels are worth keeping, and stay where torch would have put them
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container whose user has no name
        user = str(os.getuid())
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_{user}")
    folder = tempfile.mkdtemp(prefix="remit-engine-")
    remover = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _REMOVER, folder],
        stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd="/",
    )  # fmt: skip
    remover.wait()
    _held.append(remover)
    os.environ["TMPDIR"] = tempfile.tempdir = folder
    return Path(folder)
