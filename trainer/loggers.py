"""Figures of a run for Weights & Biases (remit train --wandb-project NAME), the same as TensorBoard gets.

The id of the run there is kept in OUT/wandb.json, so that a resumed run goes on under it. WANDB_MODE=offline keeps
everything in OUT/wandb, which `wandb sync` sends later; other settings come from the WANDB_* variables of the library.
"""

import json
import uuid
from pathlib import Path
from typing import Any

import numpy as np

from shards.store import temporary_name
from trainer.figures import WeightHistogram, step_groups
from trainer.statistics import WEIGHT_STEP

IDS = "wandb.json"


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
    """Logs to `project`, or nowhere where it is None (not asked for, ranks but the first).

    out: folder of the run. settings: shown there as the run's configuration.
    """

    def __init__(self, project: str | None, out: Path, settings: dict[str, Any]) -> None:
        self._run = None
        if project is None:
            return
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
        if self._run is not None:
            self._run.finish(exit_code=0 if kind is None else 1)

    def write(self, metrics: dict[str, Any]) -> None:
        """Add one step, as it stands in metrics.jsonl."""
        # steps that a resumed run makes again are there already, and a step cannot be written twice
        if self._run is None or metrics["step"] < self._run.step:
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
    path = out / IDS
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
