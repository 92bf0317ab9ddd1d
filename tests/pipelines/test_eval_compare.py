"""What remit eval says of two results: differences and their errors by hand, and the tables."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.evaluation.compare import claim, compare
from pipelines.evaluation.results import to_record
from pipelines.evaluation.run import average
from pipelines.evaluation.suites import SUITES, SuiteTask
from pipelines.evaluation.tables import show, show_comparison, titles, verdict


@pytest.fixture
def console() -> Iterator[Console]:
    with Path(os.devnull).open("w") as file:
        yield Console(file=file, record=True, width=160, highlight=False)


def results_of(rows: dict[str, list[float]], suite: str | None = None, **changes: object) -> dict[str, Any]:
    """Results as evaluate writes them, from the value of each question."""
    settings: dict[str, Any] = {"limit": None, "seed": 1, "chat_template": False} | changes
    tasks = {}
    for task, numbers in rows.items():
        tasks[task] = {
            "label": task, "task": task, "metric": "acc,none", "value": sum(numbers) / len(numbers), "stderr": 0.1,
            "samples": {task: [[f"{task}{index}", number] for index, number in enumerate(numbers)]},
            "shots": {task: 0}, "task_versions": {task: "1"}, "num_samples": {task: len(numbers)},
            "settings": {"num_fewshot": 3}, "questions": f"{task} {len(numbers)}",
        }  # fmt: skip
    found = {"suite": suite, "left_out": [], "settings": settings, "tasks": tasks}
    return found | {"average": average(found)}


def test_paired_standard_error_by_hand() -> None:
    ours = results_of({"a": [1, 1, 0, 1], "b": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0]})
    other = results_of({"a": [0, 1, 1, 0], "b": [0, 0, 0, 0, 0, 0, 0, 0, 1, 0]})
    found = compare("other", other, ours)
    # a: differences 1, 0, -1, 1: mean 1/4, squares about it 9/16 + 1/16 + 25/16 + 9/16 = 44/16, / 3 / 4
    assert found["tasks"]["a"] == {
        "difference": 0.25, "stderr": pytest.approx(math.sqrt(44 / 16 / 3 / 4)), "paired": True, "num_questions": 4,
        "claim": "none",
    }  # fmt: skip
    # b: eight times 1, twice 0: mean 0.8, squares about it 8 * 0.04 + 2 * 0.64 = 1.6, / 9 / 10
    assert found["tasks"]["b"]["stderr"] == pytest.approx(math.sqrt(1.6 / 90))
    assert found["tasks"]["b"]["claim"] == "higher"
    assert compare("ours", ours, other)["tasks"]["b"]["claim"] == "lower"
    assert found["mean"]["difference"] == pytest.approx((0.25 + 0.8) / 2)
    assert found["mean"]["stderr"] == pytest.approx(math.sqrt(44 / 16 / 12 + 1.6 / 90) / 2)
    assert found["mean"]["claim"] == "higher"  # 0.525 is more than 1.96 * 0.248


def test_what_is_not_paired_or_not_compared() -> None:
    ours = results_of({"a": [1, 0], "b": [1, 1]})
    other = results_of({"a": [0, 0], "c": [1, 1]})
    other["tasks"]["a"]["samples"]["a"][1][0] = "another question"
    found = compare("other", other, ours)
    assert found["tasks_alone"] == ["b", "c"]
    assert (found["tasks"]["a"]["paired"], found["tasks"]["a"]["stderr"]) == (False, pytest.approx(math.sqrt(0.02)))
    other["tasks"]["a"]["stderr"] = None
    assert compare("other", other, ours)["mean"] == {
        "difference": 0.5, "stderr": None, "claim": "none", "num_tasks": 1,
    }  # fmt: skip
    other["tasks"]["a"]["questions"] = "others"
    assert compare("other", other, ours)["tasks"]["a"] == {"not_compared": "the questions or their prompts differ"}
    limited = compare("other", results_of({"a": [0, 0]}, limit=2), ours)
    assert limited["tasks"]["a"] == {"not_compared": "limit is None and 2"}
    assert limited["mean"] is None


def test_the_error_of_a_mean_needs_that_of_each_task() -> None:
    """Two questions whose differences are equal have an error of zero, which says nothing."""
    ours, other = results_of({"a": [1, 1], "b": [1, 0, 1, 1]}), results_of({"a": [0, 0], "b": [0, 1, 0, 1]})
    found = compare("other", other, ours)
    assert (found["tasks"]["a"]["stderr"], found["tasks"]["a"]["claim"]) == (0.0, "none")
    assert (found["mean"]["stderr"], found["mean"]["claim"]) == (None, "none")
    assert verdict(found["tasks"]["a"]) == "too few questions to tell"
    one = compare("other", results_of({"a": [1], "b": [0, 1, 0, 1]}), results_of({"a": [1], "b": [1, 0, 1, 1]}))
    assert (one["tasks"]["a"]["difference"], one["tasks"]["a"]["stderr"]) == (0.0, None)
    assert one["mean"]["stderr"] is None
    assert verdict(one["mean"]) == "its error is not known"
    group, before = results_of({"a": [1, 0, 1], "g": [1, 0, 1]}), results_of({"a": [0, 0, 1], "g": [0, 0, 1]})
    for results in (group, before):
        results["tasks"]["g"]["samples"] = results["tasks"]["a"]["samples"]
    assert compare("before", before, group)["mean"]["stderr"] is None
    same = compare("other", results_of({"a": [1, 1], "b": [0, 1, 0, 1]}), ours)
    assert same["mean"]["stderr"] == pytest.approx(same["tasks"]["b"]["stderr"] / 2)
    assert verdict(same["tasks"]["a"]) == "the same on every question"
    assert verdict(same["tasks"]["b"]) == "no difference beyond its error"


def test_no_mean_of_values_that_are_no_shares(console: Console) -> None:
    ours, other = (
        results_of({"a": [1, 1, 0], "p": [30.0, 31.0, 36.0]}),
        results_of({"a": [0, 1, 0], "p": [20.0, 21.0, 25.0]}),
    )
    for results in (ours, other):
        results["tasks"]["p"]["higher_is_better"] = False
    found = compare("other", other, ours)
    assert found["tasks"]["p"]["claim"] == "higher"
    assert found["mean"] is None
    show_comparison("ours - other", found, 1, console)
    assert "higher, less is better" in console.export_text()
    ours["tasks"]["p"]["value"] = other["tasks"]["p"]["value"] = 0.5
    assert compare("other", other, ours)["mean"] is None  # less is better


def test_nothing_is_claimed_inside_the_error() -> None:
    assert [claim(d, 0.1) for d in (0.19, 0.2, -0.19, -0.2)] == ["none", "higher", "none", "lower"]
    assert [claim(0.5, None), claim(0.5, 0.0), claim(0.0, 0.1)] == ["none"] * 3
    one = compare("other", results_of({"a": [0.0]}), results_of({"a": [1.0]}))["tasks"]["a"]
    assert (one["stderr"], one["claim"]) == (None, "none")


def test_what_a_question_is() -> None:
    """Its document, target and requests; not the prompt where a model's own chat template wraps it."""
    row = {"doc_hash": "d", "target_hash": "t", "arguments": [("p", " a"), ("p", " b")], "filter": "none", "acc": 1.0}
    results = {"results": {"a": {"acc,none": 1.0}}, "n-shot": {}, "versions": {}, "n-samples": {}}

    def questions(own_prompts: bool = False, **changes: Any) -> str:
        return to_record(SuiteTask("a", "a", 0, None), results | {"samples": {"a": [row | changes]}}, own_prompts)[
            "questions"
        ]

    others = [
        {"doc_hash": "e"},
        {"target_hash": "u"},
        {"arguments": [("p", " a")]},
        {"arguments": [("q", " a"), ("q", " b")]},
    ]
    assert len({questions(), *(questions(**change) for change in others)}) == 5
    assert questions(acc=0.0) == questions()
    assert questions(True, **others[3]) == questions(True) != questions(True, **others[2])


def test_settings_that_may_move_the_values_are_named(console: Console) -> None:
    ours = results_of({"a": [1, 1, 0]}, backend="vllm", dtype="auto", versions={"lm_eval": "1", "vllm": "2"})
    other = results_of({"a": [0, 1, 0]}, backend="hf", dtype="auto", versions={"lm_eval": "0"})
    found = compare("other", other, ours)
    assert found["settings_differ"] == ["backend is vllm and hf", "lm_eval is 1 and 0"]
    assert compare("other", ours, ours)["settings_differ"] == []
    show({"m": ours, "other": other}, [found], console)
    assert "backend is vllm and hf: that alone may move the values" in console.export_text()


def test_results_with_one_name_stay_apart(console: Console) -> None:
    """Files beside each other, and the earlier results of the same model."""
    ours, other = results_of({"a": [1, 1]}), results_of({"a": [0, 0]})
    files = [Path("baselines/one.json"), Path("baselines/two.json"), Path("results/run-12/results.json")]
    names = titles("run/model", Path("results/run-12"), files)
    assert names == ["run/model", "one", "two", "results/run-12/results.json"]
    assert titles("run/model", Path("results/run-13"), files) == ["run-13", "one", "two", "run-12"]
    comparisons = [compare(str(file), other, ours) for file in files]
    show(dict(zip(names, [ours, other, other, other])), comparisons, console)
    text = console.export_text()
    for name in names[1:]:
        assert f"run/model - {name}" in text
    assert text.count("1.0000 ± 0.1000") == 1
    assert text.count("0.0000 ± 0.1000") == 3


def test_tables_beside_the_papers_rows(console: Console) -> None:
    suite: tuple[SuiteTask, ...] = SUITES["paper"]
    ours = results_of({task.task: [1, 0] for task in suite}, "paper")
    other = results_of({task.task: [1, 1] for task in suite[:4]}, "paper")
    comparisons = [compare("b[red]", other, ours)]
    show({"a[/b]": ours, "b[red]": other}, comparisons, console)
    text = console.export_text()
    assert "arXiv 2602.03075" in text
    assert "27.56" in text
    assert "a[/b]: average over 10 tasks 50.00\n" in text
    assert "b[red]: average over 4 tasks 100.00, not to be compared with the paper's" in text
    assert "values of single tasks are not known" in text
    assert "0 (3 asked)" in text
    assert "no difference beyond its error" in text
    assert ours["average"] == {"value": 0.5, "num_tasks": 10, "whole": True}
    assert average(results_of({task.task: [1, 0] for task in suite}, "paper", limit=5))["whole"] is False
