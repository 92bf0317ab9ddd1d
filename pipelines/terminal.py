"""What the commands share: exit codes, progress bars, lines beside them, tables, and what a signal does."""

import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tqdm import tqdm

from shards.manifest import Manifest

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
        try:
            yield bar
        except BaseException:
            bar.leave = bar.leave and bar.n > bar.initial  # a bar that never moved says nothing beside an error
            raise


def note(line: str) -> None:
    """A line that does not break a progress bar."""
    tqdm.write(line, file=sys.stderr)


def counted(number: int, what: str) -> str:
    """1 row, 2 rows."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def print_table(
    console: Console, headers: Sequence[str], lines: Iterable[Sequence[str]], title: str = "", left: int = 1,
    width: int | None = None, ruled: bool = True,
) -> None:  # fmt: skip
    """Print a table of plain texts, without a header where all headers are empty.

    left: columns that are aligned to the left; width: most characters of the first column, which is then cut; ruled: with
    lines between the columns.
    """
    table = Table(show_edge=False, pad_edge=False, header_style="bold", show_header=any(headers))
    if not ruled:
        table.box = None
    for index, header in enumerate(headers):
        cut: dict[str, Any] = {"no_wrap": True, "max_width": width} if width and index == 0 else {"overflow": "fold"}
        table.add_column(header, justify="left" if index < left else "right", **cut)
    for line in lines:
        table.add_row(*map(Text, line))
    console.print(*(["", Text(title, style="bold")] if title else []), table, sep="\n")


class BadUsage(ValueError):
    """What the user asks for cannot be meant: exit code 2, before anything has begun."""


def tokens_summary(manifest: Manifest) -> str:
    """One line about the tokens of packed rows: what documents begin and end with, what the tokenizer did to the text."""
    tokenizer, files = manifest.tokenizer, manifest.corpus
    end = f"{tokenizer['eos_token']} ({tokenizer['eos_token_id']})" if "eos_token" in tokenizer else "EOS"
    bos = tokenizer.get("bos_token_id")
    begin = "without BOS" if bos is None else f"with {tokenizer['bos_token']} ({bos})"
    line = f"documents begin {begin} and end with {end}"
    sampled, changed, unknown = (
        sum(getattr(file, name) or 0 for file in files)
        for name in ("documents_sampled", "documents_changed", "unknown_tokens")
    )
    if sampled:
        line += f"; {sampled - changed:,} of {sampled:,} sampled documents decode to what they were"
        if all(file.unknown_tokens is not None for file in files):  # of selected rows it is not known
            line += f", {unknown / max(1, manifest.tokens):.2%} of the tokens are unknown"
    return line


class SignalReceived(BaseException):
    """A signal arrived; not an Exception, so that nothing on the way swallows it."""


class StopRequest:
    """Handles both signals from `install` on. graceful: the command asks `requested` at safe points."""

    def __init__(self, graceful: bool) -> None:
        self.name: str | None = None
        self._graceful = graceful

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def requested(self) -> bool:
        return self.name is not None

    def _handle(self, number: int, frame: Any) -> None:
        again, self.name = self.requested(), signal.Signals(number).name
        if again or not self._graceful:
            raise SignalReceived(self.name)
        # by write, since the signal may have come in the middle of a print
        os.write(2, f"\n{self.name}: finishing what is in work; a second signal leaves at once\n".encode())
        return
