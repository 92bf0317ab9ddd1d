"""The results of remit eval in a terminal: values by group, beside the paper's, and comparisons."""

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipelines.evaluation.paper import PaperTable, paper_table
from pipelines.evaluation.results import averages, group_means, tasks_by_group
from pipelines.terminal import counted

NUMBER_WIDTHS = 69  # columns of a terminal that the numbers of the paper's table take: with short names it has 80


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
    for one in (suite or "").split(","):
        if (table := paper_table(one)) is not None:
            show_paper(one, table, results, console)
    for other, comparison in zip(others, comparisons, strict=True):
        show_comparison(f"{name} - {other}", comparison, scale(suite), console)


def show_values(results: dict[str, dict[str, Any]], console: Console) -> None:
    """One line for each task of the first results, one column for each model; of a suite by group, with its mean."""
    first = next(iter(results.values()))
    table = Table("task", "metric", "shots", box=None)
    table.columns[0].overflow = "fold"
    for name in results:
        table.add_column(escape(name), justify="right", no_wrap=True)
    groups = tasks_by_group(first)
    grouped = [task for tasks in groups.values() for task in tasks]
    for group, tasks in {**groups, "": [task for task in first["tasks"] if task not in grouped]}.items():
        if group:
            cells = [mean_of_group(values, group, tasks) for values in results.values()]
            table.add_row(group, f"mean of {len(tasks)}", "", *cells, style="bold")
        for task in tasks:
            record = first["tasks"][task]
            entries = [other["tasks"].get(task) for other in results.values()]
            cells = [with_error(entry, "value", scale(first["suite"])) if entry else "-" for entry in entries]
            table.add_row("  " * bool(group) + escape(record["label"]), escape(record["metric"]), shots(record), *cells)
    console.print(table)
    for name, values in results.items():
        if (limit := values["settings"]["limit"]) is not None:
            print_line(console, f"{name}: the first {limit} questions of each task only")
        if values["left_out"]:
            print_line(console, f"{name}: left out: {', '.join(values['left_out'])}")


def mean_of_group(values: dict[str, Any], group: str, tasks: list[str]) -> str:
    """In per cent; - where a model was not evaluated on just these tasks."""
    mean = group_means(values).get(group, {"tasks": None})
    return f"{100 * mean['value']:.2f}" if mean["tasks"] == tasks else "-"


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


def show_paper(suite: str, paper: PaperTable, results: dict[str, dict[str, Any]], console: Console) -> None:
    """The paper's values of each task for its families and stages, ours above them."""
    ours = {name: own for name, values in results.items() if (own := averages(values).get(suite)) is not None}
    widest = max(map(len, [*ours, *(row.method for row in paper.rows)]))
    width = max(11, min(widest, console.width - NUMBER_WIDTHS))

    def print_rows(title: str, rows: list[tuple[str, list[str]]], header: bool = False) -> None:
        table = Table(box=None, padding=(0, 1, 0, 0), show_header=header, title=escape(title), title_justify="left")
        table.add_column("", width=width, overflow="fold")
        for column in (*paper.columns, "mean"):
            table.add_column(column, justify="right", width=max(5, len(column)))
        for name, cells in rows:
            table.add_row(escape(name), *cells)
        console.print(table)

    own_rows = []
    for name, average in ours.items():
        by_label = {record["label"]: record["value"] for record in results[name]["tasks"].values()}
        values = [by_label.get(task) for task in paper.tasks] + [average["value"] if average["whole"] else None]
        own_rows.append((name, ["-" if value is None else f"{100 * value:.2f}"[:5] for value in values]))
    print_rows(f"per cent; below ours the paper's, {paper.source}", own_rows, header=True)
    for title in dict.fromkeys(row.title for row in paper.rows):
        rows = [row for row in paper.rows if row.title == title]
        print_rows(title, [(row.method, [f"{value:.2f}" for value in (*row.values, row.average)]) for row in rows])
    partly = [(name, average) for name, average in ours.items() if not average["whole"]]
    for name, average in partly:
        tasks = counted(average["num_tasks"], "task")
        print_line(
            console,
            f"{name}: mean over {tasks} {100 * average['value']:.2f}, not to be compared with the paper's: not all of it",
        )
    print_line(
        console,
        "Variants and metrics are chosen so that they fit the paper's figures, which names neither: its rows show the size "
        "of the gains, they are no target for another setup.",
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
    means = comparison["groups"] | {"mean": comparison["mean"]}
    for name, mean in means.items():
        if mean is not None and mean["num_tasks"] > 1:
            cells = (with_error(mean, "difference", factor), f"{mean['num_tasks']} tasks", "")
            table.add_row(name, *cells, verdict(mean), style="bold")
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
