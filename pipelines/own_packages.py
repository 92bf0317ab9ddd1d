"""See to it that `import trainer` means remit's own package, whatever else of that name lies where the user stands.

shards, scorer, trainer and pipelines are common names. A folder of the user's own may hold files and folders of the same
names; only `python -m` and PYTHONPATH put such a folder on Python's path.
"""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent  # of the packages
OTHERS = ("shards", "scorer", "trainer")


def leave_current_folder() -> None:
    """Take the current folder off Python's path where `python -m pipelines...` has put it there.

    Not for other programs, which may have modules of their own beside them.
    """
    runs_us = sys.argv[:1] == ["-m"] and any(
        before == "-m" and word.partition(".")[0] == "pipelines"
        for before, word in zip(sys.orig_argv, sys.orig_argv[1:])
    )
    if runs_us and not sys.flags.safe_path and Path(sys.path[0] or os.curdir).resolve() != ROOT:
        del sys.path[0]


def what_is_in_the_way() -> str | None:
    """One line that names a file or folder which Python would take for a package of ours, or None."""
    for name in OTHERS:
        loaded = sys.modules.get(name)
        spec = loaded.__spec__ if loaded is not None else importlib.util.find_spec(name)
        if spec is None:
            return f"{ROOT / name} is not on Python's path; install remit from its checkout: pip install -e ."
        # a folder without __init__.py has no origin
        found = Path(spec.origin or next(iter(spec.submodule_search_locations or [name]))).resolve()
        if found != ROOT / name / "__init__.py":
            return (
                f"{found} is in the way of remit's own package {name} ({ROOT / name}): its folder comes first on Python's "
                "path; rename it, or take that folder off PYTHONPATH"
            )
    return None
