"""remit plan: two configs become the figures of pipelines/plan/figures.py, and these the tables of a terminal."""

import json
import math
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipelines.terminal import counted


def show(figures: dict[str, Any], console: Console) -> None:
    """The tables, for 100 columns."""
    job, machine, proposal = figures["job"], figures["machine"], figures["proposal"]
    console.print(
        Text(
            f"{job['tokens']:,} tokens, {job['epochs']:g} {'epoch' if job['epochs'] == 1 else 'epochs'}, {job['steps']:,} steps of {job['global_batch_size']} rows "
            f"of {job['seq_len']:,}; {machine['num_gpus']} x {machine['gpu']}, {machine['dtype']}"
        ),
        soft_wrap=True,
    )
    lines = [
        [
            *(role, model["name"], f"{model['parameters']:,}{' (tied)' if model['tied'] else ''}"),
            *(_si(model["forward_flops_per_token"]), _si(model["train_flops_per_token"])),
        ]
        for role, model in figures["models"].items()
    ]
    print_table(console, "Models", ["", "name", "parameters", "FLOPs/token forward", "with backward"], lines)
    lines = [
        [name, _time(cost["wall_seconds"]), _hours(cost["gpu_hours"]), f"{cost['tokens_per_second']:,.0f}"]
        for name, cost in figures["costs"].items()
    ]
    print_table(console, "Costs", ["", "wall time", "GPU-hours", "tokens/s"], lines)
    step = figures["step"]
    rows = counted(step["rows_per_gpu"], "row")
    hidden = step["exchange_overlapped_seconds"]
    console.print(
        Text(
            f"A step computes {rows} per GPU in {_time(step['compute_seconds'])} and exchanges gradients for "
            f"{_time(step['exchange_seconds'])}" + f", {_time(hidden)} of them beside the computation." * (hidden > 0)
        ),
        soft_wrap=True,
    )
    even = figures["break_even"]
    console.print(
        Text(
            f"Scoring has paid for itself against a reference online after {even['epochs']:.2f} epochs, that is with run or "
            f"ablation number {even['runs']:,}; each further epoch saves {_hours(even['gpu_hours_saved_per_epoch'])} GPU-hours."
        ),
        soft_wrap=True,
    )
    lines = [
        [f"{total['runs']}", _hours(total["stored_gpu_hours"]), _hours(total["online_gpu_hours"])]
        for total in even["totals"]
    ]
    print_table(console, "GPU-hours in all", ["runs", "scored once", "reference online"], lines)
    lines = [[name, in_bytes(value)] for name, value in figures["disk_bytes"].items()]
    print_table(console, "Disk", ["", "bytes"], lines)
    lines = [[name, in_bytes(value)] for name, value in figures["memory_bytes"].items()]
    print_table(
        console, f"Training memory per GPU, of {in_bytes(proposal['usable_bytes'])} usable", ["", "bytes"], lines
    )
    command = f"--sharding {proposal['sharding']} --micro-batch-size {proposal['micro_batch_size']}"
    command += " --activation-checkpointing" * proposal["activation_checkpointing"]
    engine = f"; remit score --tensor-parallel-size {proposal['engine_gpus']}" if proposal["engine_gpus"] else ""
    verdict = "fits" if proposal["fits"] else "does not fit"
    console.print(Text(f"{verdict}: remit train {command}{engine}"), soft_wrap=True)
    lines = [
        [entry["option"], f"{entry['value']:.4g} {entry['unit']}", entry["source"]] for entry in figures["assumptions"]
    ]
    print_table(console, "Assumptions; each option replaces its value", ["option", "value", "from"], lines, left=3)
    for line in figures["warnings"]:
        console.print(Text(f"warning: {line}", style="yellow"), soft_wrap=True)


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def in_bytes(value: float) -> str:
    """A readable number of bytes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value / 1e3:,.1f} kB"


def _si(value: float) -> str:
    power = max(0, min(4, int(math.log10(max(1, value)) // 3)))
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}"


def write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """--json of plan and weights."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")


def print_table(
    console: Console, title: str, headers: list[str], lines: list[list[str]], left: int = 1, width: int | None = None
) -> None:  # fmt: skip
    """left: columns that are aligned to the left; width: most characters of the first column, which is then cut."""
    table = Table(show_edge=False, pad_edge=False, header_style="bold")
    for index, header in enumerate(headers):
        narrow = width if index == 0 else None
        justify: Literal["left", "right"] = "left" if index < left else "right"
        overflow: Literal["ellipsis", "fold"] = "ellipsis" if narrow else "fold"
        table.add_column(header, justify=justify, overflow=overflow, no_wrap=bool(narrow), max_width=narrow)
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    console.print("", Text(title, style="bold"), table, sep="\n")
