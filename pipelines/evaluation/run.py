"""remit eval: tasks of lm-evaluation-harness on a model, one after the other, each kept as a file once it is finished.

One command evaluates one model: vLLM patches the transformers classes of its process, and keeps a GPU's memory until it
ends.
"""

import contextlib
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from pipelines.evaluation.results import FORMAT, averages, finished, group_means, to_record, write_json
from pipelines.evaluation.settings import EvalConfig
from pipelines.evaluation.suites import SuiteTask, harness_has, tasks_of_suites
from pipelines.evaluation.task_folder import task_folder_fingerprint
from pipelines.models import LocalModel, resolve_model
from scorer.installed import installed_vllm
from shards.fingerprint import config_fingerprint, weights_fingerprint
from shards.modelfolder import max_positions, read_config, require_language_model
from shards.output_folder import writing
from shards.part import sha256_file

Note = Callable[[str], None]
# prompts and ends depend on them
READ_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
CODE = "HumanEval and MBPP run programs that the model writes, which needs --allow-code-execution"


def plan_tasks(config: EvalConfig) -> tuple[list[SuiteTask], list[str]]:
    """The tasks to evaluate and, by label, those of the suite that are left out. ValueError where none is left."""
    if config.tasks is not None:
        return [SuiteTask(name, name, config.num_fewshot, None) for name in config.task_names], []
    suite = tasks_of_suites(config.suite_names)
    tasks = [
        task
        for task in suite
        if task.task not in config.skipped and (config.allow_code_execution or not task.runs_code) and harness_has(task)
    ]
    left_out = [task.label for task in suite if task not in tasks]
    if not tasks:
        raise ValueError(
            f"no task is left to evaluate: {', '.join(left_out)} are left out{why_left_out(config)}; give --skip fewer names"
        )
    return tasks, left_out


def why_left_out(config: EvalConfig) -> str:
    """Behind the names of what is left out: the reasons that --skip does not give."""
    suite = [task for task in tasks_of_suites(config.suite_names) if task.task not in config.skipped]
    reasons = [CODE] if not config.allow_code_execution and any(task.runs_code for task in suite) else []
    missing = [task.label for task in suite if not harness_has(task)]
    reasons += [f"the installed lm-eval has no {', '.join(missing)}"] if missing else []
    return "".join(f"; {reason}" for reason in reasons)


def evaluate(config: EvalConfig, note: Note) -> tuple[Path, dict[str, Any]]:
    """Evaluate --model; the folder of the results, and what is in its results.json, which is there from the first task on.

    Raises ValueError for a model or task that cannot be used, RuntimeError where another command writes the same results.
    """
    model, tasks, left_out = chosen(config)
    if left_out:
        note(f"left out: {', '.join(left_out)}{why_left_out(config)}")
    note(f"{config.model}: reading weights for their fingerprint")
    settings = settings_of(config, model)
    # OUT/model is what every run of remit train is called: the folder above tells them apart
    title = model.path.resolve().parent.name if model.name == "model" else model.name.replace("/", "--")
    folder = config.out / f"{title}-{settings['model']['weights'][:8]}"
    values: dict[str, Any] = {
        "format": FORMAT,
        "model": {"name": config.model, "revision": model.revision, **settings["model"]},
        "suite": ",".join(config.suite_names) or None,
        "left_out": left_out,
        "settings": settings,
        "asked": [{"task": task.task, "num_fewshot": task.shots, "metric": task.metric} for task in tasks],
        "tasks": {},
    }
    with writing(folder, note) as lease, code_execution(config.allow_code_execution):
        if (before := finished(folder / "results.json", values)) is not None:
            note(f"{config.model}: was evaluated before, in {folder}")
            return folder, before
        for record in evaluated(config, model.path, tasks, answers_file(folder, settings), note):
            values["tasks"][record["task"]] = record
            values |= {"averages": averages(values), "groups": group_means(values)}
            lease.check()
            write_json(folder / "results.json", values)
    return folder, values


def chosen(config: EvalConfig) -> tuple[LocalModel, list[SuiteTask], list[str]]:
    """The model, its tasks and, by label, those that are left out. ValueError for a model or options that cannot be used."""
    require_packages(config)
    if config.task_dir is not None and not config.task_dir.is_dir():
        raise ValueError(f"--task-dir {config.task_dir}: no such folder, expected one with the YAML files of tasks")
    tasks, left_out = plan_tasks(config)
    model = resolve_model("--model", config.model)
    require_usable(config, model.path)
    return model, tasks, left_out


def require_ready(config: EvalConfig) -> None:
    """ValueError for what `evaluate` would refuse before it loads the model: tasks, their data, libraries, settings."""
    from pipelines.evaluation import harness
    from pipelines.evaluation.tasks import load_tasks

    model, tasks, _ = chosen(config)
    harness.prepare_process(config, model.path)
    with contextlib.redirect_stdout(sys.stderr):
        load_tasks([task.task for task in tasks], config.task_dir, config.allow_code_execution)


@contextlib.contextmanager
def code_execution(allowed: bool) -> Iterator[None]:
    """The evaluate library's switch for programs of a model, for the block alone; left in a shell it is no consent."""
    before = os.environ.pop("HF_ALLOW_CODE_EVAL", None)
    if allowed:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_ALLOW_CODE_EVAL", None)
        if before is not None:
            os.environ["HF_ALLOW_CODE_EVAL"] = before


def require_packages(config: EvalConfig) -> None:
    needed = {"lm_eval": "eval"} | ({"vllm": "cpu]' or '.[gpu"} if config.backend == "vllm" else {})
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise ValueError(
                f"remit eval needs {package}, which is not installed; in your checkout of remit: pip install '.[{extra}]'"
            )


def require_usable(config: EvalConfig, folder: Path) -> None:
    """ValueError for a model that cannot be evaluated with these settings."""
    require_language_model(folder)
    if config.chat_template and not has_chat_template(folder):
        raise ValueError(
            f"--chat-template is given and {config.model} has none; leave it out, or name a post-trained model"
        )
    values = read_config(folder)
    positions = max_positions(values.get("text_config") or values)
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(
            f"--max-length is {config.max_length:,} and config.json of {config.model} has {positions:,} positions, expected no "
            "more: beyond them a model predicts what it was never trained for"
        )


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a model folder has a chat template."""
    file = folder / "tokenizer_config.json"
    inside = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return bool(inside) or (folder / "chat_template.jinja").is_file()


def settings_of(config: EvalConfig, model: LocalModel) -> dict[str, Any]:
    """What all results of a model depend on, beside the task."""
    files = {name: model.path / name for name in READ_BESIDE if (model.path / name).is_file()}
    versions = {package: version(package) for package in ("lm_eval", "transformers", "torch", "datasets")}
    if config.backend == "vllm":
        versions["vllm"] = (installed_vllm() or ("", "unknown"))[1]
    return {
        "model": {
            "weights": weights_fingerprint(model.path),
            "config": config_fingerprint(model.path),
            "files": {name: sha256_file(file) for name, file in files.items()},
        },
        "backend": config.backend,
        "dtype": config.dtype,
        "limit": config.limit,
        "batch_size": config.batch_size if config.backend == "hf" else None,
        "max_length": config.max_length,
        "chat_template": config.chat_template,
        "seed": config.seed,
        "task_files": task_folder_fingerprint(config.task_dir) if config.task_dir else None,
        "versions": versions,
    }


def answers_file(folder: Path, settings: dict[str, Any]) -> Path:
    """File of the model's answers, without the harness' ending; its name stands for all that its keys, the requests, lack.

    A request has the examples, the text with its chat template, and what the answer may be like; which questions are asked
    changes no answer.
    """
    text = json.dumps(settings | {"limit": None, "task_files": None, "format": FORMAT}, sort_keys=True)
    return folder / f"answers-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def evaluated(
    config: EvalConfig, model_folder: Path, tasks: list[SuiteTask], answers: Path, note: Note
) -> Iterator[dict[str, Any]]:
    """Each task's record. The data of all, then the model are loaded first: what is missing shows before hours pass."""
    from pipelines.evaluation import harness
    from pipelines.evaluation.tasks import load_tasks, refuse_no_room

    harness.prepare_process(config, model_folder)
    names = [task.task for task in tasks]
    note(f"loading the data of {', '.join(names)}")
    with contextlib.redirect_stdout(sys.stderr):
        loaded = load_tasks(names, config.task_dir, config.allow_code_execution)
        model = harness.load_model(config, model_folder)
        for name in names:
            refuse_no_room(name, loaded[name], model)
        for number, task in enumerate(tasks, 1):
            shots = "its own shots" if task.shots is None else f"{task.shots}-shot"
            note(f"{task.task} ({number} of {len(names)}), {shots}")
            began = time.monotonic()
            results = harness.run_task(config, model, task, loaded[task.task], answers)
            yield to_record(task, results, config.chat_template) | {"seconds": round(time.monotonic() - began, 1)}
