"""The folder of a run: its settings, its metrics files, the exported model."""

import hashlib
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shards.fingerprint import model_origin, weights_fingerprint
from shards.folder import ShardFolder
from shards.output_folder import MODEL, read_record, refuse_other
from shards.store import Store, temporary_name
from trainer.config import TrainConfig
from trainer.data import unscored_rows
from trainer.export import EXPORTS
from trainer.going_on import CHANGES, LENGTH, RESUMED_FROM
from trainer.mixed_shards import MixedShards
from trainer.objectives.settings import OPTIONS
from trainer.order import WINDOW_BLOCKS

METRICS = "metrics.jsonl"
EVALUATION = "evaluation.jsonl"
TASK_SCORES = "tasks.jsonl"
TENSORBOARD = "tensorboard"
CHECKPOINTS = "checkpoints"
NOT_SETTINGS = (
    *("out", "debug", "shards", "mix", "model", "eval_shards"),
    *("checkpoint_every", "keep_checkpoints", "timeout_seconds"),
    *("export_every", "export_dtype", "ray_workers", "wandb_project", "profile", "prometheus"),
    *("eval_tasks", "eval_tasks_every", "eval_device", "mirror"),
    # trainer/going_on.py records these
    *("on_nonfinite", "skip_steps", "resume_from"),
    # these change the machine's work and the last digits, not what is computed
    *("micro_batch_size", "sharding", "activation_checkpointing", "compile", "deterministic"),
)
# what run.json says beside the settings: not compared by a resume, since older runs lack it, and the base's folder and what a machine
# has installed may change
RECORDED = ("base", "rows_left_out", "tokenizer_differences", "attention")
# options that a run began without where they are off, as all runs of older versions
OFF: dict[str, Any] = {
    "z_loss": 0.0,
    "skip_spikes": None,
    "average": None,
    "decay_embeddings": True,
    "float8": False,
    "float8_emulated": False,
}


@dataclass(frozen=True)
class TrainResult:
    """Where the run is, and the means over its steps of the share of weights clipped low and high."""

    out: Path
    finished: bool
    steps: int
    clipped_low: float
    clipped_high: float


ORDER = f"windows of {WINDOW_BLOCKS} blocks"
"""How rows are put in order, for run.json: runs of releases with another order cannot go on."""


def run_settings(config: TrainConfig, mixed: MixedShards, context: str, processes: int) -> dict[str, Any]:
    """All that decides the outcome of a run; a resume under other settings is refused."""
    settings = {name: value for name, value in asdict(config).items() if name not in NOT_SETTINGS}
    used = OPTIONS[config.objective]
    for name in {name for options in OPTIONS.values() for name in options} - {*used}:
        del settings[name]  # of other objectives
    if "scope" in used and config.scope == "micro":  # what is ranked together depends on both
        settings |= {"micro_batch_size": config.micro_batch_size, "processes": processes}
    if not config.weight_decay:
        settings["decay_embeddings"] = True  # it decides nothing
    for name in [name for name, off in OFF.items() if settings[name] == off]:
        del settings[name]
    if config.router_aux_loss is None:
        del settings["router_aux_loss"]  # of a base without experts
    settings = {name: str(value) if value == math.inf else value for name, value in settings.items()}
    unscored = [unscored_rows(folder) for folder in mixed.folders]
    left_out = {
        (source, *row) if config.mixture.is_mixed else row
        for source, folder, of_folder in zip(mixed.names, mixed.folders, unscored)
        for name in references_left_out(config, folder)
        for row in of_folder[name]
    }
    by_reference: dict[str, int] = {}
    for name, rows in (entry for of_folder in unscored for entry in of_folder.items()):
        by_reference[name] = by_reference.get(name, 0) + len(rows)
    reads = config.reference if config.objective != "ntp" else ""
    of_reads = {
        (source, *row) if config.mixture.is_mixed else row
        for source, of_folder in zip(mixed.names, unscored)
        for row in of_folder.get(reads, set())
    }
    if config.leave_out == "reference" or left_out == of_reads:
        del settings["leave_out"]  # there is nothing to choose between
    name, revision = model_origin(Path(config.model))
    return settings | {
        "base": {"model": name, "revision": revision},
        "rows_left_out": {
            "rows": len(left_out),
            "by_reference": by_reference,
            "sha256": hashlib.sha256(json.dumps(sorted(left_out)).encode()).hexdigest(),
        },
        "context": context,
        "order": ORDER,
        **_what_trains(mixed, reads),
        "base_weights_sha256": weights_fingerprint(Path(config.model)),
    }


def _what_trains(mixed: MixedShards, reads: str) -> dict[str, Any]:
    if not mixed.mixture.is_mixed:
        return {"shards": mixed.first.manifest.provenance()}
    return {"mixture": mixed.identity(), "shards": mixed.common(reads or None)}


def references_left_out(config: TrainConfig, shards: ShardFolder) -> tuple[str, ...]:
    """Names of the references whose unscored rows train on nothing, as --leave-out says."""
    if config.leave_out == "any":
        return tuple(shards.manifest.references)
    return () if config.objective == "ntp" else (config.reference,)


def refuse_other_settings(out: Path | Store, settings: dict[str, Any], option: str = "--out") -> None:
    """ValueError where `out`, the folder that `option` names, holds a run with other settings."""
    before = read_record(out)
    if before is None:
        return
    where = out.url if isinstance(out, Store) else str(out)
    apart = (*RECORDED, CHANGES, *LENGTH)  # trainer/going_on.py decides about the length
    ours, theirs = ({key: run[key] for key in run if key not in apart} for run in (settings, before))
    if ours.get("router_aux_loss") == 0:  # runs from before there was a choice trained without, too
        theirs.setdefault("router_aux_loss", ours["router_aux_loss"])
    if "order" in ours and "order" not in theirs:
        raise ValueError(
            f"{where}: was begun by an earlier release, whose rows train in another order (order is not set there, {ORDER!r} "
            f"now); finish it with that release, or choose another {option}"
        )
    hints = {
        "leave_out": " (runs of earlier releases go on with --leave-out reference)",
        "decay_embeddings": " (runs of earlier releases go on with --decay-embeddings)",
    }
    began = before.get("base") or {}
    if began.get("revision"):  # a branch moves on
        hints["base_weights_sha256"] = f" (it began with {began['model']}@{began['revision']})"
    options = {field.name: f"--{field.name.replace('_', '-')}" for field in fields(TrainConfig)}
    options[RESUMED_FROM] = "--resume-from"
    remedy = f"choose another {option}, or delete that run to start over"
    if "mixture" in ours and "mixture" in theirs:
        ours, theirs = _with_named_stages(ours), _with_named_stages(theirs)
    refuse_other(where, "run", ours, theirs, remedy, options, hints)


def _with_named_stages(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with each stage of the mixture as one value, called what it is in the file of --mix.

    One other weight moves the shares of all sources, so a stage differs as a whole.
    """
    stages = {}
    for stage in settings["mixture"]["stages"]:
        name = f"stage after step {stage['after_step']}" if stage["after_step"] else "weights"
        stages[f"{name} (as shares)"] = ", ".join(f"{of} {share:g}" for of, share in sorted(stage["weights"].items()))
    return settings | {"mixture": {"sources": settings["mixture"]["sources"]}} | stages


def keep_lines(path: Path, last_step: int) -> dict[str, Any]:
    """Cut a JSON-lines file after `last_step`, where a run resumes; returns the last object kept."""
    if not path.exists():
        return {}
    last: dict[str, Any] = {}
    temporary = temporary_name(path)
    with open(path, encoding="utf-8") as lines, open(temporary, "w", encoding="utf-8") as kept:
        for line in lines:  # of a long run there are gigabytes
            try:
                value = json.loads(line)
            except ValueError:
                break  # the line that was being written when the run died
            if value["step"] > last_step:
                break
            kept.write(json.dumps(value) + "\n")
            last = value
    os.replace(temporary, path)
    return last


def drop_exports(out: Path, last_step: int) -> None:
    """Delete the models of steps after `last_step`, which are made again: on a GPU not always of the same bits."""
    for folder in (out / EXPORTS).glob("step-*"):
        step = folder.name.removeprefix("step-")
        if step.isdigit() and int(step) > last_step:  # others are the user's own
            shutil.rmtree(folder)


def run_result(out: Path) -> TrainResult:
    """Summary of a run from its metrics."""
    steps, sums = 0, {"clipped_low": 0.0, "clipped_high": 0.0}
    with open(out / METRICS, encoding="utf-8") as lines:
        for line in lines:
            value = json.loads(line)
            steps += 1
            for key in sums:
                sums[key] += value[key]
    means = {key: value / max(1, steps) for key, value in sums.items()}
    return TrainResult(out, (out / MODEL).exists(), steps, **means)
