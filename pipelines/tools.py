"""What the subcommands do that look at folders: resolve names, show progress, print what was found.

Heavy imports (torch, transformers) happen inside, so that --help answers at once.
"""

import json
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console

from pipelines.console import DONE, FAILED, ShouldStop, counted, note, progress_bar, quiet_libraries
from pipelines.evaluation.settings import EvalConfig
from pipelines.inspect.settings import InspectConfig
from pipelines.models import resolve_model
from pipelines.pages import write_page
from pipelines.provenance import print_lines, print_references, selection_line
from pipelines.report.compare import CompareConfig
from pipelines.report.compare import compare as compare_runs
from pipelines.settings import ReportConfig, VerifyConfig
from shards.folder import ShardFolder
from shards.output_folder import writing
from shards.quarantine import QUARANTINE, take_out
from shards.verify import verify_folder

if TYPE_CHECKING:
    from pipelines.inspect.find_rows import Found


def verify(config: VerifyConfig, should_stop: ShouldStop) -> int:
    folder = ShardFolder(config.path)
    if not config.repair:
        return verify_and_show(config, folder)
    with writing(folder.store, note):  # or a part might be committed between its check and its repair
        return verify_and_show(config, folder)


def verify_and_show(config: VerifyConfig, folder: ShardFolder) -> int:
    """The report of remit verify; with --repair, bad parts are taken out, which needs the lease."""
    with progress_bar(desc="verify", unit=" tokens", unit_scale=True, total=folder.manifest.tokens) as bar:
        report = verify_folder(folder, lambda plan: bar.update(plan.tokens))
    for problem in report.problems:
        print(f"remit verify: {problem}", file=sys.stderr)
    manifest, console = folder.manifest, Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a log has no width
    counts = [counted(report.rows, "row"), counted(report.tokens, "token")]
    if report.documents is not None:
        whole = ", whole or in part" if manifest.selections else ""
        counts.append(counted(report.documents, "document") + whole)
    whose = "corpus as packed" if manifest.selections else "plan"
    print_lines(
        console,
        f"{folder.path}: {report.parts} of {len(manifest.parts)} parts are sound, {', '.join(counts)}",
        f"documents of the {whose}: " + ", ".join(f"{kind} {count:,}" for kind, count in manifest.documents.items()),
        *map(selection_line, manifest.selections),
    )
    columns = {"log-probs": report.logprobs, "rows quarantined": report.quarantined}
    print_references(
        console,
        manifest,
        {header: {name: f"{count:,}" for name, count in own.items()} for header, own in columns.items()},
    )
    passes = not report.problems
    if config.repair and report.bad_parts:
        for part in report.bad_parts:
            take_out(folder.store, part)
        print(f"moved to {folder.store.where(QUARANTINE)}/damaged: {', '.join(report.bad_parts)}")
        print("run the command that wrote this folder again: it refills just those")
    if config.model is not None:
        passes = rescore(config, folder) and passes
    print("OK" if passes else "FAILED")
    return DONE if passes else FAILED


def rescore(config: VerifyConfig, folder: ShardFolder) -> bool:
    """The numerics gate; whether it passes."""
    from pipelines.numerics import measure, show

    quiet_libraries()
    model = resolve_model("--model", config.model or "").path
    base = resolve_model("--base", config.base).path if config.base else None
    with progress_bar(desc="rescore", unit=" rows", total=min(config.rows, folder.manifest.rows)) as bar:
        numerics = measure(
            folder, model, config.reference, config.rows, base, config.epsilon, config.seed, lambda: bar.update(1)
        )
    show(numerics, Console(file=sys.stdout, highlight=False, width=200))
    if config.json is not None:
        config.json.write_text(json.dumps(asdict(numerics) | {"passes": numerics.passes}, indent=1) + "\n", "utf-8")
    return numerics.passes


def inspect(config: InspectConfig, should_stop: ShouldStop) -> int:
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
        write_heatmap(config, folder, found)
    for remark in found.remarks:
        note(remark)
    return DONE


def write_heatmap(config: InspectConfig, folder: ShardFolder, found: "Found") -> None:
    """remit inspect --html: the rows as one page."""
    from pipelines.inspect.page import page_of_rows

    quiet_libraries()
    assert config.html is not None
    model = resolve_model("--model", config.model).path if config.model else None
    with progress_bar(desc="rows", unit=" rows", leave=False) as bar:

        def progress(what: str, done: int, total: int) -> None:
            bar.set_description(what, refresh=False)
            bar.total = total
            bar.update(done - bar.n)

        page = page_of_rows(folder, config, found, model, progress)
    write_page(config.html, page)
    rows = found.rows
    which = f"row {rows[0]}" if len(rows) == 1 else f"{len(rows):,} rows, {rows[0]} to {rows[-1]}"
    print(f"wrote {which} -> {config.html}")


def report(config: ReportConfig, should_stop: ShouldStop) -> int:
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


def compare(config: CompareConfig, should_stop: ShouldStop) -> int:
    print(compare_runs(config.runs))
    return DONE


def evaluate(config: EvalConfig, should_stop: ShouldStop) -> int:
    from pipelines.evaluation.run import evaluate as run
    from pipelines.evaluation.tables import show

    values = run(config, note)
    console = Console(file=sys.stdout, highlight=False)
    if not console.is_terminal:
        console.width = 200  # a log has no width; numbers are not cut
    show(values, console)
    for results in values["results"].values():
        print(f"results of {results['model']['name']} -> {results['folder']}/results.json")
    return DONE
