"""remit train --eval-tasks: what is evaluated, in which order, what becomes of exports, kills, failures; the scores themselves."""

import json
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from annotated import run as train_run
from own_tasks import Oracle, write_tasks
from processes import Command, until

from pipelines.beside import beside as module
from pipelines.beside import scores
from pipelines.beside.beside import MAX_WAITING, Beside
from pipelines.beside.process import environment, free_gpu, last_words
from pipelines.beside.setup import read_options
from trainer.config import TrainConfig
from trainer.export import Rounding
from trainer.exported import FOR_TASKS, Exported
from trainer.layout import Layout
from trainer.loggers import WandbScores

Remit = Callable[..., tuple[int, str, str]]


def test_options_that_do_not_go_together(tmp_path: Path) -> None:
    given: Any = {"shards": ("s",), "model": "m", "out": tmp_path / "out"}
    for wrong, words in (
        ({"eval_tasks_every": 5}, "--eval-tasks-every is given without --eval-tasks"),
        ({"eval_device": "cpu"}, "--eval-device is given without --eval-tasks"),
        ({"eval_tasks": "paper", "eval_tasks_every": -1}, "--eval-tasks-every is -1, expected 0 or more"),
        ({"eval_tasks": "paper", "eval_device": "gpu"}, "--eval-device is 'gpu', expected auto, cpu, cuda or cuda:N"),
        ({"eval_tasks": "paper", "eval_device": "cuda:1", "ray_workers": 2}, "Ray chooses the GPU"),
    ):
        with pytest.raises(ValueError, match=words):
            TrainConfig(**given, **wrong)


def test_suites_tasks_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own").mkdir()
    Path("eval.yaml").write_text("{tasks: a_task, task_dir: own, limit: 3, chat_template: false}")
    options, settings = read_options("eval.yaml", "m")
    assert (settings.task_names, settings.limit) == (["a_task"], 3)
    assert options[-2:] == ["--task-dir", f"{tmp_path}/own"]  # wherever it is evaluated
    assert read_options("paper,recall", "m") == (["--suite", "paper,recall"], read_options("paper,recall", "m")[1])
    assert read_options("arc_easy", "m")[1].task_names == ["arc_easy"]
    Path("model.yaml").write_text("{tasks: a_task, model: x}")
    for wrong, words in (
        ("paper,arc_easy", "expected suites .paper, paper-posttrained, recall., or tasks of the harness, not both"),
        (" , ", "expected suites"),
        ("none.yaml", "none.yaml: cannot be read"),
        ("model.yaml", "has model, which the run decides"),
    ):
        with pytest.raises(ValueError, match=words):
            read_options(wrong, "m")
    with pytest.raises(SystemExit):
        read_options("paper,paper-posttrained", "m")


def test_a_gpu_that_does_not_train() -> None:
    for asked, devices, trained, visible, gpu in (
        ("auto", 0, 0, None, ""), ("auto", 8, 8, None, ""), ("auto", 8, 7, None, "7"), ("auto", 2, 1, "4,6", "6"),
        ("cpu", 8, 1, None, ""), ("cuda", 8, 7, None, "7"), ("cuda:0", 8, 8, None, "0"), ("cuda:1", 2, 2, "GPU-a, GPU-b", "GPU-b"),
    ):  # fmt: skip
        assert free_gpu(asked, devices, trained, visible) == gpu, (asked, devices, trained, visible)
    for asked, devices, trained in (("cuda", 0, 0), ("cuda", 8, 8), ("cuda:8", 8, 1)):
        with pytest.raises(ValueError, match="--eval-device is cuda"):
            free_gpu(asked, devices, trained, None)


def test_the_environment_of_an_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "8"), ("TORCHELASTIC_RUN_ID", "x"), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)  # accelerate would wait for the other seven
    own = environment("")
    assert not {"RANK", "WORLD_SIZE", "TORCHELASTIC_RUN_ID", "OMP_NUM_THREADS"} & {*own}
    assert own["CUDA_VISIBLE_DEVICES"] == ""


def record(
    value: float, stderr: float | None, label: str, parts: list[str] | None = None, **more: Any
) -> dict[str, Any]:
    samples = {part: [] for part in parts or [label]}
    return {
        "label": label, "metric": "acc,none", "value": value, "stderr": stderr, "higher_is_better": True, "shots": {label: 0},
        "questions": "q", "samples": samples,
    } | more  # fmt: skip


def results(**records: dict[str, Any]) -> dict[str, Any]:
    settings = dict.fromkeys(scores.SETTINGS) | {"model": {"weights": "w"}}
    return {"suite": None, "tasks": records, "groups": {}, "left_out": [], "settings": settings}


def test_means_by_hand() -> None:
    line = scores.line_of(results(a=record(0.25, 0.03, "a"), b=record(0.75, 0.04, "b")), Path("x/m-1"))
    assert line["mean"] == {"value": 0.5, "stderr": pytest.approx(0.025)}  # 3, 4, 5
    assert scores.in_words(line) == "mean 50.00 ± 2.50 %, a 25.00 ± 3.00 %, b 75.00 ± 4.00 %"
    line = scores.line_of(results(a=record(0.25, 0.03, "a"), b=record(0.75, None, "b")), Path("x/m-1"))
    assert line["mean"] == {"value": 0.5, "stderr": None}
    line = scores.line_of(results(a=record(0.5, 0.1, "a"), g=record(0.5, 0.1, "g", ["a", "c"])), Path("x/m-1"))
    assert line["mean"]["stderr"] is None  # the questions of a count twice
    line = scores.line_of(
        results(a=record(0.5, 0.1, "a"), p=record(7.5, None, "p", higher_is_better=False)), Path("x/m")
    )
    assert line["mean"] is None
    assert scores.in_words(line) == "a 50.00 ± 10.00 %, p 7.5000"


class Fake:
    """An evaluation without a process: ends with `code` once it is let, with a value that its export holds."""

    def __init__(self, words: list[str], log: Path, code: int, may_end: threading.Event) -> None:
        self.result, self.folder, self.code, self.may_end = Path(words[0]), Path(words[-3]), code, may_end
        self.log, self.ended = log, False

    def wait(self, seconds: float) -> int | None:
        if not self.may_end.wait(0.02):
            return None
        if self.code:
            self.log.write_text("remit eval: error: no luck; try again\n")
        else:
            value = float((self.folder / "weights").read_text())
            line = scores.line_of(results(a=record(value, 0.1, "a")), Path(self.log.parent, self.folder.name))
            self.result.write_text(json.dumps(line))
        return self.code

    def end(self) -> None:
        self.ended = True


def empty_layout(folder: Path) -> Layout:
    """Of a base without weights, about which exported.json has nothing to say."""
    none: frozenset[str] = frozenset()
    return Layout(folder, {}, (), {}, (), (), none, none, {}, False, False)


class Project:
    """The folder of a run as a training leaves it, and its evaluations."""

    def __init__(self, folder: Path, every: int = 10, steps: int = 40) -> None:
        self.out, base = folder / "out", folder / "base"
        base.mkdir()
        (base / "weights").write_text("0")
        (base / "tokenizer.json").write_text("{}")
        self.config = TrainConfig(("s",), str(base), self.out, eval_tasks="a", eval_tasks_every=every)
        self.launched: list[Fake] = []
        self.codes: dict[str, int] = {}
        self.notes: list[str] = []
        self.may_end = threading.Event()

    def begin(self) -> None:
        """As resume() does once it has deleted what is made again."""
        self.out.mkdir(exist_ok=True)
        (self.out / "run.json").write_text("{}")
        Exported(self.out).begin(empty_layout(self.out))

    def export(self, step: int, name: str = "", kept: bool = False) -> Path:
        name = name or f"exports/step-{step:06d}"
        more = {} if kept or name == "model" else {FOR_TASKS: True}
        (self.out / "whole").mkdir()
        (self.out / "whole" / "weights").write_text(str(step / 100))
        (self.out / "exports").mkdir(exist_ok=True)
        Exported(self.out).add(name, step, "base", Rounding(), more)
        return (self.out / "whole").rename(self.out / name)

    def launch(self, words: list[str], log: Path) -> Fake:
        self.launched.append(Fake(words, log, self.codes.get(Path(words[-3]).name, 0), self.may_end))
        return self.launched[-1]

    def beside(self) -> Beside:
        own = Beside(self.config, [], self.notes.append)
        own.start(self.launch)
        return own

    def table(self) -> dict[int, Any]:
        return {
            line["step"]: line.get("skipped", line.get("mean") and line["mean"]["value"])
            for line in scores.read_scores(self.out)
        }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.01)
    return Project(tmp_path)


def never() -> bool:
    return False


def test_order_deletion_and_what_is_kept(project: Project) -> None:
    own = project.beside()
    project.begin()
    exports = [project.export(10), project.export(20, kept=True), project.export(25, kept=True)]
    until(lambda: project.launched)
    assert project.launched[0].folder == Path(project.config.model)
    project.may_end.set()
    until(lambda: 20 in project.table())
    project.export(40, "model")
    assert own.finish(never)
    assert own.finish(never)
    own.close()
    assert project.table() == {
        0: 0.0,
        10: 0.1,
        20: 0.2,
        40: 0.4,
    }  # not 25: a kept export that --eval-tasks-every does not name
    assert [path.exists() for path in exports] == [False, True, True]
    assert [running.folder.name for running in project.launched] == ["base", "step-000010", "step-000020", "model"]
    assert list((project.out / "exports").glob(".*")) == []
    assert own.summary() == "task scores after 40 steps: a 40.00 ± 10.00 %; mean of the base 0.00 %"
    assert list((project.out / "tasks").iterdir()) == []  # no log of what went well
    again = project.beside()  # of the finished run: nothing is evaluated twice
    assert again.finish(never)
    assert len(project.launched) == 4


def test_exports_that_a_resume_deletes_are_not_taken(project: Project) -> None:
    """Before the training has gone to its checkpoint, and while it is evaluated."""
    project.begin()
    stale = project.export(10)
    own = project.beside()
    time.sleep(0.1)
    assert project.launched == []
    shutil.rmtree(stale)
    project.begin()
    project.export(10)
    until(lambda: project.launched)
    project.codes["step-000020"] = 1
    project.export(20)
    project.may_end.set()
    until(lambda: 10 in project.table())
    assert own.finish(never)
    own.close()


def test_a_run_made_longer_is_not_evaluated_before_it_is_cut(project: Project) -> None:
    """Its model gets another name in exported.json before the training has gone to its checkpoint."""
    project.may_end.set()
    project.begin()
    project.export(40, "model")
    own = project.beside()
    (project.out / "exports").mkdir(exist_ok=True)
    (project.out / "model").rename(project.out / "exports/step-000040")
    Exported(project.out).rename({"model": "exports/step-000040"})
    Exported(project.out).add("exports/step-000020", 20, "base", Rounding(), {})
    time.sleep(0.1)
    assert (project.launched, own.waiting()) == (
        [],
        {0: Path(project.config.model), 40: project.out / "exports/step-000040"},
    )
    project.begin()
    assert own.finish(never)
    assert project.table() == {0: 0.0, 40: 0.4}
    models = Exported(project.out).read()["models"]
    assert {name: entry["step"] for name, entry in models.items()} == {"exports/step-000040": 40}


def test_a_moved_model_keeps_its_entry(tmp_path: Path) -> None:
    """An export for the tasks of the same step is not there any more, wherever its entry stands."""
    exported = Exported(tmp_path)
    exported.add("model", 40, "base", Rounding())
    exported.add("exports/step-000040", 40, "base", Rounding(), {FOR_TASKS: True})
    exported.rename({"model": "exports/step-000040", "model-average": "exports/step-000040-average"})
    ((name, entry),) = exported.read()["models"].items()
    assert (name, FOR_TASKS in entry) == ("exports/step-000040", False)


@pytest.mark.parametrize("finished", [False, True])
def test_what_a_kill_leaves_after_a_line_is_deleted(project: Project, finished: bool) -> None:
    """Between the line in the table and the deletion, and within the deletion; nothing else is touched."""
    project.begin()
    left = [project.export(10), project.export(20)]
    kept = [project.export(25, kept=True), project.export(30, kept=True)]
    project.export(40, "model")
    answers = project.out / "tasks/m-10/answers-a.jsonl"
    answers.parent.mkdir(parents=True)
    for file in (answers, answers.with_name("results.json")):
        file.write_text("{}")
    half = [project.out / f"exports/.step-0000{step}.77-abcd.tmp" for step in (10, 25, 30, 50)]
    for folder in half:
        folder.mkdir()
    for step in (0, 20, 30, 40):
        scores.add(project.out, {"step": step, "skipped": "x"})
    scores.add(project.out, {"step": 10, "results": "tasks/m-10/results.json", "skipped": "x"})
    own = project.beside()
    if not finished:
        project.begin()
    assert own.finish(never)
    assert project.launched == []
    assert [path.exists() for path in left] == [False, False]
    assert [path.exists() for path in (*kept, project.out / "model")] == [True] * 3
    # those of 25 and 50 have no line: the training may be writing them
    assert [path.exists() for path in half] == [False, True, False, True]
    assert [path.name for path in answers.parent.iterdir()] == ["results.json"]


def test_an_error_after_a_line_was_written(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """TensorBoard that cannot be written, and a deletion that fails once: the export goes all the same, no score is lost."""
    deletes, failures = Beside._delete, [OSError(116, "Stale file handle")]

    def delete(own: Beside, folder: Path, line: dict[str, Any]) -> None:
        if failures:
            raise failures.pop()
        deletes(own, folder, line)

    def show(own: Beside, line: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Beside, "_delete", delete)
    monkeypatch.setattr(Beside, "_show", show)
    project.may_end.set()
    own = project.beside()
    project.begin()
    exports = [project.export(10), project.export(20)]
    until(lambda: 20 in project.table())
    assert own.finish(never)
    assert project.table() == {0: 0.0, 10: 0.1, 20: 0.2}
    assert [path.exists() for path in exports] == [False, False]


def test_a_stop_ends_what_runs_and_the_next_command_goes_on(project: Project) -> None:
    own = project.beside()
    project.begin()
    until(lambda: project.launched)
    export = project.export(10)
    assert not own.finish(lambda: True)
    assert not own.finish(never)
    assert project.launched[0].ended
    assert (project.table(), export.exists()) == ({}, True)
    project.may_end.set()
    again = project.beside()
    project.begin()
    assert again.finish(never)
    assert project.table() == {0: 0.0, 10: 0.1}


def test_a_failure_is_a_line_and_tried_again(project: Project) -> None:
    project.codes["step-000010"] = 1
    project.may_end.set()
    own = project.beside()
    project.begin()
    export = project.export(10)
    project.export(20)
    until(lambda: 20 in project.table())
    assert own.finish(never)
    assert (project.table(), export.exists()) == ({0: 0.0, 20: 0.2}, True)
    assert any("no task scores of step 10: no luck; try again (log: " in line for line in project.notes), project.notes
    assert "no task scores of step 10; the same command again tries once more" in project.notes
    project.codes.clear()
    again = project.beside()
    project.begin()
    assert again.finish(never)
    assert list(project.table()) == [0, 10, 20]  # in its place
    assert not export.exists()


def test_no_more_exports_than_a_disk_takes(project: Project) -> None:
    """Evaluations that are slower than the training: the oldest is passed over, never a kept one, and it is said."""
    own = project.beside()
    project.begin()
    until(lambda: project.launched)
    kept = project.export(10, kept=True)
    exports = [project.export(step) for step in range(20, 20 + 10 * (MAX_WAITING + 1), 10)]
    until(lambda: not exports[0].exists())
    assert all(path.exists() for path in [kept, *exports[1:]])
    assert project.table() == {20: "3 later ones waited already"}
    assert any("no task scores of step 20, whose export is deleted" in line for line in project.notes)
    project.may_end.set()
    assert own.finish(never)
    assert [step for step, value in project.table().items() if isinstance(value, float)] == [0, 10, 30, 40, 50]


def test_a_run_that_was_taken_over(project: Project) -> None:
    own = project.beside()
    project.begin()
    until(lambda: project.launched)
    (project.out / "_lease").mkdir()
    lease = {"pid": 1, "process_start": "1", "token": "another", "beats": 0}
    (project.out / "_lease" / "00000007.json").write_text(json.dumps(lease))
    project.may_end.set()
    assert own.finish(never)
    assert project.table() == {}
    assert any("another training has taken this folder over" in line for line in project.notes)


def test_a_filesystem_that_stumbles(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that passes costs no evaluation, one that stays ends them with a line, and neither ends the training."""
    broken = [True]
    looks = Beside.waiting

    def waiting(own: Beside) -> dict[int, Path]:
        if broken[0] and threading.current_thread() is not threading.main_thread():
            raise OSError(116, "Stale file handle")
        return looks(own)

    monkeypatch.setattr(Beside, "waiting", waiting)
    project.may_end.set()
    own = project.beside()
    project.begin()
    until(lambda: project.notes)
    assert "Stale file handle" in project.notes[0]
    broken[0] = False
    assert own.finish(never)
    assert project.table() == {0: 0.0}
    project.export(10)
    broken[0] = True
    again = project.beside()
    project.begin()
    assert again.finish(never)
    assert "no more of them now" in project.notes[-1]


def test_last_words(tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert last_words(log, 1) == "exit code 1"
    log.write_text("a\nremit eval: error: gsm8k: cannot be loaded; run this once\n")
    assert last_words(log, 1) == "gsm8k: cannot be loaded; run this once"
    log.write_bytes(b"Traceback\n\xff\nMemoryError\n\n")
    assert last_words(log, 1) == "Traceback\n\ufffd\nMemoryError".splitlines()[-1]
    assert "killed by signal 9" in last_words(log, -9)


def test_what_weights_and_biases_has(tmp_path: Path) -> None:
    unsent = WandbScores(tmp_path, "p")
    assert unsent.oldest_unsent() is None
    for step, value in ((0, 0.25), (10, 0.5)):
        line = scores.line_of(results(a=record(value, 0.1, "a"), b=record(value, 0.1, "b")), Path("x"))
        scores.add(tmp_path, {"step": step, **line})
    scores.add(tmp_path, {"step": 5, "skipped": "why"})
    first = unsent.oldest_unsent()
    assert first == {"mean": 0.25, "a": 0.25, "b": 0.25, "step": 0}
    unsent.mark_sent(first)
    again = WandbScores(tmp_path, "p").oldest_unsent()
    assert again == unsent.oldest_unsent() == {"mean": 0.5, "a": 0.5, "b": 0.5, "step": 10}
    unsent.mark_sent(again)
    assert WandbScores(tmp_path, "p").oldest_unsent() is None
    assert WandbScores(tmp_path, "another").oldest_unsent() == first


def test_exports_of_the_trainer(tmp_path: Path, annotated: dict[str, Path], reference_model: Path) -> None:
    """Marked where nothing else keeps them; a resume cuts the table where the weights are made again."""
    settings: dict[str, Any] = {"eval_tasks": "a", "eval_tasks_every": 2, "export_every": 4, "checkpoint_every": 3}
    config = TrainConfig(
        (str(annotated["packed"]),), str(reference_model), tmp_path / "out", max_steps=7, global_batch_size=4, dtype="float32",
        **settings,
    )  # fmt: skip
    from trainer.train import train

    def kill(done: int, total: int, metrics: dict) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, kill)
    for step in (0, 2, 4):
        scores.add(tmp_path / "out", {"step": step, "skipped": "x"})
    train(config)
    models = json.loads((tmp_path / "out/exported.json").read_text())["models"]
    marked = {name: entry.get("for_tasks", False) for name, entry in models.items()}
    exports = {f"exports/step-{step:06d}": step != 4 for step in (2, 4, 6)}
    assert marked == exports | {"model": False}
    assert [line["step"] for line in scores.read_scores(tmp_path / "out")] == [0, 2]
    assert not {"eval_tasks", "eval_tasks_every", "eval_device"} & {
        *json.loads((tmp_path / "out/run.json").read_text())
    }
    train_run(
        tmp_path / "plain", annotated["packed"], reference_model, max_steps=7, global_batch_size=4, micro_batch_size=1
    )
    for name in ("out", "plain"):
        assert (tmp_path / name / "model/model.safetensors").exists()
    ours, plain = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("out", "plain"))
    assert ours == plain  # evaluating changes no training


@pytest.fixture(scope="module")
def eval_file(tmp_path_factory: pytest.TempPathFactory, reference_model: Path) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    tasks = write_tasks(folder, Oracle(reference_model))
    file = tmp_path_factory.mktemp("options") / "eval.yaml"
    file.write_text(yaml.safe_dump({"tasks": "own_choice,own_text", "task_dir": str(tasks), "dtype": "float32"}))
    return file


def values_of(out: Path, line: dict[str, Any], task: str) -> list[float]:
    """Each question's value, in the results that a line names."""
    (rows,) = json.loads((out / line["results"]).read_text())["tasks"][task]["samples"].values()
    return [value for _, value in rows]


@pytest.mark.usefixtures("starts_processes")
def test_a_killed_run_has_the_scores_of_remit_eval(
    tmp_path: Path, annotated: dict[str, Path], reference_model: Path, eval_file: Path, remit: Remit
) -> None:
    """kill -9 while models wait; then the same command. Against transformers in float64, and remit eval of the last model."""
    out = tmp_path / "out"
    words = [
        "train", "--shards", annotated["packed"], "--model", reference_model, "--out", out, "--dtype", "float32", "--max-steps", 3,
        "--global-batch-size", 4, "--learning-rate", 0.003, "--eval-tasks", eval_file, "--eval-tasks-every", 2,
    ]  # fmt: skip
    command = Command(tmp_path, *words, private=True)
    command.until(lambda: (out / "tasks.jsonl").exists() and (out / "model").exists())
    command.until(lambda: list((out / "tasks").glob("step-*.log")))  # another one has begun
    began = list((out / "tasks").glob("step-*.log"))
    command.signal(signal.SIGKILL)
    command.finish()
    before = scores.read_scores(out)
    assert before[0]["step"] == 0
    first_results = (out / before[0]["results"]).stat().st_mtime_ns
    assert began
    code, output, error = remit(*words)
    assert code == 0, error
    lines = scores.read_scores(out)
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert lines[: len(before)] == before
    assert (out / lines[0]["results"]).stat().st_mtime_ns == first_results
    assert list((out / "exports").iterdir()) == []
    assert f"task scores after 3 steps: {scores.in_words(lines[-1])}" in output
    for line, folder in ((lines[0], reference_model), (lines[2], out / "model")):
        right = Oracle(folder).right_choices()
        assert values_of(out, line, "own_choice") == right
        assert line["tasks"]["own_choice"]["value"] == pytest.approx(sum(right) / len(right))
    options = yaml.safe_load(eval_file.read_text())
    code, _, error = remit(
        "eval", "--model", out / "model", "--tasks", options["tasks"], "--task-dir", options["task_dir"],
        "--dtype", "float32", "--out", tmp_path / "results",
    )  # fmt: skip
    assert code == 0, error
    (file,) = (tmp_path / "results").glob("*/results.json")
    alone = json.loads(file.read_text())["tasks"]
    for task, entry in lines[2]["tasks"].items():
        assert (entry["value"], entry["stderr"]) == (alone[task]["value"], alone[task]["stderr"])
        assert entry["questions"] == alone[task]["questions"]
    shown = board(out / "tensorboard" / "tasks")
    assert shown["tasks/mean"] == [(line["step"], pytest.approx(line["mean"]["value"], rel=1e-6)) for line in lines]


def board(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder)).Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.usefixtures("starts_processes")
def test_refused_before_the_run_begins(
    tmp_path: Path, annotated: dict[str, Path], reference_model: Path, eval_file: Path, remit: Remit
) -> None:
    common = [
        "train",
        "--shards",
        annotated["packed"],
        "--model",
        reference_model,
        "--out",
        tmp_path / "out",
        "--max-steps",
        1,
    ]
    tasks = shutil.copytree(yaml.safe_load(eval_file.read_text())["task_dir"], tmp_path / "tasks")
    own = yaml.safe_load((tasks / "own_few.yaml").read_text())
    (tasks / "own_few.yaml").write_text(
        yaml.safe_dump(own | {"dataset_kwargs": {"data_files": {"test": "gone.jsonl"}}})
    )
    (tmp_path / "eval.yaml").write_text(yaml.safe_dump({"tasks": "own_few", "task_dir": str(tasks)}))
    code, _, error = remit(*common, "--eval-tasks", tmp_path / "eval.yaml")
    assert code == 1
    assert f"--eval-tasks {tmp_path}/eval.yaml: own_few: cannot be loaded with its data set json" in error
    code, _, error = remit(*common, "--eval-tasks", "paper", "--eval-device", "cuda:3")
    assert (code, "--eval-device is cuda:3, and torch sees 0 GPUs" in error) == (1, True), error
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session", "starts_processes")
def test_in_tasks_of_ray(
    tmp_path: Path, annotated: dict[str, Path], reference_model: Path, eval_file: Path, remit: Remit
) -> None:
    code, output, error = remit(
        "train", "--shards", annotated["packed"], "--model", reference_model, "--out", tmp_path / "out", "--dtype", "float32",
        "--max-steps", 3, "--global-batch-size", 4, "--eval-tasks", eval_file, "--eval-tasks-every", 2, "--ray-workers", 2,
    )  # fmt: skip
    assert code == 0, error
    lines = scores.read_scores(tmp_path / "out")
    assert [line["step"] for line in lines] == [0, 2, 3]
    assert values_of(tmp_path / "out", lines[-1], "own_choice") == Oracle(tmp_path / "out/model").right_choices()
    assert "task scores after 3 steps: " in output
