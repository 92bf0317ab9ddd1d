"""The dynamic token budget and the reward for keeping to it (RMT, arXiv 2509.24375)."""

import math


def budget_at(step: int, num_steps: int, first: int, least: int, decay: float) -> int:
    """Tokens of thought asked for in step 1..num_steps: B_t = max(B_min, floor(B_0 * g^(t / T))).

    first: B_0; least: B_min; decay: g, so that about g * B_0 tokens are left at the end.
    """
    # a hair more, since a whole number may come out a rounding below itself: 100 * 0.29 is 28.999..
    return max(least, math.floor(first * decay ** (step / num_steps) * (1 + 1e-12)))


def length_reward(thought_tokens: int, budget: int, most: float) -> float:
    """A line from 0 to `most` at `budget` tokens of thought, back to 0 at twice as many, and 0 beyond."""
    if thought_tokens <= budget:
        return most * thought_tokens / budget
    return max(0.0, most * (2 - thought_tokens / budget))
