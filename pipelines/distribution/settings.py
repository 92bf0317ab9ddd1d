"""Settings of remit distribution. Light to import, so that --help answers at once."""

from dataclasses import dataclass, field
from pathlib import Path

from pipelines.pages import check_output_file, check_page
from pipelines.settings import OneFolder
from shards.ranges import require_at_least, require_not_negative


@dataclass(frozen=True)
class DistributionConfig(OneFolder):
    """Show how stored log-probs, and their differences, are distributed: as tables and as a page with plots.

    Of two or more columns of a folder, for instance the base before and after mid-training and the reference; with the KL
    divergence from the reference where the most probable tokens are stored.
    """

    reference: str = "rl"
    """Name of the reference's log-probs (--name of remit score): the others are compared with it."""
    columns: str | None = None
    """Names of the others, with commas between, for instance base,after; default: all that the folder has. Each is also
    compared with the one before it."""
    html: Path | None = None
    """File to write the page with the plots to."""
    json: Path | None = None
    """File to write the figures to, as JSON."""
    rows: int = 10_000
    """Random rows to read; 0: all."""
    seed: int = 0
    """Decides which rows are read."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        _ = self.path
        names = self.column_names
        if names is not None and (not names or len({*names, self.reference}) <= len(names)):
            raise ValueError(
                f"--columns is {self.columns!r}, expected names of columns beside the reference {self.reference!r}, each "
                "once, with commas between"
            )
        require_not_negative(self, "rows", expected="0 (all) or more")
        require_at_least(self, 0, "seed")
        if self.html is not None:
            check_page("--html", self.html)
        if self.json is not None:
            check_output_file("--json", self.json)

    @property
    def column_names(self) -> list[str] | None:
        """Those of --columns, in its order; None for all."""
        if self.columns is None:
            return None
        return [name.strip() for name in self.columns.split(",") if name.strip()]
