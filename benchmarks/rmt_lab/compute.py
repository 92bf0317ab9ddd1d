"""What the trainings cost, in one unit: forwards of one token by the model, which all arms share.

A forward costs 1, a forward with its backward 3. Attention costs more in longer texts, and padding is computed too: neither is
counted. So this is the arithmetic that the methods ask for, not the time that they took.
"""

from collections.abc import Iterable, Mapping
from typing import Any

FORWARD, TRAINED = 1, 3
SCORED_AGAIN = 1
"""TRL asks the model once more for the log-probs of all rollouts, to weigh the engine's."""


def rmt_step(line: Mapping[str, Any], generations: int, tokens_before: int) -> int:
    """Of one line of the metrics of remit rmt. tokens_before: its `tokens` in the line before.

    The engine computes a position's prompt once for all its rollouts, the trainer once for each.
    """
    prompt, sampled = int(line["prompt_tokens"]), int(line["rollout_tokens"])
    others = int(line["tokens"]) - tokens_before - prompt - sampled  # of the rows that are learned by next-token loss
    engine = FORWARD * (prompt // generations + sampled)
    again = SCORED_AGAIN if line["phase"] == "policy" else 0
    return engine + (TRAINED + again) * (prompt + sampled) + TRAINED * others


def rmt_compute(metrics: Iterable[Mapping[str, Any]], generations: int) -> int:
    """Of a whole run, its warm-up included."""
    total, before = 0, 0
    for line in metrics:
        total += rmt_step(line, generations, before)
        before = int(line["tokens"])
    return total


def train_compute(steps: int, tokens_per_step: int) -> int:
    return TRAINED * steps * tokens_per_step


def equal_steps(compute: int, tokens_per_step: int) -> int:
    """The steps of next-token prediction that come nearest to `compute`, at least one."""
    return max(1, round(compute / train_compute(1, tokens_per_step)))
