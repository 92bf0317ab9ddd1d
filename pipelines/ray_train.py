"""remit train on a Ray cluster: Ray Train starts the processes and connects them, the trainer is the same.

In: a TrainConfig with --ray-workers. All nodes must see shards, model and output folder under the same paths.
"""

import contextlib
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.terminal import note
from scorer.cluster import cause, ray_cluster
from shards.store import absolute
from trainer.config import TrainConfig
from trainer.run_folder import TrainResult, run_result

if TYPE_CHECKING:
    from pipelines.beside.beside import Beside

STOP = "stop"
NOTES = "notes"  # what the workers tell the user


def train_on_ray(config: TrainConfig, should_stop: Callable[[], bool], beside: "Beside | None" = None) -> TrainResult:
    """`trainer.train.train` in config.ray_workers processes of the cluster that RAY_ADDRESS names, or of a private one.

    beside: evaluates models of the run on tasks, in Ray tasks; what is left of that after the training is waited for.
    RuntimeError with the worker's own error where one fails; the run can be resumed then, also with another number.
    """
    config = for_workers(config)
    config.out.parent.mkdir(parents=True, exist_ok=True)
    with (
        ray_cluster(config.debug),
        tempfile.TemporaryDirectory() as storage,
        # which reaches the workers wherever they are, and belongs to this driver alone
        tempfile.TemporaryDirectory(
            prefix=f".{config.out.name}.", suffix=".tmp", dir=config.out.parent, ignore_cleanup_errors=True
        ) as shared,
        watched(should_stop, Path(shared, STOP), Path(shared, NOTES)),
        evaluating(beside, config, should_stop),
    ):
        stop_file, notes = Path(shared, STOP), Path(shared, NOTES)
        has_gpu = bool(ray.cluster_resources().get("GPU"))
        trainer = TorchTrainer(
            _work,
            train_loop_config=asdict(config) | {"stop_file": str(stop_file), "notes": str(notes)},
            torch_config=TorchConfig(
                "cpu:gloo,cuda:nccl" if has_gpu else "gloo", timeout_s=int(config.timeout_seconds)
            ),
            scaling_config=ScalingConfig(num_workers=config.ray_workers, use_gpu=has_gpu),
            run_config=RunConfig(storage_path=storage, name="remit"),
        )
        try:
            fit(trainer)
        except Exception as error:
            raise RuntimeError(f"a worker of Ray Train failed: {_last_line(cause(error))}") from error
    return run_result(config.out)


@contextlib.contextmanager
def evaluating(beside: "Beside | None", config: TrainConfig, should_stop: Callable[[], bool]) -> Iterator[None]:
    """Evaluate models of the run in tasks of the cluster for the block, and after it what is left where the run is finished."""
    if beside is None:
        yield
        return
    from pipelines.beside.on_ray import launch_on_ray

    beside.start(launch_on_ray(config, note))
    with contextlib.closing(beside):
        yield
        if run_result(config.out).finished:
            beside.finish(should_stop)


def for_workers(config: TrainConfig) -> TrainConfig:
    """The same run for Ray's workers, which have another working directory."""
    return replace(
        config, out=config.out.absolute(), shards=_absolute_shards(config), mix=config.mix and config.mix.absolute(),
        model=absolute(config.model), mirror=config.mirror and absolute(config.mirror), eval_shards=config.eval_shards and absolute(config.eval_shards),
        resume_from=config.resume_from and config.resume_from.absolute(),
        prometheus=config.prometheus and config.prometheus.absolute(),
    )  # fmt: skip


def _absolute_shards(config: TrainConfig) -> tuple[str, ...]:
    """--shards with absolute paths; ValueError where a file's are not to be found from elsewhere."""
    sources = config.mixture.sources
    if config.mix is not None:
        for source in sources:
            if absolute(source.shards) != source.shards:
                raise ValueError(
                    f"--mix {config.mix}: {source.name} is {source.shards}, which Ray's workers, with another working directory, "
                    "do not find; give an absolute path, or one relative to the file"
                )
        return ()
    if not config.mixture.is_mixed and config.shards == (sources[0].shards,):
        return (absolute(sources[0].shards),)
    return tuple(f"{absolute(source.shards)}={source.weight!r}" for source in sources)


def fit(trainer: TorchTrainer) -> None:
    """trainer.fit() beside the main thread, in which Ray Train would take Ctrl-C over and end the workers unsaved."""
    raised: list[BaseException] = []

    def work() -> None:
        try:
            trainer.fit()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1.0)  # handlers of signals run in between
    if raised:
        raise raised[0]


def _work(settings: dict[str, Any]) -> None:
    from trainer.train import train

    stop_file, notes = Path(settings.pop("stop_file")), Path(settings.pop("notes"))

    def note(line: str) -> None:  # of the first process alone; Ray keeps what its workers print in files of its own
        with open(notes, "a", encoding="utf-8") as file:
            file.write(line + "\n")

    train(TrainConfig(**settings), should_stop=stop_file.exists, note=note)


@contextlib.contextmanager
def watched(should_stop: Callable[[], bool], stop_file: Path, notes: Path) -> Iterator[None]:
    """Create stop_file when a signal came to this process, which waits inside of Ray; show the lines that come in `notes`."""
    done = threading.Event()
    shown = 0

    def show() -> None:
        nonlocal shown
        lines = notes.read_text(encoding="utf-8").split("\n")[:-1] if notes.exists() else []
        for line in lines[shown:]:
            note(line)
        shown = len(lines)

    def watch() -> None:
        while not done.wait(0.5):
            with contextlib.suppress(OSError):  # a shared filesystem that stumbles must not cost the next signal
                if should_stop():
                    stop_file.touch()
                show()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        show()


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in reversed(lines) if "Error" in line), lines[-1] if lines else type(error).__name__)
