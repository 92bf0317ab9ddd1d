"""remit rmt: each step reasons about some positions (GRPO) and predicts the others (NTP), L = L_RL + lambda * L_NTP.

In: scored shards with entropies, a base model. Out: OUT/metrics.jsonl, OUT/positions.jsonl (the positions of each step),
OUT/evaluation.jsonl, OUT/checkpoints/ and, at the end, OUT/model. The same command again goes on from the newest valid
checkpoint. The first --format-steps steps, if any, learn the format of a rollout instead of L_RL.
"""

import math
from functools import partial
from time import perf_counter
from typing import Any

import torch

from pipelines.rmt.engine import Engines
from pipelines.rmt.evaluation import held_out_positions, measure_accuracy
from pipelines.rmt.losses import learn_format, learn_others, learn_policy
from pipelines.rmt.policy import Policy
from pipelines.rmt.positions import rows_without
from pipelines.rmt.settings import RmtConfig
from pipelines.rmt.setup import Run
from shards.output_folder import MODEL
from trainer.config import learning_rate_at
from trainer.distributed import whole
from trainer.evaluation import Evaluation, open_measure
from trainer.export import export
from trainer.exported import Exported, rounding_notes
from trainer.gathered import Gathered
from trainer.loggers import open_loggers
from trainer.loss_model import peak_memory_bytes
from trainer.objectives.ntp import NTP
from trainer.session import Session
from trainer.statistics import StepStatistics
from trainer.train import is_due

FORMAT_NTP_WEIGHT = 1.0
DIFFERENCE_THAT_COUNTS = 0.1
"""Nats, between what engine and model say of a sampled token: bfloat16 makes up to half of it."""


def train_steps(run: Run, session: Session, engines: Engines | None) -> bool:
    """Train to the last step and export; False where the caller asked to stop before it, after a checkpoint.

    engines: on the first process alone.
    """
    config, world = run.config, session.world
    policy = Policy(run, session, engines)
    evaluation = open_evaluation(run, session, policy)
    if run.first_step == 0:
        evaluation.write(0, of_export=False)
    tokens = run.tokens
    with open_loggers(config.train_config(), run.first_step, run.settings, session.lease is not None) as log, run.checkpoints:  # fmt: skip
        for step in range(run.first_step + 1, config.num_steps + 1):
            began = perf_counter()
            is_format = step <= config.format_steps
            learning_rate = rate_at(step, config)
            for group in run.optimizer.param_groups:
                group["lr"] = learning_rate
            positions = policy.draw(step)
            rows = rows_without(positions, run.reader)
            waited = perf_counter() - began
            statistics = StepStatistics(world.device, run.sources.group, NTP.figures)

            if is_format:
                rl_loss, figures = learn_format(run, session, policy, step, positions)
            else:
                rl_loss, figures = learn_policy(run, session, policy, step, positions)
            # the warm-up is to teach a format, and what the base knows besides weighs as much meanwhile
            ntp_weight = FORMAT_NTP_WEIGHT if is_format else config.ntp_weight
            ntp = learn_others(run, session, rows, ntp_weight, statistics) if ntp_weight else {}
            grad_norm = whole(torch.nn.utils.clip_grad_norm_(run.loss_model.parameters(), config.max_grad_norm)).item()
            ntp_loss = ntp.get("loss", 0.0)
            require_finite(step, rl_loss, ntp_loss, grad_norm)
            run.optimizer.step()
            run.optimizer.zero_grad(set_to_none=True)

            seconds = perf_counter() - began
            step_tokens = sum(len(row.input_ids) for row in rows) if ntp_weight else 0
            step_tokens += int(figures["prompt_tokens"]) + int(figures["rollout_tokens"])
            tokens += step_tokens
            metrics: dict[str, Any] = {"step": step, "phase": "format" if is_format else "policy", "tokens": tokens}
            metrics |= {**ntp, "ntp_loss": ntp_loss, "loss": rl_loss + ntp_weight * ntp_loss, "rl_loss": rl_loss}
            metrics |= {"sources": ntp.get("sources", {}), **figures, "grad_norm": grad_norm, "lr": learning_rate}
            metrics |= {
                "tokens_per_second": step_tokens / seconds,
                "step_seconds": seconds,
                "data_wait_seconds": waited,
            }
            metrics |= {"peak_memory_bytes": peak_memory_bytes(world.device)}
            if log and session.lease:
                session.lease.check_often()
                log.write(metrics)

            is_last, policy.done = step == config.num_steps, step
            # not within the warm-up, whose thoughts come from the base
            if is_last or step == config.format_steps or (not is_format and is_due(step, config.eval_every)):
                evaluation.write(step, of_export=is_last)
            # a run goes on where the engines get new weights, so that its rollouts come from the same ones
            can_go_on = is_format or policy.takes_weights(step + 1)
            stopping = session.somebody_stops() and not is_last and can_go_on
            if stopping or is_due(step, config.checkpoint_every) or (config.checkpoint_every and is_last):
                if log:
                    log.flush()
                run.checkpoints.save(step, step * config.positions_per_step)
            if step == max(run.first_step, config.format_steps) + 1:
                for line in doubts(metrics):
                    session.note(line)
            session.progress(step, config.num_steps, metrics)
            if stopping:
                return False
    export_last(run, session, evaluation)
    return True


def doubts(metrics: dict[str, Any]) -> list[str]:
    """What the first step with rollouts shows that a user should know of."""
    found = []
    if metrics["closed"] == 0:
        found.append(
            f"no thought of step {metrics['step']} ended, so that no rollout was rewarded: the model may not know the format; "
            "--format-steps teaches it"
        )
    difference = metrics.get("engine_difference", 0.0)
    if difference > DIFFERENCE_THAT_COUNTS:
        found.append(
            f"the engine's log-probs are {difference:.2f} nat from the model's, expected less than {DIFFERENCE_THAT_COUNTS}: TRL "
            "weighs for it, but the gradients are noisy; --dtype float32 may help"
        )
    return found


def rate_at(step: int, config: RmtConfig) -> float:
    """Learning rate of a step: that of the warm-up of the format, then the schedule over the steps after it."""
    if step <= config.format_steps:
        # AdamW's first steps are as long as any, whatever the gradients say
        return config.format_learning_rate * min(1.0, step / max(1, config.format_steps // 10))
    return learning_rate_at(step - config.format_steps, config.train_config(), config.max_steps)


def require_finite(step: int, rl_loss: float, ntp_loss: float, grad_norm: float) -> None:
    """FloatingPointError where a step cannot be taken."""
    if not all(map(math.isfinite, (rl_loss, ntp_loss, grad_norm))):
        raise FloatingPointError(
            f"step {step}: L_RL {rl_loss}, L_NTP {ntp_loss}, gradient norm {grad_norm}, expected finite numbers; the optimizer "
            "step was not taken; try a lower --learning-rate or --dtype float32"
        )


def open_evaluation(run: Run, session: Session, policy: Policy) -> Evaluation:
    """Mean loss and accuracy by tier over --eval-shards, as lines of evaluation.jsonl; nothing without them."""
    config, shared = run.config, run.config.train_config()
    loss = open_measure(shared, session, run.base, run.called, run.context, run.shards)
    measure = None
    if loss is not None:
        positions = held_out_positions(config, run.base, run.limits)

        def measure() -> dict[str, Any]:
            policy.give_weights()
            step = max(1, policy.done - config.format_steps)
            accuracy = measure_accuracy(config, positions, step, policy.sample, run.prompter, run.token_bytes)
            return {**loss(), **accuracy}

    return Evaluation(shared, session, measure, run.loss_model, run.layout.rounding(config.export_dtype))


def export_last(run: Run, session: Session, evaluation: Evaluation) -> None:
    """Write OUT/model, which makes the run finished, and note what its rounding costs."""
    config = run.config
    evaluation.require_of_export(config.num_steps)
    if not session.lease:
        return
    session.check_lease()
    record = partial(Exported(config.out, session.lease).add, MODEL, config.num_steps, config.export_dtype)
    rounding = export(
        run.base.model,
        run.layout,
        Gathered(run.loss_model, session.world),
        config.out / MODEL,
        config.export_dtype,
        run.shards,
        record,
    )
    for line in rounding_notes(rounding, *evaluation.first_and_last()):
        session.note(line)
