"""remit distribution: how stored log-probs and their differences are distributed over a folder."""

import sys
from time import monotonic

from rich.console import Console

from pipelines.distribution.settings import DistributionConfig
from pipelines.pages import write_json, write_page
from pipelines.terminal import DONE, ShouldStop, print_table, progress_bar
from shards.folder import ShardFolder


def run(config: DistributionConfig, should_stop: ShouldStop) -> int:
    """The command: read, print, write --json and --html."""
    folder = ShardFolder(config.path)
    began, total = monotonic(), folder.manifest.rows  # a mistyped path is told before the imports
    from pipelines.distribution.figures import distribution_of_folder
    from pipelines.distribution.tables import summary, tables

    with progress_bar(desc="distribution", unit=" rows", total=min(config.rows or total, total)) as bar:

        def progress(rows: int, tokens: int) -> None:
            bar.set_postfix_str(f"{tokens / max(1e-9, monotonic() - began):,.0f} tokens/s", refresh=False)
            bar.update(rows - bar.n)

        figures = distribution_of_folder(folder, config, progress)
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 120  # a log has no width; numbers are not cut
    print(*summary(figures), sep="\n")
    for table in tables(figures):
        print_table(console, table.headers, table.lines, table.title)
        print(table.note)
    if config.json is not None:
        write_json(config.json, figures)
    if config.html is not None:
        from pipelines.distribution.page import render

        write_page(config.html, render(figures, str(config.path)))
        print(f"plots -> {config.html}")
    return DONE
