"""Report on the seeds that make lab has finished: python -P -m pipelines.lab.report LAB [LAB ...] --html FILE

Exit codes: 0 done, 1 failed, 2 bad usage.
"""

import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from pipelines.cli import fail
from pipelines.console import BAD_USAGE, FAILED

NAME = "lab.report"


@dataclass(frozen=True)
class LabReportConfig:
    """The paper's claims against what the seeds found."""

    labs: Annotated[list[Path], tyro.conf.Positional]
    """Folders of make lab, each with results/seed-N.json; seeds of several machines go together."""
    html: Path | None = None
    """Self-contained page to write, with plots; default: LAB/report.html in the first folder."""
    markdown: Path | None = None
    """Markdown to write; default: LAB/report.md in the first folder."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not self.labs:
            raise ValueError("no folder is given, expected one of make lab at least")


def write_report(config: LabReportConfig) -> list[str]:
    """Write both files; returns the sentences that lead them. ValueError for results that cannot be used."""
    from pipelines.lab.report.claims import judge_all
    from pipelines.lab.report.data import read_results
    from pipelines.lab.report.page import to_html, to_markdown
    from pipelines.lab.report.sentences import summary
    from shards.store import temporary_name

    results = read_results(config.labs)
    findings = judge_all(results)
    html, markdown = config.html or config.labs[0] / "report.html", config.markdown or config.labs[0] / "report.md"
    for path, text in ((html, to_html(results, findings)), (markdown, to_markdown(results, findings))):
        temporary = temporary_name(path)
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    return [*summary(results, findings), f"-> {html}, {markdown}"]


def main(arguments: list[str] | None = None) -> None:
    try:
        config = tyro.cli(
            LabReportConfig,
            prog=f"python -P -m pipelines.{NAME}",
            description=__doc__,
            args=arguments,
            use_underscores=False,
        )
    except ValueError as error:
        fail(NAME, BAD_USAGE, str(error))
    try:
        print("\n".join(write_report(config)))
    except Exception as error:
        if config.debug:
            traceback.print_exc()
        if isinstance(error, ValueError | OSError) and str(error):
            fail(NAME, FAILED, str(error))
        fail(NAME, FAILED, f"internal error, {type(error).__name__}: {error}; --debug shows where")


if __name__ == "__main__":
    main()
