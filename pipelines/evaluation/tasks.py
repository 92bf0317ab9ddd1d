"""Tasks of lm-evaluation-harness by name, its own and those of a folder, loaded with their data."""

from pathlib import Path
from typing import Any

from lm_eval.tasks import TaskManager


def load_tasks(names: list[str], task_dir: Path | None, allow_code_execution: bool) -> dict[str, list[Any]]:
    """The harness' objects for tasks and groups, by name, with their data; ValueError with the remedy."""
    own = str(task_dir) if task_dir else None
    index = TaskManager(include_path=own, include_defaults=False) if own else None
    if index is None or any(leaves(index, name) is None for name in names):
        index = TaskManager(include_path=own)  # ten seconds: it parses all YAML files of the harness
    return {name: load_task(index, name, allow_code_execution) for name in names}


def leaves(index: TaskManager, name: str) -> list[dict[str, Any]] | None:
    """The configurations of the tasks that `name` stands for, functions unresolved; None where one is not known."""
    entry = index.task_index.get(name)
    if entry is None:
        return None
    if entry.kind.name == "TAG":
        members = sorted(key for key, other in index.task_index.items() if name in other.tags)
        raise ValueError(f"{name}: is a tag of several tasks, expected a task or group, for instance {members[0]}")
    if entry.kind.name != "GROUP":
        return [entry.cfg or {}]
    found = []
    for child in (entry.cfg or {}).get("task", []):
        inside = leaves(index, child if isinstance(child, str) else child.get("task", ""))
        if inside is None:
            return None
        found += inside
    return found


def load_task(index: TaskManager, name: str, allow_code_execution: bool) -> list[Any]:
    """The harness' object for a task or group, its data loaded; ValueError with the remedy."""
    configs = leaves(index, name)
    if configs is None:
        raise ValueError(
            f"{name}: no such task in the installed lm-eval or in --task-dir; `lm-eval ls tasks` lists the former"
        )
    if not allow_code_execution and any(config.get("unsafe_code") for config in configs):
        raise ValueError(
            f"{name}: runs the programs that the model writes, on this machine and without a sandbox; give "
            "--allow-code-execution where that is safe, or leave the task out"
        )
    data = next((config["dataset_path"] for config in configs if config.get("dataset_path")), "its data")
    try:
        objects: Any = index.load([name])
    except ImportError as error:
        raise ValueError(
            f"{name}: needs a package ({error}); in your checkout of remit: pip install '.[eval]'"
        ) from error
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        if data in ("json", "csv", "parquet", "arrow", "text"):
            raise ValueError(f"{name}: its files cannot be loaded ({reason}); correct its YAML file") from error
        raise ValueError(
            f"{name}: its data set {data} cannot be loaded ({reason}); run this once with access to the Hugging Face "
            "hub, which fills its cache (a gated data set like GPQA's also asks to accept its conditions on the hub, "
            f"then `hf auth login`), or leave {name} out with --skip or from --tasks"
        ) from error
    if name not in objects.get("groups", {}):
        return list(objects["tasks"].values())
    group = objects["groups"][name]
    if not group.has_aggregation:
        raise ValueError(
            f"{name}: is a group without aggregate_metric_list, which has no value of its own; name its tasks: "
            f"{', '.join(task.config.task for task in group.get_all_tasks())}"
        )
    return [group]


def tasks_of(loaded: list[Any]) -> list[Any]:
    """Tasks without the groups that hold them."""
    return [task for item in loaded for task in (item.get_all_tasks() if hasattr(item, "get_all_tasks") else [item])]
