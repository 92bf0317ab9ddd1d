"""The laboratory's sizes and rates, by size; mixes are in documents.py, arms in graph.py. docs/lab.md: how they were chosen."""

from dataclasses import dataclass
from typing import Literal

Size = Literal["full", "small", "tiny"]


@dataclass(frozen=True)
class Recipe:
    """One model, one set of data, one learning rate for all arms."""

    hidden_size: int = 128
    intermediate_size: int = 352
    layers: int = 3
    heads: int = 4
    vocab_size: int = 768
    seq_len: int = 256
    batch_rows: int = 4
    """Rows per optimizer step, in pre-training and mid-training."""

    pretraining_steps: int = 2400
    pretraining_learning_rate: float = 3e-3
    midtraining_steps: int = 600
    midtraining_learning_rate: float = 4e-3
    """Of every arm: from one sweep over the NTP arm, written down in docs/lab.md."""
    curated_steps: int = 200
    """Of the reference for RHO-1, which is trained on right solutions alone."""
    evaluations: int = 8
    """Times that the loss on held-out problems, texts and solutions, is measured within a mid-training."""
    exports: int = 8
    """Times that a model is written within a mid-training, to see how many tokens an arm needs."""

    sft_examples: int = 2000
    sft_learning_rate: float = 3e-4
    dpo_examples: int = 1000
    dpo_learning_rate: float = 3e-5
    rl_prompts: int = 2000
    rl_steps: int = 150
    rl_batch: int = 128
    rl_generations: int = 8
    rl_learning_rate: float = 2e-4
    top_k: int = 16
    """Tokens of the reference's distribution that distillation sees."""

    problems: int = 800
    """Held-out problems of each level."""
    sampled: int = 300
    """Of them those that are also solved by sampling."""
    curve_problems: int = 200
    """The same, of models in mid-run."""
    texts: int = 200
    """Held-out documents of each general text."""
    arms: tuple[str, ...] = (
        "remit", "remit2", "ntp-guided", "sft-guided", "rho1", "miniplm", "kd", "no-clip", "remit-rl10", "rkl",
        "switch",
    )  # fmt: skip
    """Beside NTP, which is always there."""
    post_trained: tuple[str, ...] = ("kd", "remit")
    """Arms that go through post-training, beside NTP."""


RECIPES: dict[Size, Recipe] = {
    "full": Recipe(),
    "small": Recipe(
        hidden_size=64, intermediate_size=128, layers=2, heads=2, pretraining_steps=80, midtraining_steps=80,
        curated_steps=20, evaluations=2, exports=0, sft_examples=128, dpo_examples=64, rl_prompts=64, rl_steps=10, rl_batch=32,
        problems=40, sampled=20, curve_problems=20, texts=30, post_trained=(),
        arms=("remit", "ntp-guided", "rho1", "miniplm", "kd", "no-clip", "rkl", "switch"),
    ),
    "tiny": Recipe(
        hidden_size=64, intermediate_size=64, layers=1, heads=2, pretraining_steps=10, midtraining_steps=10,
        curated_steps=2, evaluations=2, exports=2, sft_examples=32, dpo_examples=32, rl_prompts=8, rl_steps=2, rl_batch=16, problems=8,
        sampled=4, curve_problems=4, texts=5, arms=("remit", "ntp-guided"), post_trained=(),
    ),
}  # fmt: skip
