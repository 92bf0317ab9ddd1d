"""Where a run goes on: its own newest checkpoint, that of the run it branches off, or the base."""

from typing import Any

from torch.optim import Optimizer

from shards.output_folder import MODEL, read_record, write_record
from trainer.average import Average
from trainer.checkpoint import Checkpoints
from trainer.config import TrainConfig
from trainer.exported import Exported
from trainer.going_on import apply_changes, fingerprint, has_other_length, pinned_warmup
from trainer.guard import Guard
from trainer.layout import Layout
from trainer.loss_model import LossModel
from trainer.option_text import parse_average
from trainer.run_folder import (
    CHECKPOINTS,
    EVALUATION,
    METRICS,
    TASK_SCORES,
    drop_exports,
    keep_lines,
    refuse_other_settings,
)
from trainer.session import Session


def is_finished(config: TrainConfig, session: Session) -> bool:
    """Whether there is nothing left to train, on the first process: the model is there, and of the length that is asked for."""
    return session.lease is None or ((config.out / MODEL).exists() and not has_other_length(config))


def require_steps_fit(config: TrainConfig, num_steps: int, begin: int) -> None:
    """ValueError where an option names a step that the run does not have."""
    if begin >= num_steps:
        raise ValueError(
            f"--resume-from has a checkpoint of step {begin}, expected more steps than that, not {num_steps}; raise --max-steps"
        )
    if config.profile is not None and not begin < config.profile <= num_steps:
        raise ValueError(f"--profile is {config.profile}, expected a step of the run, {begin + 1} to {num_steps}")
    option = parse_average(config.average) if config.average else None
    if option and option.last > num_steps - begin:
        raise ValueError(f"--average is {config.average}, expected at most the {num_steps - begin} steps of the run")


def first_warmup(config: TrainConfig, rows: int) -> int | None:
    """--warmup-steps as it was when the run in --out began, on the first process."""
    record = read_record(config.out)
    return config.warmup_steps if record is None else pinned_warmup(config, record, rows)


def resume(
    config: TrainConfig,
    session: Session,
    settings: dict[str, Any],
    changes: dict[str, Any],
    loss_model: LossModel,
    optimizer: Optimizer,
    layout: Layout,
    guard: Guard,
    average: Average | None,
) -> tuple[Checkpoints, int]:
    """Begin the run in --out, or go to its newest checkpoint and delete what it has from later steps.

    Returns the checkpoints and the steps done. A run that branches off another one begins with that one's checkpoint.
    """
    world = session.world
    if world.first:
        session.check_lease()  # minutes of loading have passed
        write_record(config.out, settings)
        refuse_other_settings(config.out, settings)  # of a writer that came in between
    checkpoints = Checkpoints(
        config.out / CHECKPOINTS, loss_model, optimizer, world, world.from_first(fingerprint(config.out) if world.first else None),
        config.keep_checkpoints, session.lease, average, session.mirror,
    )  # fmt: skip
    first_step, problems = checkpoints.load_newest()
    if session.mirror:
        session.mirror.require_behind(first_step)
    if world.first:
        session.check_lease()
        apply_changes(config.out, changes, session.lease, first_step)
    has_own = first_step > 0
    if not has_own and config.resume_from is not None:
        first_step = checkpoints.load_from(config.resume_from)
    if "counts" in checkpoints.run_state:
        guard.load(checkpoints.run_state)
    if not session.lease:
        return checkpoints, first_step
    session.check_lease()  # much of what follows is deleted or cut where it is made again
    for problem in problems:
        session.note(f"passed over a damaged checkpoint: {problem}")
    if has_own:
        session.note(f"going on after step {first_step:,}")
        began = (read_record(config.out) or {}).get("attention", "that of an earlier release")
        if settings.get("attention", began) != began:
            session.note(f"attention over documents was {began} when the run began: its last digits may change")
    last_line = keep_lines(config.out / METRICS, first_step)
    if "counts" not in checkpoints.run_state:  # of a version that did not count
        guard.counts.tokens = last_line.get("tokens", 0)
    drop_exports(config.out, first_step)
    keep_lines(config.out / TASK_SCORES, first_step)
    Exported(config.out).begin(layout)  # from here on --eval-tasks takes exports
    keep_lines(
        config.out / EVALUATION, first_step if has_own else first_step - 1
    )  # the one before the first step is made again
    return checkpoints, first_step
