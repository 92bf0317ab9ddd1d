"""remit eval: tasks of lm-evaluation-harness, one after the other, each kept as a file once it is finished.

Each model is evaluated in a process of its own: vLLM patches the transformers classes of the process that it is in,
and the switches for code execution must not outlive the command. Here stands what this process does; the other one
is in pipelines/evaluation/worker.py.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any

from pipelines.evaluation.compare import compare
from pipelines.evaluation.files import FORMAT, finished, read_results, set_aside, write_json
from pipelines.evaluation.settings import EvalConfig
from pipelines.evaluation.suites import SUITES, SuiteTask
from pipelines.evaluation.task_folder import task_folder_fingerprint
from pipelines.models import LocalModel, resolve_model
from shards.fingerprint import (
    config_fingerprint,
    parse_tokenizer_json,
    tokenizer_fingerprint,
    weights_fingerprint,
)
from shards.modelfolder import max_positions, read_config, require_language_model

Note = Callable[[str], None]
READ_BESIDE = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)  # prompts, ends
CODE = "; HumanEval and MBPP run programs that the model writes, which needs --allow-code-execution"


@dataclass(frozen=True)
class PlannedTask:
    """A task to evaluate. label: for tables; shots: None leaves them to the task; metric: None takes its first."""

    label: str
    task: str
    shots: int | None
    metric: str | None


def plan_tasks(config: EvalConfig) -> tuple[list[PlannedTask], list[str]]:
    """The tasks to evaluate and, by label, those of the suite that are left out."""
    if config.tasks is not None:
        return [PlannedTask(name, name, config.num_fewshot, None) for name in config.task_names], []
    suite = SUITES[config.suite or "paper"]

    def runs(task: SuiteTask) -> bool:
        return task.task not in config.skipped and (config.allow_code_execution or not task.runs_code)

    chosen = [PlannedTask(task.label, task.task, task.shots, task.metric) for task in suite if runs(task)]
    return chosen, [task.label for task in suite if not runs(task)]


def evaluate(config: EvalConfig, note: Note) -> dict[str, Any]:
    """Evaluate --model and the models of --compare; write and return results and comparisons.

    Raises ValueError for a model, task or earlier result that cannot be used, RuntimeError where the process of a
    model ends before its tasks do.
    """
    for package, extra in (
        ("lm_eval", "eval"),
        *((("vllm", "cpu]' or '.[gpu"),) if config.backend == "vllm" else ()),
    ):
        if find_spec(package) is None:
            raise ValueError(
                f"remit eval needs {package}, which is not installed; in your checkout of remit: pip install '.[{extra}]'"
            )
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
    for _, model in models:
        require_language_model(model.path)
    results = {}
    for name, model in models:
        results[name] = evaluate_model(config, model, name, tasks, left_out, note)
    others = {other: earlier.get(other) or results[other] for other in config.compare}
    comparisons = [compare(other, values, results[config.model]) for other, values in others.items()]
    if comparisons:
        write_json(config.out / "compare.json", comparisons)
    return {"results": results, "others": others, "comparisons": comparisons}


def evaluate_model(
    config: EvalConfig, model: LocalModel, name: str, tasks: list[PlannedTask], left_out: list[str], note: Note
) -> dict[str, Any]:
    """The results of one model, those of finished tasks from their files; also written to results.json."""
    if config.chat_template and not has_chat_template(model.path):
        raise ValueError(f"--chat-template is given and {name} has none; leave it out, or name a post-trained model")
    positions = num_positions(model.path)
    if config.max_length is not None and positions is not None and config.max_length > positions:
        raise ValueError(
            f"--max-length is {config.max_length:,} and config.json of {name} has {positions:,} positions, expected no more: "
            "beyond them a model predicts what it was never trained for"
        )
    note(f"{name}: reading weights for their fingerprint")
    settings = common_settings(config, model)
    # OUT/model is what every run of remit train is called: the folder above tells them apart
    title = model.path.resolve().parent.name if model.name == "model" else model.name.replace("/", "--")
    folder = config.out / f"{title}-{settings['model']['weights'][:8]}"
    folder.mkdir(parents=True, exist_ok=True)
    records: dict[str, dict[str, Any]] = {}
    pending = []
    for task in tasks:
        file = folder / f"{task.task}.json"
        asked = settings | {"num_fewshot": task.shots, "metric": task.metric}
        record, reason = finished(file, asked)
        if record is None and (earlier := set_aside(file, asked)).is_file():
            set_aside(file)
            os.replace(earlier, file)
            record, reason = finished(file, asked)
        if record is None:
            pending.append(task)
            if reason:
                note(f"{task.task}: evaluated before with {reason}; it is evaluated again")
        else:
            records[task.task] = record
    if len(pending) < len(tasks):
        note(f"{name}: {len(tasks) - len(pending)} of {len(tasks)} tasks were evaluated before, in {folder}")
    if pending:

        def keep(task: PlannedTask, found: dict[str, Any]) -> None:
            asked = settings | {"num_fewshot": task.shots, "metric": task.metric}
            records[task.task] = {"format": FORMAT, "label": task.label, "task": task.task, "settings": asked, **found}
            set_aside(folder / f"{task.task}.json")
            write_json(folder / f"{task.task}.json", records[task.task])

        run_worker(config, model, pending, keep, note)
    values = {
        "format": FORMAT,
        "model": {"name": name, "revision": model.revision, **settings["model"]},
        "suite": config.suite or ("paper" if config.tasks is None else None),
        "left_out": left_out,
        "settings": settings,
        "tasks": {task.task: records[task.task] for task in tasks},
    }
    values["average"] = average(values)
    write_json(folder / "results.json", values)
    return values | {"folder": str(folder)}


def average(values: dict[str, Any]) -> dict[str, Any] | None:
    """Mean over a suite's tasks, in shares; whole: of all of them and all their questions. None without a suite."""
    if values["suite"] is None:
        return None
    whole = len(values["tasks"]) == len(SUITES[values["suite"]]) and values["settings"]["limit"] is None
    mean = fmean(record["value"] for record in values["tasks"].values())
    return {"value": mean, "num_tasks": len(values["tasks"]), "whole": whole}


def common_settings(config: EvalConfig, model: LocalModel) -> dict[str, Any]:
    """What a result depends on, beside its task: where one of these differs, it is evaluated again."""
    fingerprints: dict[str, Any] = {
        "weights": weights_fingerprint(model.path),
        "config": config_fingerprint(model.path),
    }
    tokenizer = model.path / "tokenizer.json"
    if tokenizer.exists():
        fingerprints["tokenizer"] = tokenizer_fingerprint(parse_tokenizer_json(tokenizer.read_bytes(), str(tokenizer)))
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


def num_positions(folder: Path) -> int | None:
    """Tokens of the longest sequence of the model in `folder`, None where its config.json says nothing of it."""
    values = read_config(folder)
    return max_positions(values.get("text_config") or values)


def has_chat_template(folder: Path) -> bool:
    """Whether the tokenizer in a model folder has a chat template."""
    file = folder / "tokenizer_config.json"
    inside = file.is_file() and json.loads(file.read_text(encoding="utf-8")).get("chat_template")
    return bool(inside) or (folder / "chat_template.jinja").is_file()


def run_worker(
    config: EvalConfig,
    model: LocalModel,
    tasks: list[PlannedTask],
    keep: Callable[[PlannedTask, dict[str, Any]], None],
    note: Note,
) -> None:
    """Evaluate `tasks` in a process of its own; `keep` gets each result as it comes."""
    from pipelines.evaluation.worker import work

    job = {
        "model": str(model.path),
        "tasks": [asdict(task) for task in tasks],
        "task_dir": str(config.task_dir) if config.task_dir else None,
        **{name: getattr(config, name) for name in ("backend", "dtype", "limit", "batch_size", "max_length", "seed")},
        "chat_template": config.chat_template,
        "allow_code_execution": config.allow_code_execution,
    }
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, theirs), name="remit eval")
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process inherits it: Ctrl-C is for this one alone
    process.start()
    signal.signal(signal.SIGINT, handler)
    theirs.close()
    try:
        left = list(tasks)
        while left:
            try:
                message = ours.recv()
            except EOFError:
                process.join()
                raise RuntimeError(
                    f"the process that evaluates ended with code {process.exitcode}; what it printed says why; the same "
                    "command again goes on with the tasks that are left"
                ) from None
            if "error" in message:
                if config.debug:
                    print(message["traceback"], file=sys.stderr)
                raise ValueError(message["error"])
            if "note" in message:
                note(message["note"])
            else:
                keep(left.pop(0), message["record"])
        process.join(30)
    finally:
        if process.is_alive():
            process.kill()
        process.join()
