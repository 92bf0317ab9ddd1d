"""What each subcommand does: resolve names, show progress, call the stage, print the outcome.

Heavy imports (torch, transformers) happen inside, so that --help answers at once.
"""

import json
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pipelines.models import resolve_model
from pipelines.settings import InspectConfig, PlanConfig, SelectConfig, VerifyConfig
from scorer.config import PackConfig, ScoreConfig, Stopped
from shards.folder import ShardFolder
from shards.lease import Lease
from shards.quarantine import QUARANTINE, take_out
from shards.verify import verify_folder
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from scorer.telemetry import ScoreProgress

DONE, FAILED, BAD_USAGE, STOPPED = 0, 1, 2, 3  # exit codes
ShouldStop = Callable[[], bool]


def quiet_libraries() -> None:
    """Keep the progress bars and advice of other libraries out of ours."""
    warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
    import datasets
    import transformers

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@contextmanager
def progress_bar(**options: Any) -> Iterator[tqdm]:
    """A bar that shows itself on terminals and in logs, there at most every ten seconds."""
    interval = 0.2 if sys.stderr.isatty() else 10
    with tqdm(mininterval=interval, smoothing=0.1, dynamic_ncols=True, **options) as bar:
        yield bar


def summary(what: str, folder: ShardFolder, out: str, seconds: float) -> str:
    """One line about a folder that a stage has written."""
    manifest = folder.manifest
    documents = manifest.documents
    line = f"{what} {manifest.tokens:,} tokens in {manifest.rows:,} rows and {len(manifest.parts):,} parts"
    line += f"{', a selection' if manifest.selections else ''} from {documents['packed']:,} documents"
    if documents["empty"] or documents["rejected"]:
        line += f" ({documents['empty']:,} empty, {documents['rejected']:,} rejected)"
    return f"{line} -> {out} ({seconds:.0f} s)"


def pack(config: PackConfig, should_stop: ShouldStop) -> int:
    from scorer.pack import pack as run

    quiet_libraries()
    began = monotonic()
    tokenizer = resolve_model("--tokenizer", config.tokenizer, weights=False)
    phase, worked = "", False
    with progress_bar(desc="tokenise", unit="B", unit_scale=True) as bar:

        def progress(now: str, done: int, total: int, tokens: int) -> None:
            nonlocal phase, worked
            worked = True
            if now != phase:
                phase = now
                bar.reset(total)
                bar.set_description(now)
                bar.unit = "B" if now == "tokenise" else " tokens"
            bar.set_postfix_str(f"{tokens / max(1e-9, monotonic() - began) / 1e6:.2f}M tokens/s", refresh=False)
            bar.update(done - bar.n)

        try:
            folder = run(replace(config, tokenizer=str(tokenizer.path)), progress, should_stop, note)
        except Stopped:
            return STOPPED
    what = "packed" if worked else "nothing to do (remit verify checks every byte), packed before:"
    print(summary(what, folder, config.out, monotonic() - began))
    return DONE


def score(config: ScoreConfig, should_stop: ShouldStop) -> int:
    from scorer.reference import Reference
    from scorer.score import PartsFailed
    from scorer.score import score as run
    from scorer.telemetry import ScoreProgress

    quiet_libraries()
    began = monotonic()
    model = resolve_model("--model", config.model)
    with progress_bar(desc="start engines", unit=" tokens", unit_scale=True) as bar:
        first: ScoreProgress | None = None
        state: ScoreProgress | None = None

        def progress(now: ScoreProgress) -> None:
            nonlocal state, first
            if state is None:  # what an earlier run did is not this run's speed
                first = replace(now)
                bar.total = now.tokens_total
                bar.initial = bar.n = now.tokens
            state = now
            if now.tokens > bar.n:
                bar.set_description("score")
            numbers = f"parts {now.parts:,}/{now.parts_total:,}, engines {now.engines}"
            numbers += f", retries {now.retries}" if now.retries else ""
            numbers += f", failed {now.parts_failed}" if now.parts_failed else ""
            bar.set_postfix_str(numbers, refresh=False)
            bar.update(now.tokens - bar.n)

        try:
            folder = run(config, Reference(model.path, model.name, model.revision), progress, should_stop, note)
        except Stopped:
            return STOPPED
        except PartsFailed as error:
            bar.close()
            for part, reason in error.reasons.items():
                note(f"{part}: {reason}")
            note(f"to try these parts again: {shlex.join(['remit', *sys.argv[1:]])}")
            raise
    if state is not None:
        show_score_summary(state, first or state)
    what = f"scored as {config.name!r}"
    if state is None:
        what = f"nothing to do (remit verify checks every byte), {what} before:"
    print(summary(what, folder, config.out, monotonic() - began))
    return DONE


def note(line: str) -> None:
    """A line that does not break a progress bar."""
    tqdm.write(line, file=sys.stderr)


def show_score_summary(state: "ScoreProgress", first: "ScoreProgress") -> None:
    """The final table of remit score. first: where the run began."""
    table = Table(box=None, show_header=False)
    worked = state.read_seconds + state.wait_seconds + state.write_seconds
    rows: dict[str, str] = {
        "tokens scored now": f"{state.tokens - first.tokens:,}, of {state.tokens_total:,}",
        "parts scored now": f"{state.parts - first.parts:,}, of {state.parts_total:,}",
        "rows without log-probs": f"{state.rows_quarantined:,}",
        "parts tried again": f"{state.retries:,}",
        "engines that died": f"{state.engine_restarts:,}",
        "tokens/s": f"{state.tokens_per_second:,.0f}, once engines were ready",
        "time": f"{state.seconds:,.0f} s, start of the engines included",
        "share of reading, writing": f"{state.read_seconds / max(worked, 1e-9):.1%}, "
        f"{state.write_seconds / max(worked, 1e-9):.1%} of the time of a part",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console(file=sys.stderr, highlight=False).print(table)


def select(config: SelectConfig, should_stop: ShouldStop) -> int:
    from pipelines.ranking import describe
    from pipelines.select import select as run

    began, phase = monotonic(), ""
    with progress_bar(desc="select", unit=" tokens", unit_scale=True) as bar:

        def progress(now: str, done: int, total: int) -> None:
            nonlocal phase
            if now != phase:
                phase = now
                bar.reset(total)
                bar.set_description(now)
                bar.initial = bar.n = done
            bar.update(done - bar.n)

        try:
            chosen = run(config, progress, should_stop, note).manifest.selections[-1]
        except Stopped:
            return STOPPED
    what = "selected" if phase else "nothing to do (remit verify checks every byte), selected before:"
    print(f"{what} {describe(chosen)} -> {config.out} ({monotonic() - began:.0f} s)")
    return DONE


def train(config: TrainConfig, should_stop: ShouldStop) -> int:
    from trainer.train import train as run

    quiet_libraries()
    began = monotonic()
    model = resolve_model("--model", config.model)
    tokens_at_start: int | None = None
    rank = int(os.environ.get("RANK", "0"))  # of torchrun; the others are quiet
    with progress_bar(desc="train", unit=" steps", disable=rank > 0) as bar:

        def progress(done: int, total: int, metrics: dict[str, Any]) -> None:
            nonlocal tokens_at_start
            if tokens_at_start is None:
                tokens_at_start = metrics["tokens"]
                bar.total = total
                bar.initial = bar.n = done - 1
            clipped = f"{metrics['clipped_low']:.0%}/{metrics['clipped_high']:.0%}"
            bar.set_postfix_str(
                f"loss {metrics['ntp_loss']:.3f}, clipped {clipped}, {metrics['tokens_per_second']:,.0f} tokens/s",
                refresh=False,
            )
            bar.update(done - bar.n)

        config = replace(config, model=str(model.path))
        if config.ray_workers:
            from pipelines.ray_train import train_on_ray

            result = train_on_ray(config, should_stop)
        else:
            result = run(config, progress, should_stop)
    if not result.finished:
        return STOPPED
    if rank:
        return DONE
    what = "trained" if config.ray_workers or tokens_at_start is not None else "nothing to do, trained before:"
    print(f"{what} {result.steps:,} steps -> {result.out / 'model'} ({monotonic() - began:.0f} s)")
    if config.objective == "remit":
        low, high = 1 - config.epsilon, 1 + config.epsilon
        print(
            f"weights clipped low (to {low:g}): {result.clipped_low:.1%}, high (to {high:g}): {result.clipped_high:.1%}, "
            f"in between: {1 - result.clipped_low - result.clipped_high:.1%}"
        )
    return DONE


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
