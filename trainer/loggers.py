"""Where the metrics of a run's steps go: metrics.jsonl, TensorBoard, and Weights & Biases (--wandb-project NAME).

OUT/metrics.jsonl has a line for each step. OUT/tensorboard and Weights & Biases get the same numbers in flat groups. The id of
the run at Weights & Biases is kept in OUT/wandb.json, so that a resumed run goes on under it. WANDB_MODE=offline keeps
everything in OUT/wandb, which `wandb sync` sends later; other settings come from the WANDB_* variables of the library.
"""

import contextlib
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from shards.store import temporary_name
from trainer.config import TrainConfig
from trainer.model_flops import speed
from trainer.run_folder import METRICS, TENSORBOARD
from trainer.statistics import WEIGHT_STEP

WANDB_IDS = "wandb.json"
DETAILS_EVERY = 10  # steps between histograms and the metrics of each source
NOT_SHOWN = ("step", "sources", "mixture", "weight_histogram", "delta_quantiles")


@dataclass(frozen=True)
class Loggers:
    """All that a step's metrics are written to."""

    file: IO[str]
    board: "Board"
    wandb_run: "WandbRun | None"

    def write(self, metrics: dict[str, Any]) -> None:
        """Add one step: a line of metrics.jsonl, and the same for TensorBoard and Weights & Biases."""
        self.file.write(json.dumps(metrics) + "\n")
        self.file.flush()
        self.board.write(metrics)
        if self.wandb_run is not None:
            self.wandb_run.write(metrics)

    def flush(self) -> None:
        """Bring to the disk what was added so far."""
        self.board.flush()


@contextlib.contextmanager
def open_loggers(
    config: TrainConfig, first_step: int, settings: dict[str, Any], is_writer: bool
) -> Iterator[Loggers | None]:
    """The loggers of a run that has `first_step` steps, and None on the processes that write nothing.

    settings: what run.json says.
    """
    if not is_writer:
        yield None
        return
    board = Board(config.out / TENSORBOARD, first_step)
    wandb_run = None if config.wandb_project is None else WandbRun(config.wandb_project, config.out, settings)
    with open(config.out / METRICS, "a", encoding="utf-8") as lines, board, wandb_run or contextlib.nullcontext():
        yield Loggers(lines, board, wandb_run)


@dataclass(frozen=True)
class WeightHistogram:
    """centres: of the bins that have tokens, ascending; counts: of tokens, by centre."""

    centres: list[float]
    counts: list[int]


@dataclass(frozen=True)
class Group:
    """Numbers under one heading: "train", or "source NAME". weights: None in the steps that leave details out."""

    name: str
    scalars: dict[str, float]
    weights: WeightHistogram | None


def step_groups(metrics: dict[str, Any]) -> Iterator[Group]:
    """The groups of one step as it stands in metrics.jsonl; those of the sources every ten steps, if there are several."""
    has_details = metrics["step"] == 1 or metrics["step"] % DETAILS_EVERY == 0
    yield _group("train", metrics | speed(metrics), has_details)
    if has_details and len(metrics["sources"]) > 1:
        for name, of_source in metrics["sources"].items():
            yield _group(f"source {name}", of_source | (metrics.get("mixture") or {}).get(name, {}), has_details)


def _group(name: str, metrics: dict[str, Any], has_details: bool) -> Group:
    scalars = {key: value for key, value in metrics.items() if key not in NOT_SHOWN and isinstance(value, int | float)}
    if not has_details or not metrics.get("weight_histogram"):  # steps of remit rmt have no weights
        return Group(name, scalars, None)
    quantiles = metrics["delta_quantiles"] or {}
    bins = sorted((float(centre), count) for centre, count in metrics["weight_histogram"].items())
    histogram = WeightHistogram([centre for centre, _ in bins], [count for _, count in bins])
    return Group(name, scalars | {f"delta_quantile_{share}": value for share, value in quantiles.items()}, histogram)


class Board:
    """TensorBoard's files in `folder`. What an earlier process wrote of steps after `first_step` is hidden, because a
    resumed run makes them again."""

    def __init__(self, folder: Path, first_step: int) -> None:
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *error: object) -> None:
        self._writer.close()

    def flush(self) -> None:
        """Bring to the disk what was added so far."""
        self._writer.flush()

    def write(self, metrics: dict[str, Any]) -> None:
        """Add one step, as it stands in metrics.jsonl."""
        for group in step_groups(metrics):
            for name, value in group.scalars.items():
                self._writer.add_scalar(f"{group.name}/{name}", value, metrics["step"])
            if group.weights is not None:
                self._histogram(f"{group.name}/weights", group.weights, metrics["step"])

    def _histogram(self, tag: str, weights: WeightHistogram, step: int) -> None:
        counted = {round(centre / WEIGHT_STEP): count for centre, count in zip(weights.centres, weights.counts)}
        # a bucket reaches down to the limit of the one before it: empty ones must be there, and one below the first
        bins = {index * WEIGHT_STEP: counted.get(index, 0) for index in range(min(counted) - 1, max(counted) + 1)}
        self._writer.add_histogram_raw(
            tag, min=(min(counted) - 0.5) * WEIGHT_STEP, max=(max(counted) + 0.5) * WEIGHT_STEP,
            num=sum(bins.values()), sum=sum(centre * n for centre, n in bins.items()),
            sum_squares=sum(centre**2 * n for centre, n in bins.items()),
            bucket_limits=[centre + WEIGHT_STEP / 2 for centre in bins], bucket_counts=list(bins.values()), global_step=step,
        )  # fmt: skip


def require_wandb() -> Any:
    """The library; ValueError where it is not installed."""
    try:
        import wandb
    except ImportError:
        wandb = None  # type: ignore[assignment]
    # a folder ./wandb of earlier offline runs is importable too, as an empty namespace
    if not hasattr(wandb, "init"):
        raise ValueError(
            "--wandb-project: wandb is not installed; in your checkout of remit: pip install '.[wandb]', or leave the option out: "
            "OUT/tensorboard has the same figures"
        )
    return wandb


class WandbRun:
    """A run of `project` at Weights & Biases. out: folder of the run. settings: shown there as the configuration."""

    def __init__(self, project: str, out: Path, settings: dict[str, Any]) -> None:
        self._wandb = require_wandb()
        try:
            self._run = self._wandb.init(
                project=project,
                id=run_id(out, project),
                name=out.name,
                dir=str(out),
                config=settings,
                resume="allow",
                # neither what the terminal shows nor the user's code leaves the machine
                settings=self._wandb.Settings(console="off", silent=True, disable_code=True, disable_git=True),
            )
        except self._wandb.Error as error:
            raise ValueError(
                f"--wandb-project {project}: Weights & Biases refuses ({' '.join(str(error).split())}); `wandb login`, or "
                "WANDB_MODE=offline to send the run later, or leave the option out"
            ) from None
        if self._run.url:
            print(f"remit train: Weights & Biases: {self._run.url}")

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self._run.finish(exit_code=0 if kind is None else 1)

    def write(self, metrics: dict[str, Any]) -> None:
        """Add one step, as it stands in metrics.jsonl."""
        # steps that a resumed run makes again are there already, and a step cannot be written twice
        if metrics["step"] < self._run.step:
            return
        values: dict[str, Any] = {}
        for group in step_groups(metrics):
            values |= {f"{group.name}/{name}": value for name, value in group.scalars.items()}
            if group.weights is not None:
                values[f"{group.name}/weights"] = self._histogram(group.weights)
        self._run.log(values, step=metrics["step"])

    def _histogram(self, weights: WeightHistogram) -> Any:
        first, last = (round(weights.centres[end] / WEIGHT_STEP) for end in (0, -1))
        counts = np.zeros(last - first + 1, dtype=np.int64)  # with the empty bins in between
        counts[[round(centre / WEIGHT_STEP) - first for centre in weights.centres]] = weights.counts
        edges = (np.arange(first, last + 2) - 0.5) * WEIGHT_STEP
        return self._wandb.Histogram(np_histogram=(counts, edges))


def run_id(out: Path, project: str) -> str:
    """Id of this run in `project`: the one noted in OUT/wandb.json, else a new one, noted there."""
    path = out / WANDB_IDS
    ids: dict[str, str] = {}
    try:
        ids = json.loads(path.read_text(encoding="utf-8"))
        return ids[project]
    except FileNotFoundError:
        pass
    except KeyError:
        pass  # a run of another project so far
    except (ValueError, TypeError):
        raise ValueError(f"{path}: is not JSON of project names and run ids; delete it to log as a new run") from None
    ids[project] = uuid.uuid4().hex[:12]
    temporary = temporary_name(path)
    temporary.write_text(json.dumps(ids, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)
    return ids[project]
