"""Settings of post-training, one dataclass per stage, checked once. Light to import."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from shards.output_folder import require_new_folder
from shards.ranges import require, require_at_least, require_not_negative, require_positive

OURS = {
    "output_dir", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "seed", "data_seed", "bf16",
    "fp16", "gradient_checkpointing", "logging_steps", "logging_strategy", "logging_first_step", "save_strategy",
    "save_steps", "save_total_limit", "report_to", "disable_tqdm", "max_length", "beta", "num_generations",
    "max_completion_length", "temperature", "use_vllm", "push_to_hub", "resume_from_checkpoint",
    "generation_batch_size", "steps_per_generation", "model_init_kwargs", "trust_remote_code", "save_only_model",
    "logging_nan_inf_filter",
}  # fmt: skip
"""Settings of TRL's trainers that options of ours, or how a run is resumed, decide."""


@dataclass(frozen=True, kw_only=True)
class PostTrainConfig:
    """What the three stages share."""

    model: str
    """Model to start from: a Hugging Face folder, or NAME or NAME@REVISION of the hub. No remote code is run."""
    data: Path
    """Examples, one JSON object per line."""
    out: Path
    """Folder for the metrics, checkpoints and the model; the same command again resumes."""
    max_steps: int | None = None
    """Optimizer steps; overrides --epochs."""
    epochs: float = 1.0
    """Passes over the examples."""
    batch_size: int = 32
    """Rows per optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Rows per forward pass of a process; less takes less memory. Default: its whole share of the step."""
    learning_rate: float = 2e-5
    """Peak of the learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up: stay at the peak, or fall to 0 by a line or a cosine."""
    warmup_steps: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """AdamW weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    max_length: int | None = None
    """Longest row, prompt and completion and end token, in tokens; longer ones are left out. Default: as many as the
    model has positions."""
    seed: int = 0
    """Decides the order of the examples and what is sampled."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; weights and optimizer stay in float32. auto: bfloat16 on a GPU, float32 elsewhere."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, and much less memory."""
    export_dtype: Literal["base", "float32", "bfloat16"] = "base"
    """Of the weights in OUT/model. base: of each tensor as in the start's files; rounding to bfloat16 takes most of what
    small learning rates change, which float32 keeps."""
    log_every: int = 1
    """Steps between lines of OUT/metrics.jsonl, which hold means over them."""
    checkpoint_every: int = 100
    """Steps between checkpoints, a multiple of --log-every; 0: none, and a killed run begins again."""
    trainer_arg: list[str] = field(default_factory=list)
    """Other settings of TRL's trainer, KEY=VALUE with the names of its config class, for instance adam_beta2=0.95."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "max_steps", "batch_size", "micro_batch_size", "log_every")
        require_at_least(self, 2, "max_length")
        require_at_least(self, 0, "warmup_steps", "weight_decay", "seed", "checkpoint_every")
        require_positive(self, "epochs", "learning_rate", "max_grad_norm")
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"--micro-batch-size is {self.micro_batch_size}, expected a divisor of --batch-size ({self.batch_size})"
            )
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"--checkpoint-every is {self.checkpoint_every}, expected a multiple of --log-every ({self.log_every})"
            )
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out}: is a file, expected a folder")
        require_new_folder(self.out, "post-training", model=self.model)
        self.trainer_args()

    def trainer_args(self) -> dict[str, Any]:
        """--trainer-arg as a mapping; values are read as YAML."""
        values = {}
        for entry in self.trainer_arg:
            key, equals, text = entry.partition("=")
            if not equals or not key:
                raise ValueError(f"--trainer-arg is {entry!r}, expected KEY=VALUE, for instance adam_beta2=0.95")
            if key in OURS:
                raise ValueError(f"--trainer-arg {entry}: {key} is decided by an option of this command; see --help")
            try:
                values[key] = yaml.safe_load(text)
            except yaml.YAMLError:
                raise ValueError(f"--trainer-arg {entry}: the value cannot be read as YAML") from None
            if isinstance(values[key], str):
                # YAML 1.1 takes 1e-8 for a text
                try:
                    values[key] = float(values[key])
                except ValueError:
                    pass
        return values


@dataclass(frozen=True, kw_only=True)
class SftConfig(PostTrainConfig):
    """Supervised fine-tuning: learn the completions, and to end after them. Data: {"prompt", "completion"}."""


@dataclass(frozen=True, kw_only=True)
class DpoConfig(PostTrainConfig):
    """Direct preference optimisation. Data: {"prompt", "chosen", "rejected"}; a row of a batch is one such pair."""

    learning_rate: float = 1e-6
    """Peak of the learning rate of AdamW."""
    beta: float = 0.1
    """How strongly the model is held to where it started from."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "beta")


@dataclass(frozen=True, kw_only=True)
class RlConfig(PostTrainConfig):
    """Reinforcement learning (GRPO) with a verifiable reward. Data: {"prompt", "answer"}; a row is a completion."""

    learning_rate: float = 1e-6
    """Peak of the learning rate of AdamW."""
    reward: str = "answer"
    """answer: 1 where the text after the last "Answer:" of the completion, up to the end of its line, is `answer`, else
    0. Or module:function, called as TRL calls reward functions, found from the current folder."""
    num_generations: int = 8
    """Completions of each prompt, compared with each other; --batch-size is a multiple of it."""
    max_completion_length: int = 256
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Of the sampling."""
    beta: float = 0.0
    """Weight of the KL divergence to the model that it starts from; 0: that model is not even loaded."""
    use_vllm: bool = False
    """Sample with vLLM, in this process, on a GPU."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward != "answer":
            module, colon, function = self.reward.partition(":")
            if not (module and colon and function):
                raise ValueError(f"--reward is {self.reward!r}, expected answer, or module:function")
        require(self, lambda number: number >= 2, "at least 2, to compare them", "num_generations")
        if self.batch_size % self.num_generations:
            raise ValueError(
                f"--batch-size is {self.batch_size}, expected a multiple of --num-generations ({self.num_generations})"
            )
        require_at_least(self, 1, "max_completion_length")
        require_positive(self, "temperature")
        require_not_negative(self, "beta")
