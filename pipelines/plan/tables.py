"""remit plan: the figures of pipelines/plan/figures.py as the tables of a terminal."""

import math
from typing import Any

from rich.console import Console
from rich.text import Text

from pipelines.terminal import counted, print_table


def show(figures: dict[str, Any], console: Console) -> None:
    """The tables, for 100 columns."""

    def say(line: str, style: str = "") -> None:
        console.print(Text(line, style=style), soft_wrap=True)

    job, machine, proposal = figures["job"], figures["machine"], figures["proposal"]
    epochs = f"{job['epochs']:g} {'epoch' if job['epochs'] == 1 else 'epochs'}"
    mixture = figures.get("mixture")
    corpus = f"{job['tokens']:,} tokens, {epochs}, {counted(job['steps'], 'step')}"
    rows = f"{counted(job['global_batch_size'], 'row')} of {job['seq_len']:,}"
    if mixture:
        corpus = f"{mixture['tokens']:,} tokens of folders with {job['tokens']:,}, --max-steps {job['steps']}"
        rows = f"{counted(job['global_batch_size'], 'row')} of {job['row_tokens']:,.1f} tokens on average"
    on = f"{machine['num_gpus']} x {machine['gpu']}, {machine['dtype']}"
    say(f"{corpus}: steps of {rows}; {on}" if mixture else f"{corpus} of {rows}; {on}")
    if mixture:
        lines = [
            [name, f"{of['tokens']:,}", f"{of['tokens_of_folder']:,}", f"{of['rows']:,}", f"{of['epochs']:.3f}"]
            for name, of in mixture["sources"].items()
        ]
        title = f"Mixture, up to step {mixture['steps']:,}"
        print_table(console, ["source", "tokens drawn", "tokens there are", "rows drawn", "epochs"], lines, title)
    lines = [
        [
            *(role, model["name"], f"{model['parameters']:,}{' (tied)' if model['tied'] else ''}"),
            *(_si(model["forward_flops_per_token"]), _si(model["train_flops_per_token"])),
        ]
        for role, model in figures["models"].items()
    ]
    print_table(console, ["", "name", "parameters", "FLOPs/token forward", "with backward"], lines, "Models")
    lines = [
        [name, _time(cost["wall_seconds"]), _hours(cost["gpu_hours"]), f"{cost['tokens_per_second']:,.0f}"]
        for name, cost in figures["costs"].items()
    ]
    print_table(console, ["", "wall time", "GPU-hours", "tokens/s"], lines, "Costs")
    step, even = figures["step"], figures["break_even"]
    hidden = step["exchange_overlapped_seconds"]
    say(
        f"A step computes {counted(step['rows_per_gpu'], 'row')} per GPU in {_time(step['compute_seconds'])} and exchanges "
        f"gradients for {_time(step['exchange_seconds'])}"
        + f", {_time(hidden)} of them beside the computation."
        * (hidden > 0)
    )
    say(
        f"Scoring has paid for itself against a reference online after {even['epochs']:.2f} epochs, that is with run or "
        f"ablation number {even['runs']:,}; each further epoch saves {_hours(even['gpu_hours_saved_per_epoch'])} GPU-hours."
    )
    lines = [
        [f"{total['runs']}", _hours(total["stored_gpu_hours"]), _hours(total["online_gpu_hours"])]
        for total in even["totals"]
    ]
    print_table(console, ["runs", "scored once", "reference online"], lines, "GPU-hours in all")
    if "rmt" in figures:
        _show_rmt(figures["rmt"], console)
    usable = _bytes(proposal["usable_bytes"])
    for title, key in (("Disk", "disk_bytes"), (f"Training memory per GPU, of {usable} usable", "memory_bytes")):
        print_table(console, ["", "bytes"], [[name, _bytes(value)] for name, value in figures[key].items()], title)
    command = f"--sharding {proposal['sharding']} --micro-batch-size {proposal['micro_batch_size']}"
    command += " --activation-checkpointing" * proposal["activation_checkpointing"]
    engine = f"; remit score --tensor-parallel-size {proposal['engine_gpus']}" if proposal["engine_gpus"] else ""
    say(f"{'fits' if proposal['fits'] else 'does not fit'}: remit train {command}{engine}")
    lines = [
        [
            entry["option"] or entry["name"].replace("_", " "),
            f"{_plain(entry['value'])} {entry['unit']}",
            entry["source"],
        ]
        for entry in figures["assumptions"]
    ]
    print_table(console, ["option", "value", "from"], lines, "Assumptions; an option replaces its value", left=3)
    for warning in figures["warnings"]:
        say(f"warning: {warning}", "yellow")


def _show_rmt(rmt: dict[str, Any], console: Console) -> None:
    lines = [[name, _time(cost["wall_seconds"]), _hours(cost["gpu_hours"])] for name, cost in rmt["costs"].items()]
    title = f"Reinforcement mid-training (remit rmt), {counted(rmt['steps'], 'step')}"
    print_table(console, ["", "wall time", "GPU-hours"], lines, title)
    lines = [[name, f"{tokens:,.0f}"] for name, tokens in rmt["tokens"].items()]
    print_table(console, ["", "tokens"], lines, "Tokens of remit rmt")
    told = f"remit rmt takes as long as {rmt['ntp_epochs']:.3g} epochs of NTP over the corpus."
    console.print(Text(told), soft_wrap=True)


def _plain(value: float) -> str:
    """Four digits, and larger numbers in full: 163,840 tokens/s, not 1.638e+05."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _hours(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.3g} s" if seconds < 100 else f"{seconds:.0f} s"


def _bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if value >= size:
            return f"{value / size:,.2f} {unit}"
    return f"{value / 1e3:,.1f} kB"


def _si(value: float) -> str:
    power = max(0, min(4, int(math.log10(max(1, value)) // 3)))
    return f"{value / 1000**power:.3g} {['', 'k', 'M', 'G', 'T'][power]}"
