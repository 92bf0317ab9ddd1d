"""Sizes and rates of the comparison; docs/lab-rmt.md says how they were chosen."""

from dataclasses import dataclass
from typing import Literal

from benchmarks.lab.recipe import Recipe

RmtSize = Literal["full", "small"]


@dataclass(frozen=True)
class RmtRecipe(Recipe):
    """That of the laboratory, for its problems, texts and base; and what reinforcement mid-training adds."""

    batch_rows: int = 16
    """Rows per step of every training: as many as a step of remit rmt has at most, one for each position."""
    pretraining_steps: int = 600
    midtraining_steps: int = 300
    """Of the reference before its SFT, and the steps for which the corpus has rows."""
    midtraining_learning_rate: float = 3e-3
    """Of NTP and ReMiT, and of the warm-up of the format."""
    sft_examples: int = 1000
    evaluations: int = 0
    exports: int = 0
    post_trained: tuple[str, ...] = ("rmt", "rpt", "ntp", "remit")

    format_steps: int = 150
    policy_steps: int = 200
    slow_policy_steps: int = 600
    """Of the arm whose budget shrinks by as much over more steps."""
    positions: int = 16
    """That a step reasons about."""
    generations: int = 8
    first_budget: int = 16
    budget_decay: float = 0.25
    policy_learning_rate: float = 2e-4
    eval_positions: int = 400
    """Held-out positions of each tier."""
    max_answer: int = 8
    """Tokens of a boxed answer."""


RECIPES: dict[RmtSize, RmtRecipe] = {
    "full": RmtRecipe(),
    "small": RmtRecipe(
        hidden_size=64, intermediate_size=128, layers=2, heads=2, pretraining_steps=200, midtraining_steps=100,
        sft_examples=256, format_steps=80, policy_steps=24, slow_policy_steps=72, eval_positions=150, problems=100, curve_problems=100, sampled=0,
        texts=50, post_trained=(),
    ),
}  # fmt: skip
