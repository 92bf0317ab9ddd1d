"""remit eval: the paper's suites in the installed harness, the guard for programs that a model writes, refusals."""

import contextlib
import os
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from lm_eval.tasks import TaskManager

from pipelines.cli import parse
from pipelines.evaluation.results import to_record
from pipelines.evaluation.run import code_execution, plan_tasks, why_left_out
from pipelines.evaluation.settings import EvalConfig
from pipelines.evaluation.suites import SUITES, SuiteTask, harness_has
from pipelines.evaluation.tasks import leaves, load_task

Remit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def harness() -> TaskManager:
    return TaskManager()


def tasks_of(harness: TaskManager, name: str) -> list[dict[str, Any]]:
    found = leaves(harness, name)
    assert found, name
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_tasks_of_the_installed_harness(harness: TaskManager, suite: str) -> None:
    assert len(SUITES[suite]) == (3 if suite == "recall" else 10)
    for task in SUITES[suite]:
        assert harness_has(task) is (task.task in harness.task_index) is (task.label != "SimpleQA"), task
        if not harness_has(task):
            continue
        metric, filter_name = task.metric.split(",")
        for config in tasks_of(harness, task.task):
            assert bool(config.get("unsafe_code")) is task.runs_code, task
            # functions of a task file are unresolved here: .../utils.pass_at_k gives pass@1 for k: [1]
            names = [Path(entry["metric"]).name for entry in config["metric_list"]]
            functions = {"pass@1": "utils.pass_at_k", "pass_at_1": "utils.pass_at_1"}
            assert functions.get(metric, metric) in names, task
            filters = [entry["name"] for entry in config.get("filter_list") or [{"name": "none"}]]
            assert filter_name in filters, task
            # a task that is defined with 0 shots ignores the number that is asked for
            assert config.get("num_fewshot") != 0 or task.shots == 0 or task.label in ("IFEval", "TruthfulQA"), task
        entry = harness.task_index[task.task]
        if entry.kind.name == "GROUP":
            aggregated = {item["metric"]: item for item in entry.cfg["aggregate_metric_list"]}
            assert aggregated[metric]["weight_by_size"], task
            assert aggregated[metric].get("filter_list", "none") == filter_name, task


def test_shots_are_the_papers() -> None:
    shots = {task.label: task.shots for task in SUITES["paper"]}
    assert shots == {
        "GSM8K": 8, "Minerva Math": 4, "GPQA": 5, "BBH": 3, "IFEval": 3, "HumanEval": 0, "MBPP": 3, "TruthfulQA": 3,
        "ARC-Challenge": 25, "MMLU-Pro": 5,
    }  # fmt: skip
    assert {task.label for task in SUITES["paper-posttrained"]} == {
        "GSM8K", "Minerva Math", "MBPP", "MBPP+", "HumanEval", "HumanEval+", "ARC-Challenge", "GPQA Diamond", "MMLU-Pro",
        "IFEval",
    }  # fmt: skip
    assert not any(task.shots for task in SUITES["paper-posttrained"])


def test_a_suite_without_what_the_harness_lacks() -> None:
    config = EvalConfig("m", suite="paper, recall")
    tasks, left_out = plan_tasks(config)
    assert [task.task for task in tasks[-2:]] == ["triviaqa", "nq_open"]
    assert (len(tasks), left_out) == (10, ["HumanEval", "MBPP", "SimpleQA"])
    assert why_left_out(config).endswith("--allow-code-execution; the installed lm-eval has no SimpleQA")
    assert why_left_out(EvalConfig("m", suite="recall", skip="simpleqa")) == ""


def test_code_runs_only_when_allowed(harness: TaskManager) -> None:
    tasks, left_out = plan_tasks(EvalConfig("m"))
    assert (len(tasks), left_out) == (8, ["HumanEval", "MBPP"])
    tasks, left_out = plan_tasks(EvalConfig("m", allow_code_execution=True, skip="gpqa_main_n_shot"))
    assert (len(tasks), left_out) == (9, ["GPQA"])
    for name in ("humaneval", "mbpp"):
        with pytest.raises(
            ValueError, match=f"^{name}: runs the programs that the model writes.*--allow-code-execution"
        ):
            load_task(harness, name, False)


def test_a_variable_left_in_a_shell_is_no_consent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is consent to one evaluation left behind. Nor does a group hide a task of one's own that runs programs."""
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
    with code_execution(False):
        assert "HF_ALLOW_CODE_EVAL" not in os.environ
    assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL")
    with contextlib.suppress(RuntimeError), code_execution(True):
        assert os.environ["HF_ALLOW_CODE_EVAL"] == "1"
        raise RuntimeError
    assert "HF_ALLOW_CODE_EVAL" not in os.environ
    (tmp_path / "runs.yaml").write_text("{task: runs, unsafe_code: true, dataset_path: json}")
    (tmp_path / "both.yaml").write_text("{group: both, task: [runs], aggregate_metric_list: [{metric: acc}]}")
    own = TaskManager(include_path=str(tmp_path), include_defaults=False)
    for name in ("runs", "both"):
        with pytest.raises(ValueError, match=f"^{name}: runs the programs that the model writes"):
            load_task(own, name, False)


def test_tasks_that_cannot_be_loaded(tmp_path: Path, harness: TaskManager) -> None:
    with pytest.raises(ValueError, match="no_such_task: is no task or group of the installed lm-eval"):
        load_task(harness, "no_such_task", False)
    with pytest.raises(ValueError, match=r"ai2_arc: is no task or group .* and not a tag of several"):
        load_task(harness, "ai2_arc", False)
    task = {"task": "no_data", "dataset_path": "json", "dataset_kwargs": {"data_files": "gone.jsonl"}}
    (tmp_path / "no_data.yaml").write_text(yaml.safe_dump(task | {"output_type": "multiple_choice"}))
    own = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(
        ValueError,
        match=r"no_data: cannot be loaded with its data set json \(FileNotFoundError: .*correct the YAML file",
    ):
        load_task(own, "no_data", False)
    with pytest.raises(ValueError, match="a: the harness gives acc,none, expected em,none"):
        to_record(SuiteTask("a", "a", 0, "em,none"), {"results": {"a": {"acc,none": 0.5}}, "samples": {}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--suite", "paper", "--tasks", "a"), "--suite and --tasks are both given"),
        (("--num-fewshot", 3), "--num-fewshot is given without --tasks"),
        (("--tasks", ","), "--tasks is ',', expected names"),
        (("--tasks", "a,a"), "commas between, each once"),
        (("--tasks", "a", "--skip", "b"), "--skip is given with --tasks"),
        (("--skip", "gpqa"), "--skip has 'gpqa', expected names out of gsm8k, "),
        (("--limit", 0), "--limit is 0, expected at least 1"),
        (("--batch-size", 0), "--batch-size is 0, expected at least 1"),
        (("--suite", "paper,other"), "--suite has 'other', expected names out of paper, paper-posttrained, recall"),
        (
            ("--suite", "paper,paper-posttrained"),
            "which have arc_challenge, gsm8k, humaneval, ifeval, mbpp, minerva_math, ",
        ),
        (("--suite", "paper,paper"), "in common"),
        (("--suite", ","), "which names none"),
    ],
)
def test_wrong_arguments(remit: Remit, arguments: tuple, message: str) -> None:
    code, _, error = remit("eval", "--model", "m", *arguments)
    assert (code, message in " ".join(error.replace("│", " ").split())) == (2, True), error


def test_inputs_that_are_refused(tmp_path: Path, remit: Remit, models: dict[str, Path]) -> None:
    code, _, error = remit("eval", "--model", tmp_path / "none", "--out", tmp_path / "out")
    assert (code, "no such folder" in error) == (1, True)
    code, _, error = remit("eval", "--model", models["base"], "--tasks", "a", "--task-dir", tmp_path / "none")
    assert (code, f"--task-dir {tmp_path}/none: no such folder" in error) == (1, True)
    scripted = tmp_path / "scripted"
    scripted.mkdir()
    (scripted / "modeling.py").write_text("raise SystemExit\n")
    code, _, error = remit("eval", "--model", scripted, "--out", tmp_path / "out")
    assert (code, "Python code in a model folder" in error) == (1, True)
    (tmp_path / "old.json").write_text("[]")
    code, _, error = remit("eval", "--model", models["base"], "--compare", tmp_path / "old.json")
    assert (code, "is no result of remit eval" in error) == (1, True)
    (tmp_path / "old.json").write_text('{"format": 1, "tasks": {}}')
    code, _, error = remit("eval", "--model", models["base"], "--compare", tmp_path / "old.json")
    assert (code, "old.json: has format 1, expected 3" in error) == (1, True)
    code, _, error = remit("eval", "--model", models["base"], "--compare", models["base"])
    assert (code, "a model is evaluated by a command of its own" in error) == (1, True)
    code, _, error = remit("eval", "--model", models["base"], "--chat-template", "--out", tmp_path / "out")
    assert (code, f"--chat-template is given and {models['base']} has none" in error) == (1, True), error
    code, _, error = remit("eval", "--model", models["base"], "--max-length", 65, "--out", tmp_path / "out")
    assert (code, "--max-length is 65 and config.json of" in error, "has 64 positions" in error) == (1, True, True)
    assert not (tmp_path / "out").exists()


def test_commands_of_the_documentation_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need the hub stand in blocks that are not run with the other pages."""
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("remit eval")]
    assert len(lines) == 8
    monkeypatch.chdir(tmp_path)
    for line in lines:
        assert isinstance(parse(shlex.split(line)[1:]), EvalConfig)
