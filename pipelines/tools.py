"""What the subcommands do that look at folders: resolve names, show progress, print what was found.

Heavy imports (torch, transformers) happen inside, so that --help answers at once.
"""

import json
import sys
from time import monotonic

from rich.console import Console

from pipelines.console import DONE, FAILED, ShouldStop, note, progress_bar, quiet_libraries
from pipelines.models import resolve_model
from pipelines.settings import InspectConfig, PlanConfig, ReportConfig, VerifyConfig
from shards.folder import ShardFolder
from shards.lease import Lease
from shards.quarantine import QUARANTINE, take_out
from shards.verify import verify_folder


def verify(config: VerifyConfig, should_stop: ShouldStop) -> int:
    folder = ShardFolder(config.shards)
    if not config.repair:
        return verify_and_show(config, folder)
    lease = Lease(folder.store).acquire(note)  # or a part might be committed between its check and its repair
    try:
        return verify_and_show(config, folder)
    finally:
        lease.release()


def verify_and_show(config: VerifyConfig, folder: ShardFolder) -> int:
    """The report of remit verify; with --repair, bad parts are taken out, which needs the lease."""
    with progress_bar(desc="verify", unit=" tokens", unit_scale=True, total=folder.manifest.tokens) as bar:
        report = verify_folder(folder, lambda plan: bar.update(plan.tokens))
    for problem in report.problems:
        print(f"remit verify: {problem}", file=sys.stderr)
    documents = folder.manifest.documents
    print(
        f"{folder.path}: {report.parts} of {len(folder.manifest.parts)} parts are sound, {report.rows:,} rows, "
        f"{report.tokens:,} tokens"
        + ("" if report.documents is None else f", {report.documents:,} documents")
        + (", whole or in part" if folder.manifest.selections and report.documents is not None else "")
    )
    whose = "corpus as packed" if folder.manifest.selections else "plan"
    print(f"documents of the {whose}: " + ", ".join(f"{kind} {count:,}" for kind, count in documents.items()))
    for selection in folder.manifest.selections:
        print(f"selection: {json.dumps(selection)}")
    for name, count in report.logprobs.items():
        line = f"{name}: {count:,} log-probs, {report.quarantined[name]:,} rows quarantined, "
        print(line + json.dumps(folder.manifest.references[name]))
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
    show(numerics, Console(highlight=False, width=200))
    return numerics.passes


def inspect(config: InspectConfig, should_stop: ShouldStop) -> int:
    from pipelines.inspect import show_row

    show_row(config)
    return DONE


def plan(config: PlanConfig, should_stop: ShouldStop) -> int:
    from pipelines.plan_weights import plan_weights, show

    folder = ShardFolder(config.shards or "")
    began, total = monotonic(), folder.manifest.rows
    with progress_bar(desc="plan", unit=" rows", total=min(config.rows or total, total)) as bar:

        def progress(rows: int, tokens: int) -> None:
            bar.set_postfix_str(f"{tokens / max(1e-9, monotonic() - began):,.0f} tokens/s", refresh=False)
            bar.update(rows - bar.n)

        figures = plan_weights(folder, config, progress)
    show(figures, Console(file=sys.stdout, highlight=False))
    if config.json is not None:
        config.json.write_text(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
    return DONE


def report(config: ReportConfig, should_stop: ShouldStop) -> int:
    from pipelines.report import write_report

    sizes = [(folder / "metrics.jsonl").stat().st_size for folder in config.runs if (folder / "metrics.jsonl").exists()]
    with progress_bar(desc="report", unit="B", unit_scale=True, total=sum(sizes)) as bar:

        def progress(size: int) -> None:
            bar.update(size)

        runs = write_report(config, progress)
    names = ", ".join(f"{run.name} ({run.num_steps:,} steps{'' if run.finished else ', not finished'})" for run in runs)
    print(f"report of {names} -> {config.out} ({config.out.stat().st_size / 1e6:.1f} MB)")
    return DONE
