"""The paper's claims against what the seeds found: tables as Markdown, and a page that has the plots too.

    python -m benchmarks.lab.report LAB [LAB ...]

In: LAB/results.parquet of one or several folders of make lab. Out: LAB/report.md and LAB/report.html in the first.

To keep a summary written by hand, put the line "<!-- What follows is written by python -m benchmarks.lab.report; what
stands above is kept. -->" below it in report.md: only what follows the line is replaced.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup
from plotly.io import to_html
from plotly.offline import get_plotlyjs

from benchmarks.lab.claims import VERDICTS, Finding, is_counted, judge_all
from benchmarks.lab.plots import make_plots
from benchmarks.lab.results import Results, read
from benchmarks.lab.tables import Table, make_tables
from shards.store import LocalStore

TITLE = "The paper's claims at laptop scale"
MARK = "<!-- What follows is written by python -m benchmarks.lab.report; what stands above is kept. -->"
PICTURES = {
    "Difference in accuracy from NTP": "differences.png",
    "Accuracy during mid-training": "during.png",
    "Through post-training": "post-training.png",
}
LIMITS = [
    "The models have less than a million parameters and are tested on one family of generated problems; the paper's have "
    "one to three billion and are tested on ten tasks. What holds here need not hold there, and what fails here may hold.",
    "A seed changes everything at once: data, initial weights, order, sampling. The intervals are over such repetitions of "
    "the whole experiment. They assume differences that are about normal, which a handful of seeds cannot confirm.",
    "The reference of ReMiT and KD, from which the KL is measured too, was made from the NTP arm of the same seed by SFT, "
    "DPO and RL. What the two share by chance makes NTP look closer to it.",
    "There are few kinds of problems: the easy ones have about 400 different held-out computations, told in different words.",
    'An effect smaller than half the interval cannot be seen here. "Not decided" does not mean "no effect".',
    "Tokens until an accuracy is reached are read from curves of eight points in which accuracy rises late, so that a sixfold "
    "saving could hardly show. The time that the paper saves is not tested: references are scored before training here.",
    "All arms share one learning rate, one number of steps and one corpus (MiniPLM trains on a part of it). The learning rate "
    "was the best of a sweep over NTP, which favours NTP; an arm that needs other settings is at a disadvantage.",
]


def lead(results: Results, findings: Sequence[Finding]) -> list[str]:
    """What is counted, and what a reader must know before any number."""
    verdicts = Counter(finding.verdict for finding in findings if finding.claim.kind == "paper")
    counts = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS if verdicts[verdict])
    num, tested = len(results.seeds), [finding for finding in findings if is_counted(finding)]
    lines = [
        f"{num} seed{'s' if num > 1 else ''} at size {results.size}. The {verdicts.total()} claims of the paper: {counts}.",
    ]
    if tested:
        survivors = sum(finding.survives for finding in tested)
        lines.append(f"Tests that stay significant after Holm's correction: {survivors} of {len(tested)}.")
    if results.size != "full":
        lines.append(
            "This size shows that the parts work together. Its models learn next to nothing: ignore its numbers."
        )
    if num == 1:
        lines.append("One seed has no interval: its differences may be chance, and nothing is claimed from them.")
    if len(results.code) > 1:
        lines.append("Not all stages ran with the same code: see the set-up.")
    return lines


def lists(results: Results) -> list[tuple[str, list[str]]]:
    """What ends the report: titles with their lines."""
    return [("What this does not show", LIMITS), *([("Left out", results.left_out)] if results.left_out else [])]


def to_markdown(results: Results, findings: Sequence[Finding], summary: str = "") -> str:
    """The report without its plots. summary: Markdown that replaces the title and the lead."""
    parts = [summary.strip(), MARK] if summary else [f"# {TITLE}", *lead(results, findings)]
    for table in make_tables(results, findings):
        parts += [f"## {table.title}", table.note, markdown_table(table)]
    for title, lines in lists(results):
        parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    return "\n\n".join(parts) + "\n"


def markdown_table(table: Table) -> str:
    """A table as GitHub renders it."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|").replace("*", "\\*") for cell in cells) + " |"

    return "\n".join([line(table.columns), "|" + "---|" * len(table.columns), *(line(row) for row in table.rows)])


def to_page(results: Results, findings: Sequence[Finding]) -> str:
    """A self-contained page; its policy keeps it from loading anything."""
    plots = [
        {
            "title": plot.title,
            "note": plot.note,
            "html": Markup(
                to_html(
                    plot.figure, full_html=False, include_plotlyjs=False, div_id=f"plot-{number}",
                    config={"displayModeBar": False, "responsive": True},
                )
            ),
        }
        for number, plot in enumerate(make_plots(results))
    ]  # fmt: skip
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    return environment.get_template("report.html").render(
        title=TITLE, lead=lead(results, findings), tables=make_tables(results, findings), plots=plots,
        lists=lists(results), plotly=Markup(get_plotlyjs()),
    )  # fmt: skip


def write_pictures(results: Results, folder: Path) -> None:
    """The three plots that docs/lab.md shows, drawn by plotly with kaleido and a Chrome or Chromium."""
    for plot in make_plots(results):
        if name := PICTURES.get(plot.title):
            figure = plot.figure.update_layout(paper_bgcolor="#ffffff", font_color="#1d2329")
            figure.write_image(folder / name, width=900, height=plot.figure.layout.height, scale=1.2)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.lab.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("labs", type=Path, nargs="+", metavar="LAB", help="folder of make lab; several are joined")
    parser.add_argument("--html", type=Path, help="page to write in place of LAB/report.html")
    parser.add_argument("--pictures", action="store_true", help="also write the PNG of docs/lab.md into the first LAB")
    config = parser.parse_args(arguments)
    folder: Path = config.labs[0]
    try:
        results = read(config.labs)
        findings = judge_all(results)
        markdown = folder / "report.md"
        summary, mark, _ = markdown.read_text(encoding="utf-8").partition(MARK) if markdown.exists() else ("", "", "")
        page = config.html or folder / "report.html"
        for path, text in (
            (markdown, to_markdown(results, findings, summary if mark else "")),
            (page, to_page(results, findings)),
        ):
            LocalStore(path.parent).replace(path.name, text.encode())
        if config.pictures:
            write_pictures(results, folder)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {' '.join(str(error).split())}")
    print("\n".join([*lead(results, findings), f"-> {markdown}, {page}"]))


if __name__ == "__main__":
    main()
