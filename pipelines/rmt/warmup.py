"""The step that the papers leave out: teach a base the format of a rollout, on text that it samples itself.

In: positions. Out: trainer rows whose predicted part is a thought, the closing tag and the true answer. The thought is
what the base, not yet trained, writes after the text; it has as many tokens as the prompt asks for.
"""

from collections.abc import Sequence

import numpy as np

from pipelines.rmt.budget import budget_at
from pipelines.rmt.engine import Sampler, Sampling
from pipelines.rmt.positions import Position
from pipelines.rmt.prompts import Prompter
from pipelines.rmt.settings import RmtConfig
from trainer.batch import Row


def format_budgets(config: RmtConfig, step: int, count: int) -> list[int]:
    """Tokens of thought for each position of a warm-up step: evenly between the first and the last budget of the run."""
    last = budget_at(1, 1, config.first_budget, config.least_budget, config.budget_decay)
    random = np.random.default_rng([config.seed, step, 3])
    budgets: list[int] = random.integers(last, config.first_budget + 1, size=count).tolist()
    return budgets


def format_rows(
    sample: Sampler,
    positions: Sequence[Position],
    budgets: Sequence[int],
    prompter: Prompter,
    with_budget: bool,
    temperature: float,
    seed: int,
) -> list[Row]:
    """A row for each position."""
    prefixes = [list(position.prefix_ids[-prompter.max_prefix :]) for position in positions]
    wanted = [Sampling(1, budget, temperature) for budget in budgets]
    thoughts = sample(prefixes, wanted, seed)
    rows = []
    for position, (thought,) in zip(positions, thoughts, strict=True):
        ids = [index for index in thought.token_ids if index not in prompter.end_ids]
        prompt = prompter.prompt(position.prefix_ids, max(1, len(ids)) if with_budget else None)
        rows.append(format_row(prompt, [*ids, *prompter.close_ids, *prompter.answer_ids(position.target)]))
    return rows


def format_row(prompt: Sequence[int], completion: Sequence[int]) -> Row:
    """A row of which the completion alone is predicted."""
    input_ids = np.array([*prompt, *completion], dtype=np.int32)
    predicted = np.arange(len(input_ids)) >= max(1, len(prompt))
    return Row("a warm-up row", 0, input_ids, np.array([len(input_ids)], dtype=np.int32), predicted, {})
