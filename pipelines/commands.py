"""What the subcommands of the stages do: resolve names, show progress, call the stage, print the outcome.

Heavy imports (torch, transformers) happen inside, so that --help answers at once.
"""

import os
import shlex
import sys
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from pipelines.console import DONE, STOPPED, ShouldStop, note, progress_bar, quiet_libraries, tokens_summary
from pipelines.flywheel.config import FlywheelOptions, read_config
from pipelines.models import resolve_model
from pipelines.settings import SelectConfig
from scorer.config import PackConfig, ScoreConfig, Stopped
from shards.folder import ShardFolder
from shards.modelfolder import require_base
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from scorer.telemetry import ScoreProgress


def summary(what: str, folder: ShardFolder, out: str, seconds: float) -> str:
    """One line about a folder that a stage has written."""
    manifest = folder.manifest
    documents = manifest.documents
    line = f"{what} {manifest.tokens:,} tokens in {manifest.rows:,} rows and {len(manifest.parts):,} parts"
    line += f"{', a selection' if manifest.selections else ''} from {documents['packed']:,} documents"
    if documents["empty"] or documents["rejected"]:
        line += f" ({documents['empty']:,} empty, {documents['rejected']:,} rejected)"
    left_out = sum(bool(file.left_out) for file in manifest.corpus)
    line += f", without {left_out:,} bad files" if left_out else ""
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
    print(tokens_summary(folder.manifest))
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
    require_base(model.path)  # before Ray starts workers, or the corpus is looked at
    tokens_at_start: int | None = None
    clips = config.objective == "remit" and config.epsilon < 1
    rank = int(os.environ.get("RANK", "0"))  # of torchrun; the others are quiet
    with progress_bar(desc="train", unit=" steps", disable=rank > 0) as bar:

        def progress(done: int, total: int, metrics: dict[str, Any]) -> None:
            nonlocal tokens_at_start
            if tokens_at_start is None:
                tokens_at_start = metrics["tokens"]
                bar.total = total
                bar.initial = bar.n = done - 1
            numbers = f"loss {metrics['ntp_loss']:.3f}, "
            if clips:
                numbers += f"clipped {metrics['clipped_low']:.0%}/{metrics['clipped_high']:.0%}, "
            if "kd_loss" in metrics:
                numbers += f"KL {metrics['kd_loss']:.3f}, "
            bar.set_postfix_str(f"{numbers}{metrics['tokens_per_second']:,.0f} tokens/s", refresh=False)
            bar.update(done - bar.n)

        config = replace(config, model=str(model.path))
        if config.ray_workers:
            from pipelines.ray_train import train_on_ray
            from trainer.experts import check_experts

            check_experts(model.path, config.router_aux_loss)  # here, and not in each worker
            result = train_on_ray(config, should_stop)
        else:
            result = run(config, progress, should_stop, note)
    if not result.finished:
        return STOPPED
    if rank:
        return DONE
    what = "trained" if config.ray_workers or tokens_at_start is not None else "nothing to do, trained before:"
    print(f"{what} {result.steps:,} steps -> {result.out / 'model'} ({monotonic() - began:.0f} s)")
    if clips:
        low, high = 1 - config.epsilon, 1 + config.epsilon
        print(
            f"weights clipped low (to {low:g}): {result.clipped_low:.1%}, high (to {high:g}): {result.clipped_high:.1%}, "
            f"in between: {1 - result.clipped_low - result.clipped_high:.1%}"
        )
    return DONE


def flywheel(config: FlywheelOptions, should_stop: ShouldStop) -> int:
    from pipelines.flywheel.folder import survey
    from pipelines.flywheel.loop import make_loop
    from pipelines.flywheel.run import StageFailed, run_stages
    from pipelines.flywheel.show import Progress, show_models, show_plan

    file = read_config(config.config, config.out)
    loop = make_loop(file)
    console = Console(file=sys.stdout, highlight=False)
    if config.dry_run:
        show_plan(survey(loop.stages, file.out), file.out, console)
        return DONE
    with progress_bar(desc="flywheel", unit=" stages", total=len(loop.stages)) as bar:
        try:
            outcome = run_stages(loop.stages, file.out, should_stop, Progress(bar, loop.stages))
        except StageFailed as error:
            bar.close()
            for line in error.log:
                note(f"  | {line}")
            raise
    if not outcome.finished:
        return STOPPED
    show_models(loop, outcome, console)
    return DONE
