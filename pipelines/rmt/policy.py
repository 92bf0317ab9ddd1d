"""What a run samples with: the positions of a step, its budget, and engines with the weights as they are."""

import json
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch

from pipelines.rmt.budget import budget_at
from pipelines.rmt.curriculum import FORMAT, POLICY, draw
from pipelines.rmt.engine import Engines
from pipelines.rmt.grpo import Grpo
from pipelines.rmt.positions import Position
from pipelines.rmt.setup import POSITIONS, Run, distribution
from scorer.stopping import Stopped
from trainer.checkpoint import whole_weights
from trainer.session import Session


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
            self._grpo = Grpo(config, run.base.model, run.called, run.prompter.tokenizer, share, run.base.dtype)
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

        def load() -> None:
            if self._engines:
                self._engines.load(in_files(self._run, state))

        on_first(self._session, load)
        self.sync_seconds = perf_counter() - began

    def sample(self, *asked: Any) -> Any:
        """`Engines.sample`, on the first process; its answer, or what went wrong, on all."""
        engines = self._engines
        return on_first(self._session, lambda: engines and engines.sample(*asked))

    def budget(self, step: int) -> int | None:
        """Tokens of thought that the prompts of a step ask for."""
        config = self._run.config
        if config.budget == "off":
            return None
        of_policy = max(1, step - config.format_steps)
        return budget_at(of_policy, config.max_steps, config.first_budget, config.least_budget, config.budget_decay)


def on_first(session: Session, call: Callable[[], Any]) -> Any:
    """What `call` returns on the first process, on all of them. Where it raises there, all raise: the first as it is, the
    others a RuntimeError with its message, and Stopped where a signal ended it; they would wait for minutes otherwise."""
    world, value, raised = session.world, None, None
    if world.first:
        try:
            value = call()
        except Exception as error:
            raised = error
    # a signal may have ended Ray under it
    ended = raised is not None and (isinstance(raised, Stopped) or session.should_stop())
    said = None if raised is None else f"{type(raised).__name__}: {raised}"
    value, said, ended = world.from_first((value, said, ended))
    if raised is not None:
        raise raised
    if said is not None:
        raise Stopped(said) if ended else RuntimeError(f"the first process failed: {said}")
    return value


def in_files(run: Run, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Weights by their names in the base's files, float32: an engine reads these as it read the files."""
    found: dict[str, torch.Tensor] = {}
    for group in run.layout.groups:
        part = {name: state[name] for name in group}
        found |= {
            name: tensor.float().contiguous() for name, tensor in run.layout.as_stored(run.base.model, part).items()
        }
    return found
