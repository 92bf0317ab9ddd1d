"""What remit eval says of two results: differences and their errors by hand, and the tables."""

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipelines.evaluation.compare import claim, compare
from pipelines.evaluation.paper import paper_table
from pipelines.evaluation.results import averages, group_means, to_record
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
    return found | {"averages": averages(found), "groups": group_means(found)}


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
    rows = {task.task: [1, 0] for task in suite}
    ours = results_of(rows | {"gsm8k": [1, 1]}, "paper")
    other = results_of({task.task: [1, 1] for task in suite[:4]}, "paper")
    for found in (ours, other):
        name_by_label(found)
    comparisons = [compare("b[red]", other, ours)]
    show({"a[/b]": ours, "b[red]": other}, comparisons, console)
    text = console.export_text()
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "arXiv 2602.03075" in text
    assert "a[/b] 100.0 50.00 50.00 50.00 50.00 50.00 50.00 50.00 50.00 50.00 55.00" in lines
    assert "b[red] 100.0 100.0 100.0 100.0 - - - - - - -" in lines
    assert "ReMiT 61.64 14.50 24.55 32.07 28.54 12.80 9.20 25.58 49.23 17.44 27.56" in lines
    families = ["OLMo-1B", "SmolLM3-3B", "Youtu-LLM-2B"]
    assert [line for line in lines if line in families] == families
    assert "b[red]: mean over 4 tasks 100.00, not to be compared with the paper's" in text
    # GSM8K 1, Minerva Math, BBH, HumanEval and MBPP 1/2; the other has only three of them
    assert "reasoning mean of 5 60.00 -" in lines
    assert "knowledge mean of 4 50.00 -" in lines
    assert text.index("reasoning") < text.index("BBH") < text.index("knowledge") < text.index("  GPQA ")
    assert "0 (3 asked)" in text
    assert "no difference beyond its error" in text
    assert ours["averages"] == {"paper": {"value": pytest.approx(0.55), "num_tasks": 10, "whole": True}}
    assert averages(results_of(rows, "paper", limit=5))["paper"]["whole"] is False
    # differences 0, -1/2, -1/2 and errors 0, 1/2, 1/2
    reasoning = comparisons[0]["groups"]["reasoning"]
    assert reasoning["difference"] == pytest.approx(-1 / 3)
    assert reasoning["stderr"] == pytest.approx(math.sqrt(0.5) / 3)
    assert reasoning["num_tasks"] == 3
    assert "reasoning -33.33 ± 23.57 3 tasks no difference beyond its error" in lines


def name_by_label(results: dict[str, Any]) -> None:
    """Tasks under the names that a suite gives them."""
    labels = {task.task: task.label for suite in SUITES.values() for task in suite}
    for task, record in results["tasks"].items():
        record["label"] = labels[task]


def test_recall_beside_the_paper(console: Console) -> None:
    """Whether a gain costs recall: a group of its own, and no part of the paper's mean."""
    paper = {task.task: [1, 0] for task in SUITES["paper"]}
    ours = results_of(paper | {"triviaqa": [1, 1, 1, 0], "nq_open": [0, 0, 1, 0]}, "paper,recall")
    before = results_of(paper | {"triviaqa": [1, 1, 1, 1], "nq_open": [1, 0, 1, 0]}, "paper,recall")
    assert ours["averages"]["paper"] == {"value": 0.5, "num_tasks": 10, "whole": True}
    assert ours["averages"]["recall"] == {"value": 0.5, "num_tasks": 2, "whole": True}  # the harness has no SimpleQA
    found = compare("before", before, ours)
    assert found["groups"]["recall"]["difference"] == pytest.approx(-0.25)
    # each a difference of one question in four: sd 1/2, / sqrt(4)
    assert found["groups"]["recall"]["stderr"] == pytest.approx(math.hypot(0.25, 0.25) / 2)
    show({"after": ours, "before": before}, [found], console)
    lines = [" ".join(line.split()) for line in console.export_text().splitlines()]
    assert "recall mean of 2 50.00 75.00" in lines


@pytest.mark.parametrize("suite", ["paper", "paper-posttrained"])
def test_the_papers_table_fits_a_terminal(suite: str) -> None:
    """80 columns, and nothing is cut."""
    ours = results_of({task.task: [1, 0] for task in SUITES[suite]}, suite)
    name_by_label(ours)
    with Path(os.devnull).open("w") as file:
        narrow = Console(file=file, record=True, width=80, highlight=False)
        show({"a-long-name-0123abcd": ours}, [], narrow)
    text = narrow.export_text()
    table = text[text.index("per cent;") : text.index("Variants and metrics")].splitlines()
    assert max(map(len, table)) <= 80
    assert "…" not in "".join(table)
    assert [line.split()[-1] for line in table if line.strip().startswith("ReMiT")] == [
        f"{row.average:.2f}" for row in paper_table(suite).rows if row.method == "ReMiT"
    ]


# questions of each task in its test split; IFEval has 541 prompts with 834 instructions
NUM_QUESTIONS = {
    "GSM8K": 1319, "Minerva Math": 5000, "GPQA": 448, "BBH": 6511, "IFEval": 834, "HumanEval": 164, "MBPP": 500,
    "TruthfulQA": 817, "ARC-Challenge": 1172, "MMLU-Pro": 12032, "MBPP+": 378, "HumanEval+": 164, "GPQA Diamond": 198,
}  # fmt: skip
# the paper's own: no number of such questions
NOT_WHOLE = {
    ("OLMo-1B, SFT", "ReMiT", "GSM8K"), ("Youtu-LLM-2B", "ReMiT", "HumanEval"), ("OLMo-1B, RL", "ReMiT", "HumanEval"),
    ("OLMo-1B, RL", "KD", "MBPP"), ("OLMo-1B, RL", "NTP", "MBPP+"), ("OLMo-1B, RL", "KD", "MBPP+"),
    ("OLMo-1B, RL", "ReMiT", "MBPP+"), ("OLMo-1B, DPO", "KD", "GPQA Diamond"),
}  # fmt: skip


def test_the_papers_figures() -> None:
    """Each is a whole number of questions, and the averages are those of the tasks: a mistyped one is neither."""
    odd = set()
    for suite in ("paper", "paper-posttrained"):
        table = paper_table(suite)
        assert list(table.tasks) == [task.label for task in SUITES[suite]]
        for row in table.rows:
            assert len(row.values) == len(table.columns) == 10
            assert row.mean == pytest.approx(row.average, abs=0.0101), row
            for task, value in zip(table.tasks, row.values):
                right = NUM_QUESTIONS[task] * value / 100
                if abs(right - round(right)) * 100 / NUM_QUESTIONS[task] > 0.0051:
                    odd.add((row.title, row.method, task))
    assert odd == NOT_WHOLE
    one, other = (list(dict.fromkeys(row.title for row in paper_table(suite).rows)) for suite in list(SUITES)[:2])
    assert one == ["OLMo-1B", "SmolLM3-3B", "Youtu-LLM-2B"]
    assert other == ["OLMo-1B, SFT", "OLMo-1B, DPO", "OLMo-1B, RL", "Youtu-LLM-2B, SFT", "Youtu-LLM-2B, DPO"]
    assert [len(paper_table(suite).rows) for suite in list(SUITES)[:2]] == [19, 15]
    assert paper_table("recall") is None
