"""Settings of remit report."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.pages import check_page
from pipelines.report.runs import require_different


@dataclass(frozen=True)
class ReportConfig:
    """Show runs of training and post-training, one or several side by side, in one HTML page that needs no network."""

    run: Annotated[list[list[Path]], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Folder of a run (--out of remit train, sft, dpo or rl), finished or not."""
    out: Path = Path("report.html")
    """Page to write; one that is there is replaced."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not self.runs:
            raise ValueError("--run is not given, expected the folder of a run (--out of remit train)")
        require_different(self.runs)
        check_page("--out", self.out)

    @property
    def runs(self) -> list[Path]:
        """Those of all --run options, in their order."""
        return [folder for folders in self.run for folder in folders]
