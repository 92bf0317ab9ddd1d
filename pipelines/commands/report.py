"""remit report: training runs as one page."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.pages import check_page
from pipelines.report.runs import require_different
from pipelines.terminal import DONE, ShouldStop, progress_bar


@dataclass(frozen=True)
class ReportConfig:
    """Show training runs, one or several side by side, in one HTML page that needs no network."""

    run: Annotated[list[list[Path]], tyro.conf.UseAppendAction] = field(default_factory=list)
    """Folder of a run (--out of remit train), finished or not."""
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


def run(config: ReportConfig, should_stop: ShouldStop) -> int:
    from pipelines.report.page import write_report

    sizes = [(folder / "metrics.jsonl").stat().st_size for folder in config.runs if (folder / "metrics.jsonl").exists()]
    with progress_bar(desc="report", unit="B", unit_scale=True, total=sum(sizes)) as bar:

        def progress(size: int) -> None:
            bar.update(size)

        runs = write_report(config, progress)
    names = ", ".join(
        f"{run.name} ({len(run.steps):,} steps{'' if run.finished else ', not finished'})" for run in runs
    )
    print(f"report of {names} -> {config.out} ({config.out.stat().st_size / 1e6:.1f} MB)")
    return DONE
