"""remit inspect: what a shard folder is, or some of its rows, in the terminal or as a page."""

from typing import TYPE_CHECKING

from pipelines.inspect.settings import InspectConfig
from pipelines.models import resolve_model
from pipelines.pages import write_page
from pipelines.terminal import DONE, ShouldStop, note, progress_bar, quiet_libraries
from shards.folder import ShardFolder

if TYPE_CHECKING:
    from pipelines.inspect.find_rows import Found


def run(config: InspectConfig, should_stop: ShouldStop) -> int:
    from pipelines.inspect.find_rows import find_rows
    from pipelines.inspect.terminal import show

    folder = ShardFolder(config.path)
    if config.row_range is None and config.doc is None and config.search is None:
        show(folder, config, [])
        return DONE
    with progress_bar(desc="look for rows", unit=" rows", leave=False, disable=config.row_range is not None) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        found = find_rows(folder, config, progress)
    if config.html is None:
        show(folder, config, found.rows)
    else:
        write_rows(config, folder, found)
    for remark in found.remarks:
        note(remark)
    return DONE


def write_rows(config: InspectConfig, folder: ShardFolder, found: "Found") -> None:
    """The rows as one page."""
    from pipelines.inspect.page import page_of_rows

    quiet_libraries()
    assert config.html is not None
    model = resolve_model("--model", config.model).path if config.model else None
    with progress_bar(desc="rows", unit=" rows", leave=False) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        page = page_of_rows(folder, config, found, model, progress)
    write_page(config.html, page)
    rows = found.rows
    which = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows):,} rows, {rows[0]} to {rows[-1]}"
    print(f"wrote {which} -> {config.html}")
