"""The results of remit eval in a terminal, beside the paper's averages."""

from collections import Counter
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.evaluation.suites import MODELS, REPORTED, SOURCE


def show(values: dict[str, Any], console: Console) -> None:
    """Print what pipelines.evaluation.run.evaluate returned."""
    everything = values["results"] | values["others"]
    names = titles(everything)
    results = {names[name]: found for name, found in everything.items()}
    show_values(results, console)
    suite = next(iter(values["results"].values()))["suite"]
    if suite is not None:
        show_reported(suite, results, console)
    for comparison in values["comparisons"]:
        show_comparison((next(iter(results)), names[comparison["other"]]), comparison, scale(suite), console)


def titles(everything: dict[str, dict[str, Any]]) -> dict[str, str]:
    """Short names of models and results files as they were given: the folder of the results; no two the same."""
    short = {}
    for name, values in everything.items():
        file = Path(name)
        if name.endswith(".json"):
            short[name] = file.resolve().parent.name if file.name == "results.json" else file.stem
        else:
            short[name] = Path(values["folder"]).name if "folder" in values else name
    count = Counter(short.values())
    return {name: title if count[title] == 1 else name for name, title in short.items()}


def scale(suite: str | None) -> int:
    """The suites are shares of right answers, shown in per cent; a task of one's own may be anything."""
    return 1 if suite is None else 100


def with_error(value: float, stderr: float | None, factor: int, sign: str = "") -> str:
    digits = 2 if factor == 100 else 4
    error = "?" if stderr is None else f"{factor * stderr:.{digits}f}"
    return f"{factor * value:{sign}.{digits}f} ± {error}"


def show_values(results: dict[str, dict[str, Any]], console: Console) -> None:
    """One line for each task, one column for each model."""
    first = next(iter(results.values()))
    factor = scale(first["suite"])
    table = Table(box=None)
    for column in ("task", "metric", "shots"):
        table.add_column(column)
    for name in results:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for task in first["tasks"]:
        record = first["tasks"][task]
        cells = []
        for other in results.values():
            entry = other["tasks"].get(task)
            cells.append(with_error(entry["value"], entry["stderr"], factor) if entry else "-")
        table.add_row(escape(record["label"]), escape(record["metric"]), shots(record), *cells)
    console.print(table)
    for name, values in results.items():
        limit = values["settings"]["limit"]
        if limit is not None:
            console.print(f"{name}: the first {limit} questions of each task only", markup=False, soft_wrap=True)
        for record in (values["tasks"][task] for task in first["tasks"] if task in values["tasks"]):
            if cut := sum(record.get("cut_questions", {}).values()):
                number = sum(record["num_samples"].values())
                console.print(
                    f"{name}: {record['label']}: {cut:,} of {number:,} prompts were longer than the model takes and were cut at "
                    "their beginning, where examples and instructions stand",
                    markup=False,
                    soft_wrap=True,
                )
        if values["left_out"]:
            console.print(f"{name}: left out: {', '.join(values['left_out'])}", markup=False, soft_wrap=True)


def shots(record: dict[str, Any]) -> str:
    """Those that the harness used and, where it is another number, those asked for."""
    used = sorted(set(record["shots"].values()))
    text = ", ".join(map(str, used))
    asked = record["settings"]["num_fewshot"]
    return text if asked is None or used == [asked] else f"{text} ({asked} asked)"


def show_reported(suite: str, results: dict[str, dict[str, Any]], console: Console) -> None:
    """The averages over the ten tasks that the paper reports, and ours where all ten are there."""
    table = Table(box=None, title=f"average over the ten tasks, {SOURCE}", title_justify="left")
    table.add_column("")
    for model in MODELS:
        table.add_column(model, justify="right")
    for name, numbers in REPORTED[suite].items():
        table.add_row(name, *("-" if number is None else f"{number:.2f}" for number in numbers))
    console.print(table)
    for name, values in results.items():
        if values["suite"] != suite:
            continue
        average = values["average"]
        line = f"{name}: average over {average['num_tasks']} tasks {100 * average['value']:.2f}"
        console.print(
            line + ("" if average["whole"] else ", not to be compared with the paper's: not all of it"),
            markup=False,
            soft_wrap=True,
        )
    console.print(
        "The paper's values of single tasks are not known here, nor its variants and metrics of a task: its rows show "
        "the size of the gains, they are no target for another setup.",
        markup=False,
        soft_wrap=True,
    )


def show_comparison(names: tuple[str, str], comparison: dict[str, Any], factor: int, console: Console) -> None:
    """The first of `names` minus the other, with what may be said of it."""
    table = Table(box=None, title=escape(" - ".join(names)), title_justify="left")
    for column in ("task", "difference", "questions", "error", "at 95 %"):
        table.add_column(column)
    for task, row in comparison["tasks"].items():
        if "not_compared" in row:
            table.add_row(escape(task), "-", "-", "-", escape(f"not compared: {row['not_compared']}"))
            continue
        error = "paired" if row["paired"] else "not paired"
        difference = with_error(row["difference"], row["stderr"], factor, "+")
        worse = row["claim"] != "none" and comparison["higher_is_better"].get(task) is False
        table.add_row(
            escape(task),
            difference,
            f"{row['num_questions']:,}",
            error,
            verdict(row) + (", less is better" if worse else ""),
        )
    mean = comparison["mean"]
    if mean is not None and mean["num_tasks"] > 1:
        difference = with_error(mean["difference"], mean["stderr"], factor, "+")
        table.add_row("mean", difference, f"{mean['num_tasks']} tasks", "", verdict(mean))
    console.print(table)
    for difference in comparison["settings_differ"]:
        console.print(f"{difference}: that alone may move the values", markup=False, soft_wrap=True)
    if comparison["tasks_alone"]:
        console.print(f"only one of them has: {', '.join(comparison['tasks_alone'])}", markup=False, soft_wrap=True)


def verdict(row: dict[str, Any]) -> str:
    """In words, where an error of zero comes from too few questions, or from equal answers to all."""
    if row["claim"] != "none":
        return row["claim"]
    if row["stderr"] is None and not row.get("paired"):
        return "its error is not known"
    if row["difference"] == 0 and row["stderr"] == 0:
        return "the same on every question" if row.get("paired") else "the same"
    return "no difference beyond its error" if row["stderr"] else "too few questions to tell"
