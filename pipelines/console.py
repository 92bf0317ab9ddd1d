"""What the commands share: exit codes, progress bars, lines beside them."""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

DONE, FAILED, BAD_USAGE, STOPPED = 0, 1, 2, 3  # exit codes
ShouldStop = Callable[[], bool]


def quiet_libraries() -> None:
    """Keep the progress bars and advice of other libraries out of ours."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def progress_bar(**options: Any) -> Iterator[tqdm]:
    """A bar that shows itself on terminals and in logs, there at most every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10
    with tqdm(mininterval=interval, smoothing=0.1, dynamic_ncols=True, **options) as bar:
        yield bar


def note(line: str) -> None:
    """A line that does not break a progress bar."""
    tqdm.write(line, file=sys.stderr)


class BadUsage(ValueError):
    """What the user asks for cannot be meant: exit code 2, before anything has begun."""
