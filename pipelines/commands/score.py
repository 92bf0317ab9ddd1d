"""remit score: annotate a shard folder with a reference's log-probs."""

import shlex
import sys
from dataclasses import replace
from time import monotonic
from typing import TYPE_CHECKING

from rich.console import Console

from pipelines.commands.pack import summary
from pipelines.models import resolve_model
from pipelines.terminal import DONE, STOPPED, ShouldStop, print_table, progress_bar, quiet_libraries, timed_note
from scorer.config import ScoreConfig
from scorer.stopping import Stopped
from shards.folder import require_shards

if TYPE_CHECKING:
    from scorer.telemetry import ScoreProgress


def run(config: ScoreConfig, should_stop: ShouldStop) -> int:
    began = monotonic()
    require_shards(config.shards)
    model = resolve_model("--model", config.model)
    from scorer.reference import Reference  # a mistyped path is told before these seconds
    from scorer.score import PartsFailed, score
    from scorer.telemetry import ScoreProgress

    quiet_libraries()
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
            folder = score(config, Reference(model.path, model.name, model.revision), progress, should_stop, timed_note)
        except Stopped:
            return STOPPED
        except PartsFailed:  # each was told when it was given up
            bar.close()
            timed_note(f"to try these parts again: {shlex.join(['remit', *sys.argv[1:]])}")
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
    print_table(Console(file=sys.stderr, highlight=False), ["", ""], rows.items(), left=2, ruled=False)
