"""remit eval: the harness' numbers against transformers in float64, kept answers, resuming."""

import contextlib
import json
import math
import os
import pickle
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
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
from lm_eval.models.utils import maybe_truncate
from lm_eval.tasks import TaskManager
from own_tasks import NEW_TOKENS, QUESTIONS, Oracle, write_tasks
from test_tokenizer import BOS, byte_level, save

from pipelines.evaluation import harness
from pipelines.evaluation.run import answers_file, settings_of
from pipelines.evaluation.settings import EvalConfig
from pipelines.evaluation.suites import SUITES, SuiteTask
from pipelines.models import LocalModel
from shards.output_folder import writing

Remit = Callable[..., tuple[int, str, str]]


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


@pytest.fixture(scope="module")
def oracle(exported: Path) -> Oracle:
    return Oracle(exported)


@pytest.fixture(scope="module")
def task_dir(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), oracle)


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
    assert "Choice" in first
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
    model = harness.load_model(EvalConfig(str(folder), dtype="float32"), folder)
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
def test_compare_with_results(
    tmp_path: Path, exported: Path, other: Path, oracle: Oracle, task_dir: Path, remit: Remit
) -> None:
    command = ["eval", "--task-dir", task_dir, "--out", tmp_path, "--tasks", "own_choice,own_loglikelihood"]
    assert remit(*command, "--model", other)[0] == 0
    (file,) = tmp_path.glob("other-*/results.json")
    code, output, error = remit(*command, "--model", exported, "--compare", file)
    assert code == 0, error
    (folder,) = tmp_path.glob("trained-*")
    assert f"{folder.name} - {file.parent.name}" in output
    differences = [a - b for a, b in zip(oracle.right_choices(), Oracle(other).right_choices(), strict=True)]
    mean = sum(differences) / len(differences)
    stderr = math.sqrt(sum((d - mean) ** 2 for d in differences) / (len(differences) - 1) / len(differences))
    (comparison,) = json.loads((tmp_path / "compare.json").read_text())
    found = comparison["tasks"]["own_choice"]
    assert (found["paired"], found["num_questions"]) == (True, len(QUESTIONS))
    assert (found["difference"], found["stderr"]) == (pytest.approx(mean), pytest.approx(stderr))
    # a perplexity is no mean over the questions, so that the pairs say nothing about its error
    both = [json.loads(file.read_text())["tasks"] for file in tmp_path.glob("*/results.json")]
    records = [tasks["own_loglikelihood"] for tasks in both]
    unpaired = comparison["tasks"]["own_loglikelihood"]
    assert not unpaired["paired"]
    assert unpaired["stderr"] == pytest.approx(math.hypot(*(entry["stderr"] for entry in records)))


@pytest.mark.usefixtures("starts_processes")
def test_groups_and_filters(tmp_path: Path, exported: Path, oracle: Oracle, task_dir: Path, remit: Remit) -> None:
    command = ["eval", "--model", exported, "--task-dir", task_dir, "--out", tmp_path, "--dtype", "float32"]
    code, _, error = remit(*command, "--tasks", "own_filtered,own_group")
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
    assert group["num_samples"] == {"own_choice": 7, "own_few": 3}


@pytest.mark.usefixtures("starts_processes")
def test_what_does_not_fit(
    tmp_path: Path, exported: Path, oracle: Oracle, task_dir: Path, remit: Remit, asked: list[tuple]
) -> None:
    """A warning for prompts that are cut, once for each task and not for each prompt; nothing is asked where nothing could be
    left of them."""
    command = ["eval", "--model", exported, "--task-dir", task_dir, "--out", tmp_path, "--dtype", "float32"]
    names = [
        "--tasks",
        "own_few,own_choice,own_text",
    ]  # the first has some of the second's questions, which are not asked again
    cut = "Combined length of context"
    warnings = (f"own_few: {cut}", f"own_choice: {cut}", "own_text: Left truncation applied", cut)
    code, _, error = remit(*command, *names)
    assert (code, [error.count(warning) for warning in warnings]) == (0, [0, 0, 0, 0]), error
    lengths = [len(oracle.tokenizer(f" {choice}").input_ids) for _, choices, _ in QUESTIONS for choice in choices]
    code, _, error = remit(*command, *names, "--num-fewshot", 1, "--max-length", max(lengths))
    assert (code, [error.count(warning) for warning in warnings]) == (0, [1, 1, 1, 2]), error
    asked.clear()
    code, _, error = remit(*command, "--tasks", "own_choice,own_text", "--max-length", NEW_TOKENS)
    line = f"own_text: answers may have {NEW_TOKENS} tokens and the model takes {NEW_TOKENS} in all"
    assert (code, line in error, asked) == (1, True, []), error
    code, _, error = remit(*command, "--tasks", "own_choice", "--max-length", max(lengths) - 1)
    line = "own_choice: AssertionError: assert len(continuation_enc) <= self.max_length"
    assert (code, line in error) == (1, True), error


def test_what_vllm_cuts_is_said(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """The function that its wrapper in the harness cuts prompts with, once for each task."""
    harness.prepare_process(EvalConfig("m"), tmp_path)
    for task in ("first", "second"):
        harness.show_warnings(task)
        for _ in range(2):
            assert maybe_truncate(list(range(9)), max_gen_toks=3, max_model_len=8) == ([4, 5, 6, 7, 8], 3)
    error = capsys.readouterr().err
    assert [error.count(f"{task}: Context length (9)") for task in ("first", "second")] == [1, 1], error
    assert error.count("Context length") == 2


def test_a_model_that_transformers_cannot_load_is_one_line(tmp_path: Path) -> None:
    folder = save(byte_level(bos=True), make_model(tmp_path, "Llama"))
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"hidden_act": "none_such"}))
    with pytest.raises(ValueError, match=r"^hf or the harness failed, KeyError: .*none_such.*; --debug shows where"):
        harness.load_model(EvalConfig(str(folder)), folder)


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
    environment = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}
    process = command_line("eval", "--model", exported, "--tasks", "gsm8k", "--out", tmp_path, **environment)
    _, error = process.communicate()
    assert (process.returncode, "Traceback" in error) == (1, False)
    (line,) = [line for line in error.splitlines() if "error" in line]
    assert line.startswith("remit eval: error: gsm8k: cannot be loaded with its data set openai/gsm8k (")
    assert "access to the Hugging Face hub" in line


def test_what_decides_an_answer(tmp_path: Path, models: dict[str, Path]) -> None:
    """Whatever a request does not have must be in the name of the cache; limit, examples and task files need not."""
    shutil.copytree(models["base"], tmp_path / "m")

    def name(**options: Any) -> Path:
        config = EvalConfig("m", tasks="a", **options)
        model = LocalModel(tmp_path / "m", "m", None)
        return answers_file(tmp_path, settings_of(config, model))

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
