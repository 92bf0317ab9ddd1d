"""What the commands share: exit codes, progress bars, lines beside them, tables, and what a signal does."""

import functools
import logging
import math
import os
import select
import signal
import sys
import threading
import time
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
LOG_SECONDS = 10.0  # between two lines of progress in a file
LEAVE_SECONDS = 15.0  # beyond the grace period, after which a command that was told to stop ends whatever it waits for


def quiet_libraries() -> None:
    """Keep the progress bars and advice of other libraries out of ours."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    import datasets
    import transformers

    # transformers imports torchao, where it is installed, and that tells what it lacks
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


class LogBar(tqdm):
    """Progress in a file: a line of its own every ten seconds, whether or not something has moved."""

    def __init__(self, **options: Any) -> None:
        self._ended = threading.Event()
        super().__init__(mininterval=1.0, ncols=0, **options)  # the interval in which it looks at its speed
        self._lines = None if self.disable else threading.Thread(target=self._print_lines, name="progress", daemon=True)
        if self._lines:
            self._lines.start()

    def _print_lines(self) -> None:
        while not self._ended.wait(LOG_SECONDS):
            self.print_line()

    def print_line(self) -> None:
        """The state as it is now."""
        say(self.format_meter(**self.format_dict).strip())

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        pass  # the thread does

    def clear(self, nolock: bool = False) -> None:
        pass  # nothing to make room for

    def close(self) -> None:
        if not self._ended.is_set() and self._lines:
            self._ended.set()
            self._lines.join()
            if self.leave:
                self.print_line()
            self.leave, self.delay = False, math.inf  # for tqdm it never showed itself: nothing to wipe out
        super().close()


@contextmanager
def progress_bar(**options: Any) -> Iterator[tqdm]:
    """A bar that shows itself on terminals; in files a line every ten seconds."""
    kind: Any = tqdm if sys.stderr.isatty() else LogBar
    if kind is tqdm:
        options = {"mininterval": 0.2, "dynamic_ncols": True} | options
    with kind(smoothing=0.1, **options) as bar:
        try:
            yield bar
        except BaseException:
            if not bar.disable:  # else it has neither
                bar.leave = bar.leave and bar.n > bar.initial  # a bar that never moved says nothing beside an error
            raise


@functools.cache  # once in a process: each call would wrap what the one before has put there
def library_bars_as_lines() -> None:
    """Have the progress bars of libraries do in files what ours do there."""
    plain_close = tqdm.close

    def display(bar: tqdm, msg: str | None = None, pos: int | None = None) -> None:
        say(bar.format_meter(**bar.format_dict).strip())

    def close(bar: tqdm) -> None:
        if not bar.disable and bar.leave:
            display(bar)
        bar.delay = math.inf
        plain_close(bar)

    every = functools.partialmethod(tqdm.__init__, mininterval=LOG_SECONDS, ncols=0)
    tqdm.__init__, tqdm.display, tqdm.close = every, display, close  # type: ignore[assignment, method-assign]
    tqdm.clear = lambda bar, nolock=False: None  # type: ignore[assignment, method-assign]


def say(line: str) -> None:
    """A line of a log: with date and time."""
    print(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}", file=sys.stderr, flush=True)


def note(line: str) -> None:
    """A line that does not break a progress bar; in a file with date and time."""
    if sys.stderr.isatty():
        tqdm.write(line, file=sys.stderr)
    else:
        say(line)


def timed_note(line: str) -> None:
    """A line of a command that runs for days: with the time on terminals too."""
    note(f"{time.strftime('%H:%M:%S')} {line}" if sys.stderr.isatty() else line)


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
    if manifest.conversations:
        without, packed = sum(file.without_eos or 0 for file in files), manifest.documents["packed"]
        line = f"documents begin {begin} and end as the chat template ends them, {packed - without:,} of {packed:,} with {end}"
    sampled, changed, unknown = (
        sum(getattr(file, name) or 0 for file in files)
        for name in ("documents_sampled", "documents_changed", "unknown_tokens")
    )
    if sampled:
        line += f"; {sampled - changed:,} of {sampled:,} sampled documents decode to what they were"
        if all(file.unknown_tokens is not None for file in files):  # of selected rows it is not known
            line += f", {unknown / max(1, manifest.tokens):.2%} of the tokens are unknown"
    if manifest.predict and all(file.predicted_tokens is not None for file in files):
        predicted = sum(file.predicted_tokens or 0 for file in files)
        line += f"; {predicted / max(1, manifest.tokens):.1%} of the tokens are to be predicted"
    elif manifest.predict:
        line += "; not all tokens are to be predicted"
    if manifest.packing:
        share = manifest.unused_positions / max(1, manifest.rows * manifest.seq_len)
        line += f"; rows are whole documents, {share:.2%} of their positions are unused"
    return line


class SignalReceived(BaseException):
    """A signal arrived; not an Exception, so that nothing on the way swallows it."""


class StopRequest:
    """Handles both signals from `install` on. graceful: the command asks `requested` at safe points.

    grace_seconds: where the command has such a period. LEAVE_SECONDS after it the process ends with STOPPED, whatever it
    waits for: a store or a cluster that is away, a filesystem that hangs. Nothing that is published then is half there.
    """

    def __init__(self, graceful: bool, grace_seconds: float | None = None, on_deadline: str = "") -> None:
        self.name: str | None = None
        self._graceful, self._grace_seconds, self._last_words = graceful, grace_seconds, on_deadline
        self._wakeup: tuple[int, int] | None = None

    def install(self) -> None:
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)
        if self._grace_seconds is not None:
            # the handlers wait until the main thread is back from what it called; this descriptor is written to at once
            self._wakeup = os.pipe()
            os.set_blocking(self._wakeup[1], False)
            signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)
            threading.Thread(target=self._leave_in_time, args=(self._wakeup[0],), name="signals", daemon=True).start()

    def close(self) -> None:
        """The command has ended in time."""
        if self._wakeup is not None:
            signal.set_wakeup_fd(-1)
            os.close(self._wakeup[1])
            self._wakeup = None

    def requested(self) -> bool:
        return self.name is not None

    def _leave_in_time(self, signals: int) -> None:
        number = b"?"
        while number and number[0] not in (signal.SIGTERM, signal.SIGINT):
            number = os.read(signals, 1)
        deadline = time.monotonic() + (self._grace_seconds or 0) + LEAVE_SECONDS
        while number and time.monotonic() < deadline:
            if select.select([signals], [], [], max(0.0, deadline - time.monotonic()))[0]:
                again = os.read(signals, 1)
                if not again:  # the command has ended
                    number = b""
                elif again[0] in (signal.SIGTERM, signal.SIGINT):
                    deadline = min(deadline, time.monotonic() + LEAVE_SECONDS)
        os.close(signals)
        if number:
            name = self.name or signal.Signals(number[0]).name
            os.write(2, f"\n{self._last_words.format(name=name)}\n".encode())
            os._exit(STOPPED)

    def _handle(self, number: int, frame: Any) -> None:
        again, self.name = self.requested(), signal.Signals(number).name
        if again or not self._graceful:
            raise SignalReceived(self.name)
        # by write, since the signal may have come in the middle of a print
        at = "" if sys.stderr.isatty() else time.strftime("%Y-%m-%d %H:%M:%S ")
        os.write(2, f"\n{at}{self.name}: finishing what is in work; a second signal leaves at once\n".encode())
        return
