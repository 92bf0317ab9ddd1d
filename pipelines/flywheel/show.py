"""What remit flywheel prints: the plan, and in the end the models of each round."""

import json
import shlex
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.evaluation.tables import show_values
from pipelines.flywheel.folder import OVERVIEW, Folder, Look, made_by_other_code
from pipelines.flywheel.loop import Loop
from pipelines.flywheel.run import Outcome, format_time
from pipelines.flywheel.stages import At, Stage

INPUTS = 8  # of a stage that a plan lists


def state_of(look: Look, folder: Folder) -> str:
    """done, to run, goes on, refused, or what it depends on."""
    if look.waits_for:
        return f"depends on {', '.join(look.waits_for)}"
    if not look.key:
        return "to run"
    if look.record is not None:
        return (
            f"refused, its result was changed: {look.change}"
            if look.change
            else f"done ({format_time(look.record['seconds'])})"
        )
    kept = folder.place("state", look.stage, look.key)  # where a command of the user's own keeps what it goes on from
    half = look.stage.resumes and folder.place("stages", look.stage, look.key).exists()
    return "goes on" if half or (kept.is_dir() and any(kept.iterdir())) else "to run"


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
    for stage in (look.stage for look in looks):
        # what is between < and > is put in when it runs
        command = " ".join(str(word) if isinstance(word, At) else shlex.quote(word) for word in stage.words)
        sources = [
            f"    <{name}> = {source.name if isinstance(source, Stage) else source.path}"
            for name, source in stage.inputs.items()
        ]
        more = [f"    and {len(sources) - INPUTS:,} more"] if len(sources) > INPUTS else []
        console.print("\n".join([stage.name, f"  {command}", *sources[:INPUTS], *more]), markup=False, soft_wrap=True)
    done = sum(state.startswith("done") for state in states)
    console.print(f"{done} of {len(looks)} stages are done; nothing was written")
    if other := made_by_other_code(look.record for look in looks if look.record is not None and not look.change):
        console.print(other, soft_wrap=True)


def show_models(loop: Loop, outcome: Outcome, console: Console) -> None:
    """The models of each round; where they were evaluated, their results."""
    for number, (midtrained, posttrained) in loop.rounds.items():
        objective = midtrained.command[1]  # the command's name, where it has no objective
        if "--objective" in midtrained.command:
            objective = midtrained.command[midtrained.command.index("--objective") + 1]
        lines = [f"round {number}", f"  mid-trained ({objective}): {outcome.result(midtrained.name)}"]
        if posttrained is not midtrained:
            lines.append(f"  post-trained: {outcome.result(posttrained.name)}")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    results: dict[str, dict[str, Any]] = {}
    for stage in loop.stages:
        round_, evaluates, kind = stage.name.partition("/evaluate-")
        for file in outcome.result(stage.name).glob("*/results.json") if evaluates else ():
            results[f"{round_.replace('-', ' ')} {kind}"] = json.loads(file.read_text(encoding="utf-8"))
    if results:
        show_values(results, console)
    records = [outcome.records[stage.name] for stage in loop.stages]
    if other := made_by_other_code(records):
        console.print(other, soft_wrap=True)
    seconds = format_time(sum(record["seconds"] for record in records))
    console.print(
        f"{len(records)} stages, {seconds} in all -> {outcome.folder.path / OVERVIEW}", highlight=False, soft_wrap=True
    )
