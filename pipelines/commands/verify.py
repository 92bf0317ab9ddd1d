"""remit verify: recount and rehash a shard folder; with --model, compare a column with transformers."""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console

from pipelines.models import resolve_model
from pipelines.pages import check_output_file
from pipelines.provenance import print_lines, print_references, selection_line
from pipelines.settings import OneFolder
from pipelines.terminal import DONE, FAILED, ShouldStop, counted, note, progress_bar, quiet_libraries
from shards.folder import ShardFolder
from shards.output_folder import writing
from shards.quarantine import QUARANTINE, take_out
from shards.ranges import require_at_least
from shards.verify import verify_folder
from trainer.objectives.settings import check_epsilon


@dataclass(frozen=True)
class VerifyConfig(OneFolder):
    """Check every byte, count and invariant of a shard folder; with --model, rescore random rows with transformers."""

    repair: bool = False
    """Move bad parts to _quarantine/damaged, so that the command that wrote the folder refills just those."""
    model: str | None = None
    """Reference that scored a column: compare the column with a transformers forward of it."""
    reference: str | None = None
    """Name of the column's reference; default: the one with the model's weights."""
    rows: int = 64
    """Random rows to rescore, with --model."""
    base: str | None = None
    """Base model whose losses the ReMiT weights are compared with; default: the reference stands in for it."""
    epsilon: float = 0.2
    """Clip of the ReMiT weights that are compared; inf: no clip."""
    seed: int = 0
    """Decides which rows are rescored."""
    json: Path | None = None
    """File to write the figures of --model to, as JSON."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        _ = self.path
        require_at_least(self, 1, "rows")
        if self.json is not None:
            if self.model is None:
                raise ValueError("--json is given without --model, whose figures it takes")
            check_output_file("--json", self.json)
        check_epsilon("--epsilon", self.epsilon)


def run(config: VerifyConfig, should_stop: ShouldStop) -> int:
    folder = ShardFolder(config.path)
    for option, model in (("--model", config.model), ("--base", config.base)):
        if model is not None:  # a mistyped one is told before every byte is read
            resolve_model(option, model)
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
