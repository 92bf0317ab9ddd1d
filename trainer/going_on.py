"""What may change about a run that has begun: its length, the steps that it leaves out; and runs that branch off others.

run.json keeps the settings that a run began with, which a resume must have too. Beside them it has "changes": what later
commands changed, each of which is in force from then on. Checkpoints do not depend on it.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from shards.lease import Lease
from shards.output_folder import MODEL, differences, read_record, replace_record
from shards.record import encode_json
from trainer.checkpoint import checkpoints_of
from trainer.config import TrainConfig, learning_rate_at, warmup_of
from trainer.export import EXPORTS
from trainer.exported import Exported
from trainer.option_text import Ranges, contains, join, parse_steps, show, without

AVERAGE_MODEL = "model-average"
CHANGES = "changes"
CHECKPOINTS = "checkpoints"
LENGTH = ("max_steps", "epochs")
RESUMED_FROM = "resumed_from"

WHAT_TRAINS = ("mixture", "shards", "order", "seed")
"""In run.json, what decides the rows of a step."""

Settings = dict[str, Any]


def steps_of(settings: Mapping[str, Any], rows: int) -> int:
    """Steps of a run with these settings. rows: of its shards."""
    return settings["max_steps"] or math.ceil(math.ceil(settings["epochs"] * rows) / settings["global_batch_size"])


def first_settings(record: Mapping[str, Any]) -> Settings:
    """What the run began with."""
    return {name: value for name, value in record.items() if name != CHANGES}


def settings_now(record: Mapping[str, Any]) -> Settings:
    """The settings that are in force."""
    return first_settings(record) | {name: record[CHANGES][name] for name in LENGTH if name in record.get(CHANGES, {})}


def fingerprint(out: Path) -> str:
    """Of what the run in `out` began with: a checkpoint stays its own whatever changes later."""
    record = read_record(out)
    assert record is not None
    return fingerprint_of(record)


def fingerprint_of(record: Mapping[str, Any]) -> str:
    """The same of the run with this run.json."""
    return hashlib.sha256(encode_json(first_settings(record))).hexdigest()


def begins_at(settings: Mapping[str, Any]) -> int:
    """The step whose weights the run began with: 0, unless it branched off another one."""
    return int((settings.get(RESUMED_FROM) or {}).get("step", 0))


def rows_begin_at(settings: Mapping[str, Any]) -> int:
    """The step after which the rows of this run's shards or mixture train, those of a run before it with the same included."""
    return int((settings.get(RESUMED_FROM) or {}).get("rows_from", 0))


def has_other_length(config: TrainConfig) -> bool:
    """Whether the run in --out is there, and of another length than asked for."""
    record = read_record(config.out)
    return record is not None and length_of(settings_now(record)) != length_of(asdict(config))


def length_of(settings: Mapping[str, Any]) -> tuple[int | None, float | None]:
    """The option that says how long a run is: --max-steps, or else --epochs."""
    steps = settings.get("max_steps")
    return steps, None if steps else settings.get("epochs")


def newest_step(out: Path) -> int:
    """The step of the newest checkpoint, by its name; 0 without one."""
    return max(checkpoint_steps(out), default=0)


def checkpoint_steps(out: Path) -> list[int]:
    return [*checkpoints_of(out / CHECKPOINTS)]


def plan_changes(config: TrainConfig, settings: Settings, rows: int) -> Settings:
    """The "changes" of run.json that this command leads to; ValueError where it asks for one that the run cannot make.

    settings: of this command, the same as those that the run began with but for its length.
    """
    record = read_record(config.out)
    changes = dict((record or {}).get(CHANGES, {}))
    asked = {name: settings[name] for name in LENGTH}
    if record is not None and length_of(settings_now(record)) != length_of(asked):
        require_goes_on(config, record, rows)
        changes |= asked
    known = left_out_steps(changes)
    new = without(parse_steps(config.skip_steps), known)
    done = 0 if record is None else max(newest_step(config.out), begins_at(record))
    if record is not None and (config.out / MODEL).exists():
        done = max(done, steps_of(settings_now(record), rows))
    if new and new[0][0] <= done:
        raise ValueError(
            f"--skip-steps {show(new)}: the run in {config.out} has trained to step {done}, expected later steps"
        )
    if new and new[-1][1] > steps_of(asked | {"global_batch_size": config.global_batch_size}, rows):
        raise ValueError(
            f"--skip-steps {show(new)}: the run has {steps_of(settings, rows)} steps, expected steps up to that one"
        )
    if known or new:
        changes["skip_steps"] = [list(steps) for steps in join([*known, *new])]
    if config.on_nonfinite != changes.get("on_nonfinite", "stop"):
        changes["on_nonfinite"] = config.on_nonfinite
    return changes


def require_goes_on(config: TrainConfig, record: Settings, rows: int) -> None:
    """ValueError, with the way that is open, where the run in --out cannot go on to another number of steps.

    It can where the learning rate of all steps that it has done is what a run of the new length would have had.
    """
    out, begin = config.out, begins_at(record)
    before, now = settings_now(record), {"max_steps": config.max_steps, "epochs": config.epochs}
    old, new = steps_of(before, rows), steps_of(before | now, rows)
    steps = checkpoint_steps(out)
    is_finished = (out / MODEL).exists()
    done = old if is_finished else max([*steps, begin])
    what = f"{out}: is a run of {old} steps, of which {done} are done; {new} asked for now"
    if new < done or (new == done and is_finished):
        raise ValueError(f"{what}, expected more; choose another --out")
    if is_finished and old not in steps:
        raise ValueError(
            f"{what}, and it has no checkpoint of its last step to go on from; --checkpoint-every above 0 keeps one; train into "
            "another --out"
        )
    pinned = replace(config, warmup_steps=pinned_warmup(config, record, rows))

    def is_same(step: int) -> bool:
        return learning_rate_at(step, pinned, old, begin) == learning_rate_at(step, pinned, new, begin)

    if all(is_same(step) for step in range(begin + 1, done + 1)):
        return
    usable = [step for step in steps if all(is_same(earlier) for earlier in range(begin + 1, step + 1))]
    branch = usable[-1] if usable else steps[-1] if steps else None
    remedy = (
        f"train on from a checkpoint in a run of its own: --resume-from {out / CHECKPOINTS}/step-{branch:06d} --max-steps N --out "
        "NEW, with the --schedule that it is to have from there"
        if branch is not None
        else "train into another --out"
    )
    raise ValueError(
        f"{what}, and with --schedule {config.schedule} the steps that are done would have had other learning rates; a run goes on "
        f"with --schedule constant, or with wsd before its decay; {remedy}"
    )


def pinned_warmup(config: TrainConfig, record: Settings, rows: int) -> int | None:
    """--warmup-steps of a run whose length may have changed since it began: its default depends on the first length."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return warmup_of(config, steps_of(first_settings(record), rows))


def apply_changes(out: Path, changes: Settings, lease: Lease | None, first_step: int) -> None:
    """Write the changes into run.json; a finished run whose length has changed keeps its model among the exports.

    The model goes first: a process that dies in between leaves a run that is not finished, which either length fits.
    first_step: of the checkpoint that was loaded. ValueError where it is not that of the finished run's model, which could
    not stay then: exports of steps that are made again are deleted.
    """
    record = read_record(out)
    assert record is not None
    if record.get(CHANGES, {}) == changes:
        return
    after = first_settings(record) | {CHANGES: changes}
    if (out / MODEL).exists() and length_of(settings_now(record)) != length_of(settings_now(after)):
        if lease:
            lease.check()
        step = newest_step(out)
        if first_step < step:
            raise ValueError(
                f"{out}: is a finished run of {step} steps, whose last checkpoint is damaged, so that it can go on from step "
                f"{first_step} alone; keep its model and train into another --out, with --resume-from "
                f"{out / CHECKPOINTS}/step-{first_step:06d}"
            )
        (out / EXPORTS).mkdir(exist_ok=True)
        moved = {AVERAGE_MODEL: f"{EXPORTS}/step-{step:06d}-average", MODEL: f"{EXPORTS}/step-{step:06d}"}
        for name, kept in moved.items():
            if (out / name).exists():
                shutil.rmtree(out / kept, ignore_errors=True)
                (out / name).rename(out / kept)
        Exported(out).rename(moved)
    if lease:
        lease.check()
    replace_record(out, after)


def describe_source(config: TrainConfig, settings: Settings) -> tuple[Settings, str | None]:
    """What run.json says of the checkpoint of --resume-from, and a note on what is asked for otherwise than there.

    ValueError where there is no such checkpoint, or where it is of another base or number of rows a step. Without the folder
    what the run in --out wrote down counts, so that it goes on from its own checkpoints.
    """
    checkpoint = config.resume_from
    assert checkpoint is not None
    try:
        index = json.loads((checkpoint / "checkpoint.json").read_text(encoding="utf-8"))
        source = read_record(checkpoint.resolve().parent.parent)
        step, checksum = int(index["step"]), str(index["checksum"])
    except FileNotFoundError:
        record = read_record(config.out) or (config.mirror and read_record(config.mirror)) or {}
        known = record.get(RESUMED_FROM)
        if known:
            return known, None
        index, source = None, None
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"--resume-from {checkpoint}: {error}; choose another checkpoint") from None
    if index is None or source is None:
        raise ValueError(
            f"--resume-from {checkpoint}: is not a checkpoint of a run, expected its folder, as RUN/{CHECKPOINTS}/step-000100"
        )
    source = settings_now(source)
    for name in ("base_weights_sha256", "global_batch_size"):
        if source.get(name) != settings[name]:
            what = "--model" if name == "base_weights_sha256" else "--global-batch-size"
            raise ValueError(
                f"--resume-from {checkpoint}: {what} is not that of the run, {name} is {source.get(name)} there and "
                f"{settings[name]} now; a branch keeps it"
            )
    ignored = {"attention", "base", "tokenizer_differences", RESUMED_FROM}
    ours, theirs = ({key: value for key, value in run.items() if key not in ignored} for run in (settings, source))
    others = list(dict.fromkeys(field.split(".")[0].split("[")[0] for field, _ in differences(ours, theirs)))
    with_others = f", with other settings than there: {', '.join(others)}" if others else ""
    same_rows = all(
        encode_json({name: source.get(name)}) == encode_json({name: settings.get(name)}) for name in WHAT_TRAINS
    )
    return {
        "step": step,
        "checkpoint": checksum,
        "rows_from": rows_begin_at(source) if same_rows else step,
    }, f"begins with step {step:,} of {checkpoint.parent.parent}{with_others}"


def is_left_out(changes: Settings, step: int) -> bool:
    """Whether --skip-steps has the step."""
    return contains(left_out_steps(changes), step)


def left_out_steps(changes: Settings) -> Ranges:
    """The steps that --skip-steps has."""
    return tuple((first, last) for first, last in changes.get("skip_steps", []))
