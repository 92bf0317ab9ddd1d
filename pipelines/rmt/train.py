"""remit rmt: each step reasons about some positions (GRPO) and predicts the others (NTP), L = L_RL + lambda * L_NTP.

In: scored shards with entropies, a base model. Out: OUT/metrics.jsonl, OUT/positions.jsonl (the positions of each step),
OUT/evaluation.jsonl, OUT/checkpoints/ and, at the end, OUT/model. The same command again goes on from the newest valid
checkpoint. The first --format-steps steps, if any, learn the format of a rollout instead of L_RL.
"""

import contextlib
import json
import math
from collections.abc import Sequence
from functools import partial
from time import perf_counter
from typing import Any

import torch

from pipelines.rmt.answers import information_gain
from pipelines.rmt.budget import budget_at, length_reward
from pipelines.rmt.curriculum import FORMAT, POLICY, draw
from pipelines.rmt.engine import Engines
from pipelines.rmt.evaluation import held_out_positions, measure_accuracy, thought_limit
from pipelines.rmt.figures import rollout_figures
from pipelines.rmt.grpo import Grpo, Scored
from pipelines.rmt.model import target_logprobs
from pipelines.rmt.positions import Position, rows_without
from pipelines.rmt.rollouts import Rollout, Shape, outcome, sample_rollouts
from pipelines.rmt.settings import RmtConfig
from pipelines.rmt.setup import POSITIONS, Run, distribution, tier_names
from pipelines.rmt.warmup import format_budgets, format_rows
from shards.output_folder import MODEL
from trainer.batch import Row, collate
from trainer.checkpoint import whole_weights
from trainer.config import learning_rate_at
from trainer.data import GlobalBatch
from trainer.distributed import World, accumulate_only, scalar
from trainer.evaluation import Evaluation, open_measure
from trainer.export import export
from trainer.exported import Exported, rounding_notes
from trainer.loggers import open_loggers
from trainer.loss_model import peak_memory_bytes
from trainer.objectives.ntp import NTP
from trainer.session import Session
from trainer.statistics import StepStatistics
from trainer.train import is_due

FORMAT_NTP_WEIGHT = 1.0


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
            grad_norm = scalar(torch.nn.utils.clip_grad_norm_(run.loss_model.parameters(), config.max_grad_norm))
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
            session.progress(step, config.num_steps, metrics)
            if stopping:
                return False
    export_last(run, session, evaluation)
    return True


class Policy:
    """What the steps and the evaluations sample with: the engines, which the first process alone has."""

    def __init__(self, run: Run, session: Session, engines: Engines | None) -> None:
        self._run, self._session, self._engines = run, session, engines
        self._grpo: Grpo | None = None
        self.sync_seconds, self.done = 0.0, run.first_step

    @property
    def grpo(self) -> Grpo:
        """TRL's part, made when it is first needed."""
        if self._grpo is None:
            run, config, world = self._run, self._run.config, self._session.world
            share = config.positions_per_step // world.size * config.num_generations
            self._grpo = Grpo(
                config, run.base.model, run.called, run.prompter.tokenizer, share, world.size, run.base.dtype,
                config.out / "trl",
            )  # fmt: skip
        return self._grpo

    def draw(self, step: int) -> list[Position]:
        """The set C of a step, the same on all processes; noted in OUT/positions.jsonl."""
        run, config = self._run, self._run.config
        counts, is_format = run.index.counts, step <= config.format_steps
        of_policy = 1 if is_format else step - config.format_steps
        drawn = draw(
            config.seed, step if is_format else of_policy, distribution(config, counts, of_policy), counts,
            config.positions_per_step, FORMAT if is_format else POLICY,
        )  # fmt: skip
        positions = [run.reader.position(each) for each in drawn]
        if self._session.lease:
            line = {
                "step": step,
                "positions": [[position.row, position.place, position.tier] for position in positions],
            }
            with open(config.out / POSITIONS, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        return positions

    def takes_weights(self, step: int) -> bool:
        """Whether the engines get new weights before this step; in the warm-up they keep the base's."""
        config = self._run.config
        return step > config.format_steps and ((step - 1) % config.sync_every == 0 or step == config.format_steps + 1)

    def give_weights(self) -> None:
        """Bring the engines to the weights as they are. All processes take part."""
        began = perf_counter()
        state = whole_weights(self._run.loss_model)
        if self._engines:
            self._engines.load(in_files(self._run, state))
        self.sync_seconds = perf_counter() - began

    def sample(self, *asked: Any) -> Any:
        """`Engines.sample`, on the first process; its answer, or what went wrong, on all."""
        found = self._engines.sample(*asked) if self._engines else None
        return self._session.world.from_first(found)

    def budget(self, step: int) -> int | None:
        """Tokens of thought that the prompts of a step ask for."""
        config = self._run.config
        if config.budget == "off":
            return None
        of_policy = max(1, step - config.format_steps)
        return budget_at(of_policy, config.max_steps, config.first_budget, config.least_budget, config.budget_decay)


def in_files(run: Run, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by their names in the base's files, float32: an engine reads these as it read the files."""
    found: dict[str, torch.Tensor] = {}
    for group in run.layout.groups:
        part = {name: state[name] for name in group}
        found |= {
            name: tensor.float().contiguous() for name, tensor in run.layout.as_stored(run.base.model, part).items()
        }
    return found


def learn_policy(
    run: Run, session: Session, policy: Policy, step: int, positions: Sequence[Position]
) -> tuple[float, dict[str, Any]]:
    """Gradients of L_RL; its value and the figures of the rollouts. All processes take part."""
    config, world = run.config, session.world
    policy.sync_seconds = 0.0
    if policy.takes_weights(step):
        policy.give_weights()
    budget = policy.budget(step)
    prompts = [run.prompter.prompt(position.prefix_ids, budget) for position in positions]
    shape = Shape(
        config.num_generations, thought_limit(config, run.prompter, budget), config.answer, config.max_answer,
        config.temperature,
    )  # fmt: skip
    began = perf_counter()
    seed = (config.seed * 1_000_003 + step) % (1 << 40)
    groups = sample_rollouts(policy.sample, prompts, shape, run.token_bytes, seed)
    sampled = perf_counter() - began
    scored = score(run, world, positions, groups, budget)
    own = [entry for group in scored[world.rank :: world.size] for entry in group]
    total = 0.0
    batches = policy.grpo.batches(own)
    for index, batch in enumerate(batches):
        with exchanged(run, index == len(batches) - 1 and not config.ntp_weight):
            loss = policy.grpo.loss(batch)
            loss.backward()
        total += loss.item()
    rl_loss = world.sum(torch.tensor(total)).item() / world.size
    probabilities = distribution(config, run.index.counts, step - config.format_steps)
    figures = rollout_figures(scored, positions, tier_names(config), budget)
    figures |= {"tier_probabilities": dict(zip(tier_names(config), probabilities.tolist(), strict=True))}
    figures |= {"rollout_seconds": sampled, "sync_seconds": policy.sync_seconds, **policy.grpo.metrics()}
    return rl_loss, figures


def score(
    run: Run, world: World, positions: Sequence[Position], groups: Sequence[Sequence[Rollout]], budget: int | None
) -> list[list[Scored]]:
    """The rewards of all rollouts, on all processes; what the model has to be asked for each asks for its share."""
    config = run.config
    if config.reward == "gain":
        own = list(zip(positions, groups, strict=True))[world.rank :: world.size]
        # closed or not: the true token is scored where the thought ends
        sequences = [
            [*rollout.prompt_ids, *rollout.completion_ids, *closing(run, rollout), position.target]
            for position, group in own
            for rollout in group
        ]
        logprobs = world.gather(torch.tensor(target_logprobs(run.base, sequences, config.micro_batch_size)))
        by_rank = logprobs.view(world.size, -1, config.num_generations)
        found = [by_rank[number % world.size, number // world.size].tolist() for number in range(len(positions))]
        outcomes = [
            [information_gain(logprob, position.baseline) for logprob in group]
            for position, group in zip(positions, found, strict=True)
        ]
    else:
        outcomes = [
            [outcome(rollout, position, config.answer, run.token_bytes) for rollout in group]
            for position, group in zip(positions, groups, strict=True)
        ]
    return [
        [
            Scored(rollout, value, length_part(rollout, budget, config.length_most))
            for rollout, value in zip(group, values, strict=True)
        ]
        for group, values in zip(groups, outcomes, strict=True)
    ]


def closing(run: Run, rollout: Rollout) -> list[int]:
    """The closing tag, where a thought that was cut off lacks it."""
    return [] if rollout.completion.closed else run.prompter.close_ids


def length_part(rollout: Rollout, budget: int | None, most: float) -> float:
    """The length's reward; a thought that does not end keeps to no budget."""
    if budget is None or not rollout.completion.closed:
        return 0.0
    return length_reward(rollout.completion.thought_tokens, budget, most)


def learn_format(
    run: Run, session: Session, policy: Policy, step: int, positions: Sequence[Position]
) -> tuple[float, dict[str, Any]]:
    """Gradients of the next-token loss of the warm-up's rows; its value and figures. All processes take part."""
    config, world = run.config, session.world
    began = perf_counter()
    several = [position for position in positions for _ in range(config.num_generations)]  # as much as in other steps
    budgets = format_budgets(config, step, len(several))
    rows = format_rows(
        policy.sample, several, budgets, run.prompter, config.budget == "on", config.temperature,
        (config.seed * 1_000_003 + step) % (1 << 40),
    )  # fmt: skip
    sampled = perf_counter() - began
    predicted = sum(int(row.predicted.sum()) for row in rows)
    statistics = StepStatistics(world.device, run.sources.group, NTP.figures)
    batches = GlobalBatch(rows[world.rank :: world.size], len(rows), 0.0).micro_batches(
        config.micro_batch_size, world.size
    )
    for batch in batches:
        with exchanged(run, is_last=False):  # those of the other positions come after
            run.called(collate(batch, "packed", world.device), NTP, predicted, world.size, statistics).backward()
    world.sum(statistics.table)
    prompt_tokens = sum(len(row.input_ids) for row in rows) - predicted
    figures = {"budget": None, "prompt_tokens": prompt_tokens, "rollout_tokens": predicted, "rollout_seconds": sampled}
    return statistics.sums["loss"] / predicted, figures


def learn_others(
    run: Run, session: Session, rows: Sequence[Row], weight: float, statistics: StepStatistics
) -> dict[str, Any]:
    """Gradients of weight * L_NTP over the rows, of which the step's positions are not predicted; its figures."""
    config, world = run.config, session.world
    predicted = sum(int(row.predicted.sum()) for row in rows)
    batches = GlobalBatch(list(rows[world.rank :: world.size]), len(rows), 0.0)
    micro_batches = batches.micro_batches(config.micro_batch_size, world.size)
    for index, batch in enumerate(micro_batches):
        with exchanged(run, index == len(micro_batches) - 1):
            scale = world.size * weight  # DDP averages over the processes, which the factor makes a sum
            run.called(run.collate(batch), NTP, max(1, predicted), scale, statistics).backward()
    world.sum(statistics.table)
    if not predicted:
        return {"loss": 0.0}
    figures = statistics.metrics(run.sources)
    wanted = ("predicted_tokens", "ntp_loss")
    sources = {name: {key: values[key] for key in wanted} for name, values in figures["sources"].items()}
    return {"loss": figures["ntp_loss"], "predicted_tokens": figures["predicted_tokens"], "sources": sources}


def exchanged(run: Run, is_last: bool) -> Any:
    """Context of a backward pass: the processes exchange their gradients in the last one of a step."""
    return contextlib.nullcontext() if is_last else accumulate_only(run.called)


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
        positions = held_out_positions(config, run.base)

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
    state = whole_weights(run.loss_model)
    if not session.lease:
        return
    session.check_lease()
    record = partial(Exported(config.out, session.lease).add, MODEL, config.num_steps, config.export_dtype)
    rounding = export(run.base.model, run.layout, state, config.out / MODEL, config.export_dtype, run.shards, record)
    for line in rounding_notes(rounding, *evaluation.first_and_last()):
        session.note(line)
