"""remit eval: the harness' numbers against transformers in float64, resuming, comparing, refusals."""

import contextlib
import json
import math
import os
import pickle
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
import yaml
from annotated import run
from conftest import make_model
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from rich.console import Console
from test_tokenizer import BOS, byte_level, save

from pipelines.cli import parse
from pipelines.evaluation import harness as lm_harness
from pipelines.evaluation.compare import claim, compare
from pipelines.evaluation.prompts import count_cut
from pipelines.evaluation.results import to_record
from pipelines.evaluation.run import Subject, average, cache_file, common_settings, plan_tasks
from pipelines.evaluation.settings import EvalConfig
from pipelines.evaluation.suites import SUITES, SuiteTask
from pipelines.evaluation.tables import show, show_comparison, verdict
from pipelines.evaluation.tasks import leaves, load_task
from pipelines.models import LocalModel
from shards.output_folder import writing

Remit = Callable[..., tuple[int, str, str]]

QUESTIONS = [
    ("The sum of two and three is", ["five", "seven", "a banana"], 0),
    ("Öl auf Wasser — was schwimmt?", ["das Öl", "nichts"], 0),
    ("for i in range(", ["10):", "))", "import", "class Ünïcode"], 0),
    ("def f(x): return", ["x", "None of these at all"], 1),
    ("x", ["=", "😀👩‍👩‍👧", "y"], 1),
    ("שלום", ["עולם", "self"], 0),
    ("import", ["os", "json", "numpy as np"], 2),
]
NEW_TOKENS = 6


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path], models: dict[str, Path]) -> Path:
    out = tmp_path_factory.mktemp("run") / "trained"
    run(out, annotated["packed"], models["base"], max_steps=3, learning_rate=1e-3)
    return out / "model"


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory, annotated: dict[str, Path], models: dict[str, Path]) -> Path:
    out = tmp_path_factory.mktemp("run") / "other"
    run(out, annotated["packed"], models["reference"], max_steps=2, learning_rate=1e-3)
    return out / "model"


class Oracle:
    """A model in float64 by transformers alone."""

    def __init__(self, folder: Path) -> None:
        self.model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    @torch.no_grad()
    def loglikelihood(self, question: str, answer: str) -> float:
        start = len(self.tokenizer(question, add_special_tokens=False).input_ids)
        ids = torch.tensor([self.tokenizer(f"{question} {answer}", add_special_tokens=False).input_ids])
        logprobs = self.model(ids).logits[0, :-1].log_softmax(-1)
        return logprobs.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()

    @torch.no_grad()
    def continuation(self, question: str) -> str:
        ids = self.tokenizer(question, add_special_tokens=False).input_ids
        start = len(ids)
        for _ in range(NEW_TOKENS):
            ids.append(int(self.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == self.tokenizer.eos_token_id:
                break
        return self.tokenizer.decode(ids[start:], skip_special_tokens=True)

    def right_choices(self) -> list[float]:
        right = []
        for question, choices, answer in QUESTIONS:
            scores = [self.loglikelihood(question, choice) for choice in choices]
            right.append(float(scores.index(max(scores)) == answer))
        return right


@pytest.fixture(scope="module")
def oracle(exported: Path) -> Oracle:
    return Oracle(exported)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Path:
    """Five tasks and a group. The first answer, asked for as text, is the model's own for every other question, else a wrong one."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = []
    for index, (question, choices, answer) in enumerate(QUESTIONS):
        own = oracle.continuation(question)
        rows.append({"q": question, "choices": choices, "answer": answer, "first": choices[0]})
        rows[-1]["text"] = own if index % 2 == 0 else own + "!"
        rows[-1]["head"] = own[:1] if index % 3 == 0 else "no"
    data = folder / "questions.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    few = folder / "few.jsonl"
    few.write_text("".join(json.dumps(row) + "\n" for row in rows[:3]), encoding="utf-8")
    aggregate = [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}]
    group = {"group": "own_group", "task": ["own_choice", "own_few"], "aggregate_metric_list": aggregate}
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    common = {
        "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}, "test_split": "test",
        "doc_to_text": "{{q}}",
    }  # fmt: skip
    tasks: dict[str, dict[str, Any]] = {
        "own_choice": {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
        "own_loglikelihood": {
            "output_type": "loglikelihood", "doc_to_target": "{{' ' + first}}", "metric_list": [{"metric": "perplexity"}],
        },
        "own_filtered": {
            "output_type": "generate_until", "doc_to_target": "head", "repeats": 2,
            "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\u2603"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
            "filter_list": [
                {"name": "head", "filter": [
                    {"function": "regex", "regex_pattern": "(?s)^(.)"}, {"function": "majority_vote"},
                    {"function": "take_first"}]},
                {"name": "whole", "filter": [{"function": "take_first"}]},
            ],
        },
        "own_few": {
            "output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
            "dataset_kwargs": {"data_files": {"test": str(few)}}, "metric_list": [{"metric": "acc"}],
        },
        "own_text": {
            "output_type": "generate_until", "doc_to_target": "text", "metric_list": [{"metric": "exact_match"}],
            "generation_kwargs": {"until": ["\u2603"], "do_sample": False, "max_gen_toks": NEW_TOKENS},
        },
    }  # fmt: skip
    for name, task in tasks.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name} | common | task))
    return folder


def record(out: Path, task: str) -> dict[str, Any]:
    (file,) = out.glob("*/results.json")
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["tasks"][task]
    return found


def values(found: dict[str, Any]) -> list[float]:
    (rows,) = found["samples"].values()
    return [value for _, value in rows]


def check_numbers(out: Path, oracle: Oracle) -> None:
    """What is in `out` against float64: choices, log-likelihoods, greedy texts."""
    choice, loglikelihood, text = (record(out, f"own_{task}") for task in ("choice", "loglikelihood", "text"))
    right = oracle.right_choices()
    assert 0 < sum(right) < len(right)
    assert values(choice) == right
    assert (choice["metric"], choice["value"]) == ("acc,none", pytest.approx(sum(right) / len(right)))
    expected = [oracle.loglikelihood(question, choices[0]) for question, choices, _ in QUESTIONS]
    assert values(loglikelihood) == pytest.approx(expected, abs=1e-3)
    assert loglikelihood["value"] == pytest.approx(math.exp(-sum(expected) / len(expected)), rel=1e-4)
    assert values(text) == [float(index % 2 == 0) for index in range(len(QUESTIONS))]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What the models of this process are asked, request by request."""
    requests: list[tuple] = []
    for kind in ("loglikelihood", "loglikelihood_rolling", "generate_until"):

        def counted(ask: Callable) -> Callable:
            def answer(self: HFLM, asked: list[Any], *rest: Any, **more: Any) -> Any:
                requests.extend(request.args for request in asked)
                return ask(self, asked, *rest, **more)

            return answer

        monkeypatch.setattr(HFLM, kind, counted(getattr(HFLM, kind)))
    return requests


NAMES = "own_choice,own_loglikelihood,own_text"
NUM_REQUESTS = sum(len(choices) for _, choices, _ in QUESTIONS) + len(QUESTIONS)  # first answers are choices, too


@pytest.mark.usefixtures("starts_processes")
def test_own_tasks_and_again(
    tmp_path: Path, exported: Path, oracle: Oracle, task_dir: Path, remit: Remit, asked: list[tuple]
) -> None:
    command = ["eval", "--model", exported, "--task-dir", task_dir, "--out", tmp_path, "--dtype", "float32"]
    code, output, error = remit(*command, "--tasks", NAMES)
    assert code == 0, error
    check_numbers(tmp_path, oracle)
    assert len(asked) == NUM_REQUESTS
    choice = record(tmp_path, "own_choice")
    assert f"{choice['value']:.4f} ± {choice['stderr']:.4f}" in output
    (folder,) = tmp_path.iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert folder.name == f"trained-{results['settings']['model']['weights'][:8]}"
    assert set(results["settings"]["versions"]) == {"lm_eval", "transformers", "torch", "datasets"}
    assert (choice["shots"], results["settings"]["seed"]) == ({"own_choice": 0}, 1234)
    assert list(results["tasks"]) == NAMES.split(",")

    asked.clear()
    code, again_output, error = remit(*command, "--tasks", NAMES)
    assert (code, again_output, "loading the data" in error) == (0, output, False)
    (folder / "results.json").write_text("{}")
    code, _, error = remit(*command, "--tasks", NAMES)
    assert (code, asked, "loading the data" in error) == (0, [], True), error  # all is in the cache
    again = json.loads((folder / "results.json").read_text())
    for found in (*results["tasks"].values(), *again["tasks"].values()):
        del found["seconds"]
    assert again == results

    code, output, error = remit(*command, "--tasks", "own_choice", "--limit", 3)
    assert (code, asked, "the first 3 questions of each task only" in output) == (0, [], True), error
    assert values(record(tmp_path, "own_choice")) == oracle.right_choices()[:3]
    code, _, error = remit(*command, "--tasks", "own_choice", "--num-fewshot", 1)
    assert (code, len(asked)) == (0, NUM_REQUESTS - len(QUESTIONS)), error  # other prompts
    asked.clear()
    # 64 is all that the model takes: the answers are the same, but nothing in a request says so
    code, _, error = remit(*command, "--tasks", NAMES, "--max-length", 64)
    assert (code, len(asked)) == (0, NUM_REQUESTS), error
    check_numbers(tmp_path, oracle)


@pytest.mark.usefixtures("starts_processes")
def test_what_is_done_is_not_loaded_again(
    tmp_path: Path, exported: Path, task_dir: Path, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A suite without network: the harness' index is that of the task folder."""
    tasks = (SuiteTask("Choice", "own_choice", 1, "acc_norm,none"), SuiteTask("Few", "own_few", 0, "acc,none"))
    monkeypatch.setitem(SUITES, "paper", tasks)
    own = TaskManager(include_path=str(task_dir), include_defaults=False)
    monkeypatch.setattr("pipelines.evaluation.tasks.TaskManager", lambda **_: own)
    command = ["eval", "--model", exported, "--out", tmp_path]
    code, first, error = remit(*command)
    assert (code, "loading the data of own_choice, own_few" in error) == (0, True), error
    code, again, error = remit(*command)
    assert (code, "loading the data" in error, "was evaluated before" in error) == (0, False, True)
    assert again == first
    assert "average over 2 tasks" in first
    code, _, error = remit(*command, "--limit", 2)
    assert (code, "loading the data" in error) == (0, True)


@pytest.mark.usefixtures("starts_processes")
def test_answers_drawn_at_random_are_not_kept(tmp_path: Path, exported: Path, remit: Remit, asked: list[tuple]) -> None:
    """A temperature says so, without do_sample: of three answers to one question the cache would make one."""
    (tmp_path / "q.jsonl").write_text(json.dumps({"q": "def f(", "a": "x"}) + "\n")
    task = {
        "task": "drawn", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "q.jsonl")}},
        "test_split": "test", "output_type": "generate_until", "repeats": 3, "doc_to_text": "{{q}}", "doc_to_target": "a",
        "metric_list": [{"metric": "exact_match"}], "generation_kwargs": {"temperature": 1.0, "max_gen_toks": 4, "until": []},
    }  # fmt: skip
    (tmp_path / "drawn.yaml").write_text(yaml.safe_dump(task))
    for _ in range(2):
        asked.clear()
        code, _, error = remit(
            "eval", "--model", exported, "--task-dir", tmp_path, "--tasks", "drawn", "--out", tmp_path / "o"
        )
        next(tmp_path.glob("o/*/results.json")).unlink()
        assert (code, len(asked)) == (0, 3), error


class Trap:
    """Runs as it is unpickled."""

    def __reduce__(self) -> tuple:
        return (os.mkdir, ("trapped",))


@pytest.mark.usefixtures("starts_processes")
def test_nothing_is_unpickled(
    tmp_path: Path, exported: Path, oracle: Oracle, task_dir: Path, remit: Remit, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of results may be somebody else's."""
    monkeypatch.chdir(tmp_path)
    command = ["eval", "--model", exported, "--task-dir", task_dir, "--out", tmp_path / "o", "--dtype", "float32"]
    assert remit(*command, "--tasks", NAMES)[0] == 0
    (file,) = tmp_path.glob("o/*/answers-*.db")
    with contextlib.closing(sqlite3.connect(file)) as database, database:
        rows = database.execute("SELECT value FROM unnamed").fetchall()
        assert len(rows) == NUM_REQUESTS
        assert all(isinstance(json.loads(value), list | str) for (value,) in rows)
        database.execute("UPDATE unnamed SET value = ?", (pickle.dumps(Trap()),))
    (file.parent / "results.json").unlink()
    code, _, error = remit(*command, "--tasks", NAMES)
    assert (code, "Traceback" in error) == (1, False)
    assert not (tmp_path / "trapped").exists()
    file.write_bytes(b"no database" * 1000)
    code, _, error = remit(*command, "--tasks", NAMES)
    assert (code, f"{file}: cannot be read or written" in error, "delete it" in error) == (1, True, True), error
    file.unlink()
    assert remit(*command, "--tasks", NAMES)[0] == 0
    check_numbers(tmp_path / "o", oracle)


@pytest.mark.parametrize("name", ["LlamaTokenizerFast", "GemmaTokenizerFast"])
def test_the_ids_are_those_of_the_file(tmp_path: Path, name: str) -> None:
    """A file with a BOS in front, as Gemma's has, whose class makes other ids of a text, or cannot be made of the file."""
    folder = save(byte_level(bos=True), make_model(tmp_path, "Llama"), tokenizer_class=name)
    file = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    text, answer = "x = row", " + 1"
    ids = file.encode(text + answer).ids
    assert ids[0] == file.token_to_id(BOS)
    theirs = None
    with contextlib.suppress(Exception):
        theirs = transformers.AutoTokenizer.from_pretrained(folder)(text + answer).input_ids
    assert theirs != ids
    model = lm_harness.load_model(EvalConfig(str(folder), dtype="float32"), folder)
    assert model.tok_encode(text) == file.encode(text).ids
    request = Instance("loglikelihood", {}, (text, answer), 0)
    ((found, _),) = model.loglikelihood([request], disable_tqdm=True)
    own = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    logprobs = own(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    start = len(file.encode(text).ids)
    expected = logprobs.gather(1, torch.tensor(ids[1:])[:, None])[start - 1 :].sum().item()
    assert found == pytest.approx(expected, abs=1e-4)


def command_line(*words: object, slow: bool = False, **environment: str) -> subprocess.Popen:
    """The command in a process of its own; slow: a tenth of a second for each batch."""
    patch = "from lm_eval.models.huggingface import HFLM as M; import time; c = M._model_call; "
    patch += "M._model_call = lambda *a, **k: (time.sleep(.1), c(*a, **k))[1]; "
    code = f"{patch if slow else ''}from pipelines.cli import main; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words)], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        start_new_session=True, env=os.environ | environment,
    )  # fmt: skip


@pytest.mark.usefixtures("starts_processes")
def test_vllm(tmp_path: Path, exported: Path, oracle: Oracle, task_dir: Path) -> None:
    command = [
        "eval", "--model", exported, "--task-dir", task_dir, "--out", tmp_path, "--dtype", "float32", "--backend",
        "vllm", "--tasks", NAMES,
    ]  # fmt: skip
    for _ in range(2):
        for file in tmp_path.glob("*/results.json"):
            file.unlink()
        process = command_line(*command)
        _, error = process.communicate()
        assert process.returncode == 0, error
        check_numbers(tmp_path, oracle)
        (file,) = tmp_path.glob("*/answers-*.db")
        with contextlib.closing(sqlite3.connect(file)) as database:
            assert database.execute("SELECT count(*) FROM unnamed").fetchone() == (NUM_REQUESTS,)
    assert "Processed prompts" not in error  # of the second command
    (file,) = tmp_path.glob("*/results.json")
    assert "vllm" in json.loads(file.read_text())["settings"]["versions"]


@pytest.mark.usefixtures("starts_processes")
def test_compare_models_and_files(
    tmp_path: Path, exported: Path, other: Path, oracle: Oracle, task_dir: Path, remit: Remit
) -> None:
    command = ["eval", "--task-dir", task_dir, "--out", tmp_path, "--tasks", "own_choice,own_loglikelihood"]
    code, output, error = remit(*command, "--model", exported, "--compare", other)
    assert code == 0, error
    assert "own_choice" in output
    differences = [a - b for a, b in zip(oracle.right_choices(), Oracle(other).right_choices(), strict=True)]
    mean = sum(differences) / len(differences)
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
    (comparison,) = json.loads((tmp_path / "compare.json").read_text())
    found = comparison["tasks"]["own_choice"]
    assert (found["paired"], found["num_questions"]) == (True, len(QUESTIONS))
    assert (found["difference"], found["stderr"]) == (pytest.approx(mean), pytest.approx(stderr))
    # a perplexity is no mean over the questions, so that the pairs say nothing about its error
    both = [json.loads(file.read_text())["tasks"] for file in sorted(tmp_path.glob("*/results.json"))]
    records = [tasks["own_loglikelihood"] for tasks in both]
    unpaired = comparison["tasks"]["own_loglikelihood"]
    assert not unpaired["paired"]
    assert unpaired["stderr"] == pytest.approx(math.hypot(*(entry["stderr"] for entry in records)))

    (file,) = tmp_path.glob("other-*/results.json")
    code, _, error = remit(*command, "--model", exported, "--compare", file)
    assert (code, "loading the data" in error) == (0, False)
    (again,) = json.loads((tmp_path / "compare.json").read_text())
    assert again["tasks"] == comparison["tasks"]


@pytest.mark.usefixtures("starts_processes")
def test_groups_filters_and_prompts_that_are_cut(
    tmp_path: Path, exported: Path, oracle: Oracle, task_dir: Path, remit: Remit
) -> None:
    command = ["eval", "--model", exported, "--task-dir", task_dir, "--out", tmp_path, "--dtype", "float32"]
    code, output, error = remit(*command, "--tasks", "own_filtered,own_group")
    assert code == 0, error
    filtered, group = record(tmp_path, "own_filtered"), record(tmp_path, "own_group")
    own = [oracle.continuation(question) for question, _, _ in QUESTIONS]
    assert all(own)
    assert values(filtered) == [float(index % 3 == 0) for index in range(len(QUESTIONS))]
    assert filtered["metric"] == "exact_match,head"
    whole = sum(len(text) == 1 and index % 3 == 0 for index, text in enumerate(own)) / len(own)
    assert filtered["all"]["own_filtered"]["exact_match,whole"] == pytest.approx(whole)
    right = oracle.right_choices()
    assert group["value"] == pytest.approx((sum(right) + sum(right[:3])) / 10)
    assert group["samples"]["own_few"] == group["samples"]["own_choice"][:3]
    assert (group["num_samples"], set(group["cut_questions"].values())) == ({"own_choice": 7, "own_few": 3}, {0})
    assert "were cut" not in output

    tokens = lambda text: len(oracle.tokenizer(text, add_special_tokens=False).input_ids)  # noqa: E731
    longest = max(tokens(f" {choice}") for _, choices, _ in QUESTIONS for choice in choices)
    code, output, error = remit(*command, "--tasks", "own_choice,own_text", "--max-length", longest)
    assert code == 0, error
    cut = {
        "own_text": sum(tokens(question) > longest - NEW_TOKENS for question, _, _ in QUESTIONS),
        "own_choice": sum(
            any(tokens(f"{question} {choice}") > longest + 1 for choice in choices)
            for question, choices, _ in QUESTIONS
        ),
    }
    assert all(0 < number < len(QUESTIONS) for number in cut.values())
    for task, number in cut.items():
        assert record(tmp_path, task)["cut_questions"] == {task: number}
        assert f"{task}: {number} of 7 prompts were longer than the model takes and were cut" in output
    code, _, error = remit(*command, "--tasks", "own_text", "--max-length", NEW_TOKENS)
    line = f"own_text: answers may have {NEW_TOKENS} tokens and the model takes {NEW_TOKENS} in all"
    assert (code, line in error) == (1, True)
    code, _, error = remit(*command, "--tasks", "own_choice", "--max-length", longest - 1)
    line = "own_choice: AssertionError: assert len(continuation_enc) <= self.max_length"
    assert (code, line in error) == (1, True)


class Letters:
    """Stands in for the harness' model: a token for each byte."""

    max_length, max_gen_toks = 10, 4

    def tok_encode(self, text: str) -> list[int]:
        return list(text.encode())

    def _encode_pair(self, prompt: str, answer: str) -> tuple[list[int], list[int]]:
        return list(prompt.encode()), list(answer.encode())


def test_which_prompts_are_cut() -> None:
    def cut(*requests: tuple, backend: str = "hf") -> int:
        rows = [{"filter": name, "arguments": [request]} for name in ("a", "b") for request in requests]
        return count_cut({"task": rows}, Letters(), backend)["task"]

    assert cut(("x" * 6, {}), ("x" * 7, {}), ("ü" * 4, {"max_gen_toks": 3}), ("", {"max_new_tokens": 9})) == 2
    assert cut(("x" * 9, "yy"), ("x" * 9, "yyy")) == 1
    assert cut(("x" * 7, "yy"), ("x" * 8, "yy"), backend="vllm") == 1
    assert cut(("x" * 100,)) == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.usefixtures("starts_processes")
def test_resume_after_a_signal(
    tmp_path: Path,
    exported: Path,
    oracle: Oracle,
    task_dir: Path,
    remit: Remit,
    asked: list[tuple],
    number: signal.Signals,
) -> None:
    """In the middle of a task; what was answered is not asked again, and the result is that of a quiet run."""
    command = ["eval", "--model", exported, "--task-dir", task_dir, "--dtype", "float32", "--tasks", NAMES]
    command += ["--batch-size", 1, "--out"]
    process = command_line(*command, tmp_path / "out", slow=True)
    deadline = time.monotonic() + 900
    kept = 0
    while kept < 5:
        assert (process.poll(), time.monotonic() < deadline) == (None, True)
        time.sleep(0.02)
        for file in tmp_path.glob("out/*/answers-*.db"):
            with contextlib.suppress(sqlite3.OperationalError), contextlib.closing(sqlite3.connect(file)) as database:
                (kept,) = database.execute("SELECT count(*) FROM unnamed").fetchone()
    process.send_signal(number)
    _, error = process.communicate(timeout=60)
    assert not list(tmp_path.glob("out/*/results.json"))
    if number == signal.SIGINT:
        assert process.returncode == 3
        assert error.endswith("\nremit eval: stopped by SIGINT; the same command again goes on\n")
        assert "Traceback" not in error
    (file,) = tmp_path.glob("out/*/answers-*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        (kept,) = database.execute("SELECT count(*) FROM unnamed").fetchone()
    assert 5 <= kept < NUM_REQUESTS
    code, _, error = remit(*command, tmp_path / "out")
    assert (code, len(asked)) == (0, NUM_REQUESTS - kept), error
    check_numbers(tmp_path / "out", oracle)
    assert remit(*command, tmp_path / "quiet")[0] == 0
    for name in NAMES.split(","):
        found, quiet = record(tmp_path / "out", name), record(tmp_path / "quiet", name)
        assert (found.pop("seconds") >= 0, quiet.pop("seconds") >= 0, found == quiet) == (True, True, True)


@pytest.mark.usefixtures("starts_processes")
def test_two_commands_do_not_write_one_folder(tmp_path: Path, exported: Path, task_dir: Path, remit: Remit) -> None:
    command = ["eval", "--model", exported, "--task-dir", task_dir, "--tasks", NAMES, "--out", tmp_path]
    assert remit(*command)[0] == 0
    (folder,) = tmp_path.iterdir()
    (folder / "results.json").unlink()
    with writing(folder):
        code, _, error = remit(*command)
    assert (code, str(os.getpid()) in error) == (1, True)
    assert remit(*command)[0] == 0


@pytest.mark.usefixtures("starts_processes")
def test_a_hub_task_without_network_is_one_line(tmp_path: Path, exported: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    command = [
        sys.executable,
        "-m",
        "pipelines.cli",
        "eval",
        "--model",
        exported,
        "--tasks",
        "gsm8k",
        "--out",
        tmp_path,
    ]
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert line.startswith("remit eval: error: gsm8k: its data set openai/gsm8k cannot be loaded (")
    assert "access to the Hugging Face hub" in line


@pytest.fixture(scope="module")
def harness() -> TaskManager:
    return TaskManager()


def tasks_of(harness: TaskManager, name: str) -> list[dict[str, Any]]:
    found = leaves(harness, name)
    assert found, name
    return found


@pytest.mark.parametrize("suite", SUITES)
def test_suites_are_tasks_of_the_installed_harness(harness: TaskManager, suite: str) -> None:
    assert len(SUITES[suite]) == 10
    for task in SUITES[suite]:
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
            assert (config.get("num_fewshot") == 0) is (task.fixed_shots == 0), task
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
    assert [task.label for task in SUITES["paper-zero-shot"]] == list(shots)
    assert not any(task.shots for task in SUITES["paper-zero-shot"])


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


def test_tasks_that_cannot_be_loaded(tmp_path: Path, harness: TaskManager) -> None:
    with pytest.raises(ValueError, match="no_such_task: no such task in the installed lm-eval"):
        load_task(harness, "no_such_task", False)
    with pytest.raises(ValueError, match=r"ai2_arc: is a tag of several tasks, expected .* arc_challenge"):
        load_task(harness, "ai2_arc", False)
    task = {"task": "no_data", "dataset_path": "json", "dataset_kwargs": {"data_files": "gone.jsonl"}}
    (tmp_path / "no_data.yaml").write_text(yaml.safe_dump(task | {"output_type": "multiple_choice"}))
    own = TaskManager(include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(
        ValueError, match=r"no_data: its files cannot be loaded \(FileNotFoundError: .*correct its YAML"
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
        (("--tasks", "a,a"), "expected each name once"),
        (("--tasks", "../a"), "expected the name of a task"),
        (("--tasks", "a", "--skip", "b"), "--skip is given with --tasks"),
        (("--skip", "gpqa"), "--skip has 'gpqa', expected names out of gsm8k, "),
        (("--limit", 0), "--limit is 0, expected at least 1"),
        (("--batch-size", 0), "--batch-size is 0, expected at least 1"),
        (("--compare", "none.json"), "--compare none.json: no such file"),
        (("--compare", "m"), "--compare has m, which is --model"),
        (("--compare", "a", "a"), "--compare has a, which is there twice"),
        (("--suite", "other"), "other"),
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
    code, _, error = remit("eval", "--model", models["base"], "--chat-template", "--out", tmp_path / "out")
    assert (code, "--chat-template is given and" in error) == (1, True)
    code, _, error = remit("eval", "--model", models["base"], "--max-length", 65, "--out", tmp_path / "out")
    assert (code, "--max-length is 65 and config.json of" in error, "has 64 positions" in error) == (1, True, True)
    assert not (tmp_path / "out").exists()


def results_of(rows: dict[str, list[float]], suite: str | None = None, **changes: object) -> dict[str, Any]:
    """Results as evaluate writes them, from the value of each question."""
    settings: dict[str, Any] = {"limit": None, "seed": 1, "chat_template": False} | changes
    tasks = {}
    for task, numbers in rows.items():
        tasks[task] = {
            "label": task, "task": task, "metric": "acc,none", "value": sum(numbers) / len(numbers), "stderr": 0.1,
            "samples": {task: [[f"{task}{index}", number] for index, number in enumerate(numbers)]},
            "shots": {task: 0}, "task_versions": {task: "1"}, "num_samples": {task: len(numbers)}, "cut_questions": {task: 0},
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
    show_comparison(("ours", "other"), found, 1, console)
    assert "higher, less is better" in console.export_text()
    ours["tasks"]["p"]["value"] = other["tasks"]["p"]["value"] = 0.5
    assert compare("other", other, ours)["mean"] is None  # less is better


def test_other_questions_are_named_in_words() -> None:
    ours, other = results_of({"a": [1, 0]}), results_of({"a": [1, 0]})
    other["tasks"]["a"]["questions"] = "others"
    assert compare("other", other, ours)["tasks"]["a"] == {"not_compared": "the questions or their prompts differ"}


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
    show({"results": {"m": ours}, "others": {"other": other}, "comparisons": [found]}, console)
    assert "backend is vllm and hf: that alone may move the values" in console.export_text()


def test_results_with_one_name_stay_apart(console: Console, tmp_path: Path) -> None:
    """Files beside each other, and the earlier results of the same model."""
    ours, other = results_of({"a": [1, 1]}) | {"folder": "results/run-12"}, results_of({"a": [0, 0]})
    files = ["baselines/one.json", "baselines/two.json", "results/run-12/results.json"]
    comparisons = [compare(name, other, ours) for name in files]
    show({"results": {"run/model": ours}, "others": dict.fromkeys(files, other), "comparisons": comparisons}, console)
    text = console.export_text()
    for title in ("run/model - one", "run/model - two", "run/model - results/run-12/results.json"):
        assert title in text
    assert text.count("1.0000 ± 0.1000") == 1
    assert text.count("0.0000 ± 0.1000") == 3


def test_what_decides_an_answer(tmp_path: Path, models: dict[str, Path]) -> None:
    """Whatever a request does not have must be in the name of the cache; limit, examples and task files need not."""
    shutil.copytree(models["base"], tmp_path / "m")

    def name(**options: Any) -> Path:
        config = EvalConfig("m", tasks="a", **options)
        model = LocalModel(tmp_path / "m", "m", None)
        return cache_file(Subject("m", model, common_settings(config, model), tmp_path))

    names = [name(), name(backend="vllm"), name(dtype="float32"), name(max_length=8), name(batch_size=1), name(seed=1)]
    names.append(name(chat_template=True))
    assert name() == name(limit=3) == name(num_fewshot=2) == name(task_dir=tmp_path) == names[0]
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps(config | {"rope_theta": 7}))
    names.append(name())
    for file in ("tokenizer_config.json", "chat_template.jinja", "generation_config.json", "tokenizer.json"):
        with (tmp_path / "m" / file).open("a") as stream:
            stream.write(" ")
        names.append(name())
    assert len(set(names)) == len(names)


def test_nothing_is_claimed_inside_the_error() -> None:
    assert [claim(d, 0.1) for d in (0.19, 0.2, -0.19, -0.2)] == ["none", "higher", "none", "lower"]
    assert [claim(0.5, None), claim(0.5, 0.0), claim(0.0, 0.1)] == ["none"] * 3
    one = compare("other", results_of({"a": [0.0]}), results_of({"a": [1.0]}))["tasks"]["a"]
    assert (one["stderr"], one["claim"]) == (None, "none")


def test_commands_of_the_documentation_parse(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that need the hub stand in blocks that are not run with the other pages."""
    page = Path(__file__).parents[2] / "docs" / "evaluation.md"
    lines = [line for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("remit eval")]
    assert len(lines) == 6
    monkeypatch.chdir(tmp_path)
    for line in lines:
        words = shlex.split(line)
        for word in words:
            if word.endswith(".json"):
                Path(word).parent.mkdir(parents=True, exist_ok=True)
                Path(word).write_text("{}")
        assert isinstance(parse(words[1:]), EvalConfig)


@pytest.fixture
def console() -> Iterator[Console]:
    with Path(os.devnull).open("w") as file:
        yield Console(file=file, record=True, width=160, highlight=False)


def test_tables_beside_the_papers_rows(console: Console) -> None:
    suite: tuple[SuiteTask, ...] = SUITES["paper"]
    ours = results_of({task.task: [1, 0] for task in suite}, "paper")
    other = results_of({task.task: [1, 1] for task in suite[:4]}, "paper")
    comparisons = [compare("b[red]", other, ours)]
    show({"results": {"a[/b]": ours}, "others": {"b[red]": other}, "comparisons": comparisons}, console)
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
