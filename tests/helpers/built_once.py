"""Inputs of many tests: each is built once for all processes of a test run, and nobody changes it."""

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

BuiltOnce = Callable[[str, Callable[[Path], object]], Path]


def files_of(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of the last change of each file in a folder."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): (path.stat().st_size, path.stat().st_mtime_ns) for path in files}


@contextmanager
def builder(root: Path) -> Iterator[BuiltOnce]:
    """get(NAME, build): the folder root/NAME, which `build(folder)` fills unless another process has.

    Tests copy what they want to change: at the end of the block the files must be those that were built.
    """
    built: dict[Path, dict[str, tuple[int, int]]] = {}

    def get(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # what is left of a build that failed
                build(folder)
                done.write_text(json.dumps(files_of(folder)))
        built[folder] = {name: tuple(facts) for name, facts in json.loads(done.read_text()).items()}
        return folder

    yield get
    for folder, before in built.items():
        assert files_of(folder) == before, f"a test has changed {folder}, which others read"
