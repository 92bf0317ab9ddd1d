"""Evaluate a model in a Ray task: on whichever machine of the cluster has a GPU that does not train, or a CPU."""

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import ray

from pipelines.beside.process import Launch, Process
from pipelines.beside.setup import require_engine
from trainer.config import TrainConfig


def launch_on_ray(config: TrainConfig, note: Callable[[str], None]) -> Launch:
    """Start evaluations on the cluster that this process is connected to. ValueError where --eval-device asks for a GPU and all
    of them train."""
    gpus, workers = int(ray.cluster_resources().get("GPU", 0)), config.ray_workers
    if config.eval_device == "cuda" and gpus <= workers:
        raise ValueError(
            f"--eval-device is cuda, and the cluster has {gpus} GPUs for {workers} workers, expected one more; lower --ray-workers, "
            "or give --eval-device cpu"
        )
    on_gpu = config.eval_device != "cpu" and gpus > workers
    require_engine(config, on_gpu)
    note(f"--eval-tasks: evaluates in a Ray task, on {'a GPU' if on_gpu else 'the CPU'}")
    return lambda words, log: RayTask(words, log, on_gpu)


class RayTask:
    """A process of pipelines/beside/process.py on a machine of the cluster."""

    def __init__(self, words: list[str], log: Path, on_gpu: bool) -> None:
        # no CPU of its own: the workers of the training may have them all, and it gives way to them
        options = {"num_cpus": 0, "num_gpus": int(on_gpu), "max_retries": 0}
        self._task = ray.remote(_run).options(**options).remote(words, str(log), os.getcwd(), None if on_gpu else "")

    def wait(self, seconds: float) -> int | None:
        done, _ = ray.wait([self._task], timeout=seconds)
        if not done:
            return None
        try:
            return int(ray.get(self._task))
        except ray.exceptions.RayError:  # its machine is gone
            return -9

    def end(self) -> None:
        ray.cancel(self._task, force=True)  # the process ends with its worker
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(self._task, timeout=10)


def _run(words: list[str], log: str, cwd: str, gpu: str | None) -> int:
    process = Process(words, Path(log), cwd, gpu)
    while (code := process.wait(60)) is None:
        pass
    return code
