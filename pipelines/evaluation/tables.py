"""The results of remit eval in a terminal, beside the paper's averages."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.evaluation.suites import MODELS, REPORTED, SOURCE


def titles(model: str, folder: Path, files: list[Path]) -> list[str]:
    """Short names of a model and of other results: the folders of the results; as they were given where two are the same."""
    given = [model, *map(str, files)]
    short = [file.resolve().parent.name if file.name == "results.json" else file.stem for file in files]
    short = [folder.name, *short]
    return [name if short.count(name) == 1 else whole for name, whole in zip(short, given)]


def show(results: dict[str, dict[str, Any]], comparisons: list[dict[str, Any]], console: Console) -> None:
    """Print results by title, ours first, and the comparisons of ours with each of the others."""
    show_values(results, console)
    name, *others = results
    suite = results[name]["suite"]
    if suite is not None:
        show_reported(suite, results, console)
    for other, comparison in zip(others, comparisons, strict=True):
        show_comparison(f"{name} - {other}", comparison, scale(suite), console)


def show_values(results: dict[str, dict[str, Any]], console: Console) -> None:
    """One line for each task of the first results, one column for each model."""
    first = next(iter(results.values()))
    table = Table("task", "metric", "shots", box=None)
    for name in results:
        table.add_column(escape(name), justify="right", no_wrap=True)
    for task, record in first["tasks"].items():
        entries = [other["tasks"].get(task) for other in results.values()]
        cells = [with_error(entry, "value", scale(first["suite"])) if entry else "-" for entry in entries]
        table.add_row(escape(record["label"]), escape(record["metric"]), shots(record), *cells)
    console.print(table)
    for name, values in results.items():
        if (limit := values["settings"]["limit"]) is not None:
            print_line(console, f"{name}: the first {limit} questions of each task only")
        if values["left_out"]:
            print_line(console, f"{name}: left out: {', '.join(values['left_out'])}")


def print_line(console: Console, text: str) -> None:
    console.print(text, markup=False, soft_wrap=True)


def scale(suite: str | None) -> int:
    """The suites are shares of right answers, shown in per cent; a task of one's own may be anything."""
    return 1 if suite is None else 100


def with_error(entry: dict[str, Any], key: str, factor: int) -> str:
    """A value, or with its sign a difference."""
    digits, sign = 2 if factor == 100 else 4, "+" if key == "difference" else ""
    error = "?" if entry["stderr"] is None else f"{factor * entry['stderr']:.{digits}f}"
    return f"{factor * entry[key]:{sign}.{digits}f} ± {error}"


def shots(record: dict[str, Any]) -> str:
    """Those that the harness used and, where it is another number, those asked for."""
    used = sorted(set(record["shots"].values()))
    text = ", ".join(map(str, used))
    asked = record["settings"]["num_fewshot"]
    return text if asked is None or used == [asked] else f"{text} ({asked} asked)"


def show_reported(suite: str, results: dict[str, dict[str, Any]], console: Console) -> None:
    """The averages over the ten tasks that the paper reports, and ours where all ten are there."""
    table = Table("", box=None, title=f"average over the ten tasks, {SOURCE}", title_justify="left")
    for model in MODELS:
        table.add_column(model, justify="right")
    for name, numbers in REPORTED[suite].items():
        table.add_row(name, *("-" if number is None else f"{number:.2f}" for number in numbers))
    console.print(table)
    for name, values in results.items():
        if values["suite"] == suite:
            average = values["average"]
            beside = "" if average["whole"] else ", not to be compared with the paper's: not all of it"
            print_line(
                console,
                f"{name}: average over {average['num_tasks']} tasks {100 * average['value']:.2f}{beside}",
            )
    print_line(
        console,
        "The paper's values of single tasks are not known here, nor its variants and metrics of a task: its rows show "
        "the size of the gains, they are no target for another setup.",
    )


def show_comparison(title: str, comparison: dict[str, Any], factor: int, console: Console) -> None:
    """Differences, with what may be said of them."""
    columns = ("task", "difference", "questions", "error", "at 95 %")
    table = Table(*columns, box=None, title=escape(title), title_justify="left")
    for task, row in comparison["tasks"].items():
        if "not_compared" in row:
            table.add_row(escape(task), "-", "-", "-", escape(f"not compared: {row['not_compared']}"))
            continue
        error = "paired" if row["paired"] else "not paired"
        worse = row["claim"] != "none" and comparison["higher_is_better"].get(task) is False
        cells = (with_error(row, "difference", factor), f"{row['num_questions']:,}", error)
        table.add_row(escape(task), *cells, verdict(row) + (", less is better" if worse else ""))
    mean = comparison["mean"]
    if mean is not None and mean["num_tasks"] > 1:
        cells = (with_error(mean, "difference", factor), f"{mean['num_tasks']} tasks", "")
        table.add_row("mean", *cells, verdict(mean))
    console.print(table)
    for difference in comparison["settings_differ"]:
        print_line(console, f"{difference}: that alone may move the values")
    if comparison["tasks_alone"]:
        print_line(console, f"only one of them has: {', '.join(comparison['tasks_alone'])}")


def verdict(row: dict[str, Any]) -> str:
    """In words, where an error of zero comes from too few questions, or from equal answers to all."""
    if row["claim"] != "none":
        return row["claim"]
    if row["stderr"] is None and not row.get("paired"):
        return "its error is not known"
    if row["difference"] == 0 and row["stderr"] == 0:
        return "the same on every question" if row.get("paired") else "the same"
    return "no difference beyond its error" if row["stderr"] else "too few questions to tell"
