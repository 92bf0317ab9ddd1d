"""Settings of remit inspect."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from pipelines.pages import check_page
from pipelines.settings import OneFolder
from shards.ranges import require_at_least, require_not_negative
from trainer.objectives.settings import check_epsilon


@dataclass(frozen=True)
class InspectConfig(OneFolder):
    """Show what a shard folder is, or some of its rows: in the terminal, or as a page that colours each token."""

    row: int | None = None
    """Row to show, counted over all parts; without it and the next three, the folder's provenance."""
    rows: str | None = None
    """Rows to show, first and last with two dots between: 8..11."""
    doc: int | None = None
    """Document whose rows to show, by its ordinal in its corpus file."""
    search: str | None = None
    """Show the first rows whose decoded text has this in it, and mark it."""
    source: int | None = None
    """Corpus file that --doc or --search looks in, by its number in the folder's provenance."""
    limit: int = 20
    """Rows that --doc and --search show at most."""
    tokens: int = 64
    """Tokens of each row to show in the terminal, with --search those around its first match; 0: all."""
    html: Path | None = None
    """File to write the rows to as one page: tokens coloured by log p(reference) - log p(base), or by ReMiT weight."""
    reference: str = "rl"
    """Name of the reference whose log-probs the page compares with the base's."""
    base: str | None = None
    """Name of the base's stored log-probs, for the page; default: base, where the folder has it."""
    model: str | None = None
    """Base model that computes its log-probs of the rows now, instead of stored ones; a folder, or NAME or
    NAME@REVISION of the hub."""
    epsilon: float = 0.2
    """Clip of the ReMiT weights on the page; inf: no clip."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        _ = self.path
        chosen = [f"--{name}" for name in ("row", "rows", "doc", "search") if getattr(self, name) is not None]
        if len(chosen) > 1:
            raise ValueError(f"{' and '.join(chosen)} are given, expected one of them")
        if self.html is not None and not chosen:
            raise ValueError("--html is given without rows, expected --row, --rows, --doc or --search beside it")
        if self.html is None and (self.base is not None or self.model is not None):
            raise ValueError("--base and --model are for the page; give --html FILE too")
        if self.base is not None and self.model is not None:
            raise ValueError(
                "--base and --model are both given, expected one: a stored column, or a model that runs now"
            )
        if self.base is not None and self.base == self.reference:
            raise ValueError(f"--reference and --base are both {self.base!r}, expected the names of two columns")
        if self.search == "":
            raise ValueError("--search is empty, expected text to look for")
        if self.source is not None and self.doc is None and self.search is None:
            raise ValueError("--source is given without --doc or --search, which it narrows")
        require_at_least(self, 0, "row", "doc", "source")
        require_at_least(self, 1, "limit")
        require_not_negative(self, "tokens", expected="0 (all) or more")
        check_epsilon("--epsilon", self.epsilon)
        if self.html is not None:
            check_page("--html", self.html)
        _ = self.row_range

    @property
    def row_range(self) -> tuple[int, int] | None:
        """First and last row of --row or --rows."""
        if self.rows is None:
            return None if self.row is None else (self.row, self.row)
        match = re.fullmatch(r"([0-9]{1,18})\.\.([0-9]{1,18})", self.rows)
        if match is None or int(match[1]) > int(match[2]):
            raise ValueError(f"--rows is {self.rows!r}, expected the first and the last row, for instance 8..11")
        return int(match[1]), int(match[2])
