"""Tasks of lm-evaluation-harness by name, its own and those of a folder, loaded with their data."""

from pathlib import Path
from typing import Any

from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager

Task = Any  # of the harness: a task, or a group of them


def load_tasks(names: list[str], task_dir: Path | None, allow_code_execution: bool) -> dict[str, Task]:
    """The harness' objects for tasks and groups, by name, with their data; ValueError with the remedy."""
    own = str(task_dir) if task_dir else None
    index = TaskManager(include_path=own, include_defaults=False)
    if not all(leaves(index, name) for name in names):
        index = TaskManager(include_path=own)  # ten seconds: it parses all YAML files of the harness
    return {name: load_task(index, name, allow_code_execution) for name in names}


def leaves(index: TaskManager, name: str) -> list[dict[str, Any]]:
    """The configurations of the tasks that a task or group stands for, functions unresolved; none where one is not known."""
    entry = index.task_index.get(name)
    if entry is None or entry.kind.name == "TAG":
        return []
    if entry.kind.name != "GROUP":
        return [entry.cfg or {}]
    children = [child if isinstance(child, str) else child.get("task", "") for child in (entry.cfg or {})["task"]]
    found = [leaves(index, child) for child in children]
    return [leaf for child in found for leaf in child] if all(found) else []


def load_task(index: TaskManager, name: str, allow_code_execution: bool) -> Task:
    """The harness' object for a task or group, its data loaded; ValueError with the remedy."""
    configs = leaves(index, name)
    if not configs:
        raise ValueError(
            f"{name}: is no task or group of the installed lm-eval or of --task-dir, expected one and not a tag of several; "
            "`lm-eval ls tasks` lists the former"
        )
    if not allow_code_execution and any(config.get("unsafe_code") for config in configs):
        raise ValueError(
            f"{name}: runs the programs that the model writes, on this machine and without a sandbox; give "
            "--allow-code-execution where that is safe, or leave the task out"
        )
    try:
        loaded = index.load([name])
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        data = next((config["dataset_path"] for config in configs if config.get("dataset_path")), "none")
        raise ValueError(
            f"{name}: cannot be loaded with its data set {data} ({reason}); correct the YAML file of a task of your own; else run "
            "this once with access to the Hugging Face hub, which fills its cache (a gated data set like GPQA's also asks to "
            "accept its conditions on the hub, then `hf auth login`), or leave the task out with --skip or from --tasks"
        ) from error
    groups = loaded.get("groups", {})
    if name in groups and not groups[name].has_aggregation:
        raise ValueError(
            f"{name}: is a group without aggregate_metric_list, which has no value; name its tasks instead"
        )
    return groups[name] if name in groups else loaded["tasks"][name]


def answers_are_drawn(loaded: Task) -> bool:
    """Whether answers to one of the tasks are drawn at random."""
    return any(
        normalize_gen_kwargs(task.get_config("generation_kwargs") or {})["do_sample"] for task in tasks_of(loaded)
    )


def refuse_no_room(name: str, loaded: Task, model: Any) -> None:
    """ValueError where answers may be as long as all that `model` takes: nothing of the prompts would be left.

    With transformers the harness says so when the task's turn comes; with vLLM it cuts the wrong end and says nothing.
    """
    for task in tasks_of(loaded):
        if task.get_config("output_type") == "generate_until":
            settings = normalize_gen_kwargs(task.get_config("generation_kwargs") or {}, model.max_gen_toks)
            if (longest := settings["max_gen_toks"]) >= model.max_length:
                raise ValueError(
                    f"{name}: answers may have {longest:,} tokens and the model takes {model.max_length:,} in all, expected "
                    "room for a prompt; leave the task out with --skip or from --tasks"
                )


def tasks_of(loaded: Task) -> list[Task]:
    """The tasks of a group, or the task itself."""
    return loaded.get_all_tasks() if hasattr(loaded, "get_all_tasks") else [loaded]
