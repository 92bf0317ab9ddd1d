"""What the task folder of an evaluation stage depends on."""

import re
from pathlib import Path

import pytest

from pipelines.evaluation.task_folder import task_folder_fingerprint


def test_what_a_task_folder_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tasks = tmp_path / "tasks"
    (tasks / "__pycache__").mkdir(parents=True)
    (tmp_path / "data" / "deep").mkdir(parents=True)
    for name in ("a.jsonl", "b.csv", "deep/c.csv"):
        (tmp_path / "data" / name).write_text(name)
    (tasks / "one.yaml").write_text(
        "task: one\ndataset_kwargs: {data_files: {test: [data/a.jsonl]}}\nx: !function u.f\n"
    )
    (tasks / "_template_yaml").write_text(f"dataset_kwargs: {{data_dir: {tmp_path}/data/deep}}\n")
    (tasks / "two.yaml").write_text("task: two\ninclude: _template_yaml\ndataset_kwargs: {data_files: 'data/*.csv'}\n")
    before = {task_folder_fingerprint(tasks)}
    (tasks / "__pycache__" / "x.pyc").write_text("1")
    (tmp_path / "data" / "unused.txt").write_text("1")
    assert {task_folder_fingerprint(tasks)} == before
    for changed in ("data/a.jsonl", "data/b.csv", "data/deep/c.csv", "data/new.csv", "tasks/utils.py"):
        (tmp_path / changed).write_text("changed")
        assert task_folder_fingerprint(tasks) not in before
        before.add(task_folder_fingerprint(tasks))


def test_two_files_with_one_name_are_refused(tmp_path: Path) -> None:
    """The harness takes the first of them; it skips what Jupyter leaves, and what it reads only as an include."""
    (tmp_path / "one.yaml").write_text("task: one\n")
    (tmp_path / "sub").mkdir()
    (tmp_path / "_one_yaml").write_text("task: one\n")
    (tmp_path / ".ipynb_checkpoints").mkdir()
    (tmp_path / ".ipynb_checkpoints" / "one-checkpoint.yaml").write_text("task: one\n")
    (tmp_path / "all.yaml").write_text("group: all\ntask: [one]\n")
    task_folder_fingerprint(tmp_path)
    again = tmp_path / "sub" / "again.yaml"
    for text, name, first in (("task: one\n", "one", "one"), ("group: all\ntask: [two]\n", "all", "all")):
        again.write_text(text)
        both = re.escape(f"{tmp_path}/{first}.yaml and {again} are both '{name}'")
        with pytest.raises(ValueError, match=f"^--task-dir .*{both}; rename one of them"):
            task_folder_fingerprint(tmp_path)
