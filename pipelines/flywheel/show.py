"""What remit flywheel shows: the plan, the stages as they end, the models of each round."""

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from tqdm import tqdm

from pipelines.evaluation.tables import show_values
from pipelines.flywheel.folder import OVERVIEW, Folder, Look, Record, made_by_other_code
from pipelines.flywheel.loop import Loop
from pipelines.flywheel.run import Outcome, log_tail
from pipelines.flywheel.stages import At, Stage
from pipelines.terminal import note

INPUTS = 8  # of a stage that a plan lists


def duration(seconds: float) -> str:
    """3.2 s, 4 min 10 s, 5 h 3 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def state_of(look: Look, folder: Folder) -> str:
    """done, to run, goes on, changed, or what it depends on."""
    if look.waits_for:
        return f"depends on {', '.join(look.waits_for)}"
    if look.change:
        return f"refused, its result was changed: {look.change}"
    if look.record is not None:
        return f"done ({duration(look.record['seconds'])})"
    if look.key is None:
        return "to run"
    state = folder.place("state", look.stage, look.key)  # a command of the user's own keeps there what it goes on from
    kept = state.is_dir() and any(state.iterdir())
    half = look.stage.resumes and folder.place("stages", look.stage, look.key).exists()
    return "goes on" if half or kept else "to run"


def show_plan(looks: list[Look], path: Path, console: Console) -> None:
    """A table of the stages and what each depends on, then their commands and inputs, unbroken lines to search in."""
    table = Table(box=None)
    for column in ("", "stage", "state", "seed"):
        table.add_column(column, overflow="fold")
    states = [state_of(look, Folder(path)) for look in looks]
    for number, (look, state) in enumerate(zip(looks, states, strict=True), 1):
        seed = "" if look.stage.seed is None else str(look.stage.seed)
        table.add_row(str(number), escape(look.stage.name), escape(state), seed)
    console.print(table)
    for look in looks:
        stage = look.stage
        # what is between < and > is put in when it runs
        command = " ".join(str(word) if isinstance(word, At) else shlex.quote(word) for word in stage.words)
        lines = [stage.name, f"  {command}"]
        sources = [
            (name, source.name if isinstance(source, Stage) else source.path) for name, source in stage.inputs.items()
        ]
        lines += [f"    <{name}> = {source}" for name, source in sources[:INPUTS]]
        if len(sources) > INPUTS:
            lines.append(f"    and {len(sources) - INPUTS:,} more files")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    done = sum(state.startswith("done") for state in states)
    console.print(f"{done} of {len(looks)} stages are done; nothing was written")
    if other := made_by_other_code(look.record for look in looks if look.record is not None and not look.change):
        console.print(other, markup=False, soft_wrap=True)


class Progress:
    """A bar over the stages, a line for each that begins or ends, the last line of the log of one that runs."""

    def __init__(self, bar: tqdm, stages: list[Stage]) -> None:
        self.bar, self.stages = bar, stages
        self.numbers = {stage.name: f"[{number}/{len(stages)}] {stage.name}" for number, stage in enumerate(stages, 1)}
        self.last_look = 0.0
        self.interval_seconds = 1 if sys.stderr.isatty() else 60

    def __call__(self, what: str, stage: Stage, facts: Record) -> None:
        name = self.numbers[stage.name]
        if what == "running":
            if time.monotonic() - self.last_look > self.interval_seconds:
                self.last_look = time.monotonic()
                said = log_tail(Path(facts["log"]), 1)
                self.bar.set_description(f"{stage.name}, {duration(facts['seconds'])}", refresh=False)
                self.bar.set_postfix_str(said[0][:120] if said and not said[0].startswith("---") else "", refresh=False)
                self.bar.refresh()
            return
        if what == "reading":
            self.bar.set_description(f"{stage.name}, reading", refresh=False)
            self.bar.set_postfix_str("")
        elif what == "started":
            note(f"{name}: started, log: {facts['log']}")
        elif what == "stopped":
            for line in facts["lines"]:
                note(f"  | {line}")
            note(
                f"{name}: ended with exit code 3, stopped and can go on, expected 0 since nothing here has stopped it; "
                f"the same command goes on with it (log: {facts['log']})"
            )
        elif what == "waits":
            note(
                f"{name}: waits for {facts['for']}, which a driver that is gone has started and which goes on as process "
                f"{facts['pid']} (log: {facts['log']}); to stop it: kill {facts['pid']}"
            )
        else:
            took = duration(facts["seconds"])
            note(f"{name}: {'done' if what == 'finished' else 'done before'} ({took}) -> {facts['result']}")
            self.bar.update()


def show_models(loop: Loop, outcome: Outcome, console: Console) -> None:
    """The models of each round; where they were evaluated, their results."""
    for round_ in loop.rounds:
        command = [*map(str, round_.midtrained.command)]
        objective = command[command.index("--objective") + 1]
        lines = [f"round {round_.number}", f"  mid-trained ({objective}): {outcome.result(round_.midtrained.name)}"]
        if round_.posttrained is not round_.midtrained:
            lines.append(f"  post-trained: {outcome.result(round_.posttrained.name)}")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    results: dict[str, dict[str, Any]] = {}
    for round_ in loop.rounds:
        for kind, stage in round_.evaluations.items():
            for file in outcome.result(stage.name).glob("*/results.json"):
                results[f"round {round_.number} {kind}"] = json.loads(file.read_text(encoding="utf-8"))
    if results:
        show_values(results, console)
    seconds = sum(outcome.records[stage.name]["seconds"] for stage in loop.stages)
    if other := made_by_other_code(outcome.records[stage.name] for stage in loop.stages):
        console.print(other, markup=False, soft_wrap=True)
    overview = outcome.folder.path / OVERVIEW
    console.print(
        f"{len(loop.stages)} stages, {duration(seconds)} in all -> {overview}", highlight=False, soft_wrap=True
    )
