"""Settings of remit rmt, checked once. Light to import. docs/rmt.md says why the defaults are what they are."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.rmt.prompts import Answer
from shards.output_folder import require_new_folder
from shards.ranges import require, require_at_least, require_not_negative, require_positive
from trainer.config import TrainConfig

Tiers = tuple[float, float, float]
TIERS = ("below", "easy", "medium", "hard")


@dataclass(frozen=True, kw_only=True)
class RmtConfig:
    """Reinforcement mid-training: think before some tokens of the shards, predict all others."""

    shards: str
    """Shard folder with the entropy of the reference (remit score --entropy)."""
    model: str
    """Base model: a Hugging Face folder, or NAME or NAME@REVISION of the hub. No remote code is run."""
    out: Path
    """Folder for metrics, checkpoints and the trained model; the same command again resumes."""
    reference: str = "rl"
    """Name of the reference whose stored entropy says how difficult a position is."""
    max_steps: int = 1000
    """Optimizer steps of the reinforcement learning, T."""

    curriculum: Literal["tiers", "filter", "off"] = "tiers"
    """tiers: easy, medium and hard positions by a distribution that changes (RMT). filter: all positions from the first
    threshold up alike (RPT). off: all positions alike, whatever their entropy."""
    thresholds: Tiers = (0.5, 1.0, 1.5)
    """Least entropy, in nats, of an easy, a medium and a hard position; what is below is never drawn."""
    first_distribution: Tiers = (0.6, 0.3, 0.1)
    """Probabilities of easy, medium, hard until 30 % of the steps (p_1); from there a line to --last-distribution."""
    last_distribution: Tiers = (0.1, 0.3, 0.6)
    """Probabilities of easy, medium, hard from 70 % of the steps on (p_2)."""
    positions_per_step: int = 128
    """Positions that a step reasons about, |C|."""

    budget: Literal["on", "off"] = "on"
    """on: the prompt asks for B_t tokens of thought, and the reward has a part for their number (RMT). off: neither."""
    first_budget: int = 800
    """Tokens of thought asked for at first, B_0; without a budget half of the most that are sampled."""
    least_budget: int = 1
    """Fewest tokens of thought asked for, B_min."""
    budget_decay: float = 0.2
    """The budget falls by this factor over the steps, g."""
    reward: Literal["match", "prefix", "gain"] = "match"
    """match: the token after the thought is the true one (RMT). prefix: the boxed answer is the beginning of the true
    text, byte for byte, and ends where a token ends (RPT). gain: how much more probable, in nats, the thought makes the
    true token than the frozen base of --baseline finds it (RLP)."""
    baseline: str | None = None
    """For --reward gain: name under which the base itself scored the shards."""
    length_weight: float = 0.2
    """Weight w of the length's part of the reward: (1 - w) * match + w * length."""
    length_most: float = 1.0
    """The length's part where the thought has exactly as many tokens as the budget, r_max."""

    num_generations: int = 8
    """Rollouts of each position, compared with each other, G."""
    temperature: float = 0.8
    """Of the sampling."""
    max_prefix: int | None = None
    """Tokens of the document before a position that its prompt has at most, the last ones. Default: as many as the
    model's positions leave beside the longest thought, at most 4,096."""
    max_answer: int = 32
    """Tokens after the thought at most, where the answer is boxed."""
    prompt: Literal["auto", "chat", "plain"] = "auto"
    """chat: an instruction through the tokenizer's chat template; plain: the text with a budget and a tag behind it.
    auto: chat where the tokenizer has a template."""
    sync_every: int = 1
    """Steps after which the engines get the new weights."""
    num_engines: int = 1
    """vLLM engines that sample; each has --tensor-parallel-size GPUs, or its share of the cores."""
    tensor_parallel_size: int = 1
    """GPUs of one engine."""
    engine_memory: float = 0.4
    """Share of a GPU's memory that an engine takes, since the training may be on the same one."""
    clip: float = 0.2
    """GRPO clips the ratio of probabilities to 1 - clip .. 1 + clip."""
    kl: float = 0.0
    """Weight of the KL divergence to the base, beta; 0: a copy of the base is not even loaded."""
    loss_type: Literal["grpo", "dapo", "dr_grpo"] = "grpo"
    """How TRL averages over tokens: within each rollout first (grpo), or one of its variants. Its bnpo is left out: it
    divides by the tokens of a micro-batch, so that what is learned would depend on --micro-batch-size."""

    ntp_weight: float = 0.1
    """Weight lambda of the next-token loss over all other positions of the step's rows; 0: without it."""
    format_steps: int = 0
    """Steps of supervised warm-up before the first of --max-steps, for a base that does not know the format: thoughts that
    it samples itself, of as many tokens as the prompt asks for, followed by the true answer."""
    format_learning_rate: float = 1e-4
    """Learning rate of these steps."""

    learning_rate: float = 1e-6
    """Peak of the learning rate of AdamW."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """After the warm-up: stay at the peak, or fall to a tenth of it."""
    warmup_steps: int = 0
    """Steps of linear warm-up of the learning rate."""
    weight_decay: float = 0.0
    """AdamW weight decay, on matrices only."""
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batch_size: int = 8
    """Rows, or rollouts, per forward pass of a process."""
    seed: int = 0
    """Decides which positions are drawn, and what is sampled."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; weights and optimizer stay in float32. auto: bfloat16 on a GPU, float32 elsewhere."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, and much less memory."""
    checkpoint_every: int = 50
    """Steps between checkpoints, a multiple of --sync-every, and one after the last step; 0: none."""
    keep_checkpoints: int = 2
    """The newest so many checkpoints are kept."""
    export_dtype: Literal["base", "float32", "bfloat16"] = "base"
    """Of the weights in OUT/model. base: of each tensor as in the base's files; rounding to bfloat16 takes most of what
    small learning rates change, which float32 keeps."""
    eval_shards: str | None = None
    """Held-out shard folder with the entropy of the same reference: next-token accuracy by tier, with and without a
    thought, and the mean loss go to evaluation.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step."""
    eval_positions: int = 64
    """Held-out positions of each tier."""
    timeout_seconds: float = 1800.0
    """How long a process waits for the others, and for the engines, before it gives up."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases; WANDB_MODE=offline: to OUT/wandb."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks, and what the engines print."""

    def __post_init__(self) -> None:
        require_new_folder(self.out, "remit rmt", shards=self.shards, eval_shards=self.eval_shards, model=self.model)
        require_at_least(self, 1, "max_steps", "positions_per_step", "first_budget", "least_budget", "max_prefix")
        require_at_least(self, 1, "max_answer", "sync_every", "num_engines", "tensor_parallel_size", "micro_batch_size")
        require_at_least(self, 1, "keep_checkpoints", "eval_positions")
        require(self, lambda number: number >= 2, "at least 2, to compare them", "num_generations")
        require_positive(self, "temperature", "timeout_seconds", "max_grad_norm", "length_most", "format_learning_rate")
        require_not_negative(self, "kl", "ntp_weight", "format_steps", "learning_rate", "warmup_steps", "weight_decay")
        require_not_negative(self, "seed", "checkpoint_every", "eval_every")
        require(self, lambda share: 0 < share <= 1, "a factor above 0, up to 1", "budget_decay")
        require(self, lambda share: 0 <= share < 1, "a weight from 0, below 1", "length_weight")
        require(self, lambda share: 0 < share < 1, "a share above 0, below 1", "clip", "engine_memory")
        rising = 0 < self.thresholds[0] < self.thresholds[1] < self.thresholds[2] < math.inf
        if not rising:
            raise ValueError(
                f"--thresholds are {_numbers(self.thresholds)}, expected three rising numbers above 0, in nats"
            )
        for name in ("first_distribution", "last_distribution"):
            shares: Tiers = getattr(self, name)
            if not (all(share >= 0 for share in shares) and abs(sum(shares) - 1) <= 1e-6):  # NaN fails both
                raise ValueError(
                    f"--{name.replace('_', '-')} is {_numbers(shares)}, expected three probabilities that sum to 1"
                )
        if self.least_budget > self.first_budget:
            raise ValueError(
                f"--least-budget is {self.least_budget}, expected at most --first-budget ({self.first_budget})"
            )
        if (self.reward == "gain") != (self.baseline is not None):
            raise ValueError(
                f"--baseline is {self.baseline!r} with --reward {self.reward}, expected the name under which the base scored "
                "the shards with --reward gain, and none otherwise"
            )
        if self.checkpoint_every % self.sync_every:
            raise ValueError(
                f"--checkpoint-every is {self.checkpoint_every}, expected a multiple of --sync-every ({self.sync_every}): a run "
                "goes on where the engines get new weights"
            )
        if self.eval_every % self.sync_every:
            raise ValueError(
                f"--eval-every is {self.eval_every}, expected a multiple of --sync-every ({self.sync_every}): an evaluation gives "
                "the engines new weights"
            )
        self.train_config()

    @property
    def answer(self) -> Answer:
        """What a completion has after its thought."""
        forms: dict[str, Answer] = {"match": "token", "prefix": "boxed", "gain": "none"}
        return forms[self.reward]

    @property
    def most_thought(self) -> int:
        """Most tokens of a thought in any step: twice the first budget, beyond which the length earns nothing."""
        return 2 * self.first_budget

    @property
    def most_answer(self) -> int:
        """Most tokens after the thought."""
        return self.max_answer if self.answer == "boxed" else 1

    @property
    def num_steps(self) -> int:
        """All optimizer steps, those of the warm-up first."""
        return self.format_steps + self.max_steps

    def train_config(self) -> TrainConfig:
        """The same, as the parts of remit train want it that this command shares."""
        return TrainConfig(
            shards=(self.shards,),
            model=self.model,
            out=self.out,
            objective="ntp",
            reference=self.reference,
            max_steps=self.max_steps,
            global_batch_size=self.positions_per_step,
            micro_batch_size=self.micro_batch_size,
            learning_rate=self.learning_rate,
            schedule=self.schedule,
            min_learning_rate=self.learning_rate / 10,
            warmup_steps=self.warmup_steps,
            weight_decay=self.weight_decay,
            decay_embeddings=True,  # as transformers' Trainer does, on which TRL builds
            beta1=self.beta1,
            beta2=self.beta2,
            max_grad_norm=self.max_grad_norm,
            seed=self.seed,
            dtype=self.dtype,
            sharding="replicate",
            activation_checkpointing=self.activation_checkpointing,
            compile="off",
            checkpoint_every=self.checkpoint_every,
            keep_checkpoints=self.keep_checkpoints,
            export_dtype=self.export_dtype,
            eval_shards=self.eval_shards,
            eval_every=self.eval_every,
            timeout_seconds=self.timeout_seconds,
            wandb_project=self.wandb_project,
        )


def _numbers(values: Tiers) -> str:
    return " ".join(f"{value:g}" for value in values)
