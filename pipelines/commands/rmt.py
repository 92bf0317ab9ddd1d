"""remit rmt: reinforcement mid-training on annotated shards."""

import os
import sys
from dataclasses import replace
from time import monotonic
from typing import Any

from pipelines.models import resolve_model
from pipelines.report.runs import EVALUATION, read_lines
from pipelines.rmt.settings import RmtConfig
from pipelines.terminal import DONE, STOPPED, ShouldStop, counted, note, progress_bar, quiet_libraries
from shards.folder import ShardFolder, require_shards
from shards.modelfolder import require_base


def run(config: RmtConfig, should_stop: ShouldStop) -> int:
    began = monotonic()
    for folder in filter(None, (config.shards, config.eval_shards)):
        require_shards(folder)
    model = resolve_model("--model", config.model)
    require_base(model.path)  # before the seconds of the imports
    from pipelines.rmt.run import rmt

    quiet_libraries()
    trained = False
    rank = int(os.environ.get("RANK", "0"))  # of torchrun; the others are quiet
    with progress_bar(desc="start", unit=" steps", disable=rank > 0) as bar:

        def progress(done: int, total: int, metrics: dict[str, Any]) -> None:
            nonlocal trained
            if not trained:
                trained, bar.total = True, total
                bar.initial = bar.n = done - 1
            numbers = f"L_NTP {metrics['ntp_loss']:.3f}"
            if metrics["phase"] == "format":
                numbers += f", format {metrics['rl_loss']:.3f}"
            else:
                asked = "" if metrics["budget"] is None else f"/{metrics['budget']}"
                numbers += f", {config.reward} {metrics['outcome']:.3f}, thought {metrics['thought_tokens']:.0f}{asked}"
            bar.set_postfix_str(numbers, refresh=False)
            bar.update(done - bar.n)

        def phase(name: str) -> None:
            bar.set_description_str(name, refresh=sys.stderr.isatty())

        def count(shards: ShardFolder, rows: int) -> None:
            bar.set_postfix_str(f"{rows:,} of {shards.manifest.rows:,} rows", refresh=sys.stderr.isatty())

        result = rmt(replace(config, model=str(model.path)), progress, should_stop, note, phase, count)
    if not result.finished:
        return STOPPED
    if rank:
        return DONE
    what = "trained" if trained else "nothing to do, trained before:"
    took = f" ({monotonic() - began:.0f} s)" if trained else ""
    print(f"{what} {counted(result.last.get('step', 0), 'step')} -> {result.out / 'model'}{took}")
    if config.eval_shards is not None:
        for line in held_out_summary(config):
            print(line)
    return DONE


def held_out_summary(config: RmtConfig) -> list[str]:
    """The first, the middle and the last evaluation of a finished run, a line each."""
    lines = list(read_lines(config.out / EVALUATION, lambda damaged: None))
    found = []
    for line in [lines[number] for number in sorted({0, len(lines) // 2, len(lines) - 1})] if lines else []:
        tiers = ", ".join(
            f"{name} {entry['accuracy']:.1%} / {entry['accuracy_with_thought']:.1%}"
            for name, entry in line.get("tiers", {}).items()
        )
        found.append(
            f"held out after {line['step']:,} steps: loss {line['loss']:.4f}; next token right, bare / with thought: {tiers}"
        )
    return found
