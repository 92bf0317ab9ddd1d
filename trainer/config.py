"""Settings of remit train, checked once, and the learning rate that follows from them."""

import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import tyro

from shards.output_folder import require_new_folder
from shards.ranges import require, require_at_least, require_not_negative, require_positive
from trainer.mixture import Mixture, given_mixture
from trainer.objectives.settings import ObjectiveSettings
from trainer.option_text import check_eval_device, check_mirror, parse_average, parse_on_nonfinite, parse_steps

LOWEST = 1e-7


@dataclass(frozen=True)
class TrainConfig(ObjectiveSettings):
    """Mid-train a base model from annotated shards."""

    shards: tuple[str, ...] = ()
    """Shard folder with the log-probs of the reference; or several, each with its weight: A=0.7 B=0.3. Shares are of the tokens."""
    model: str = tyro.MISSING
    """Base model: a Hugging Face folder, or NAME or NAME@REVISION (branch, tag or commit) of the hub."""
    out: Path = tyro.MISSING
    """Folder for metrics, checkpoints and the trained model; the same command again resumes."""
    mix: Path | None = None
    """In place of --shards: YAML file that describes a mixture of shard folders, with weights, max_epochs and stages."""
    reference: str = "rl"
    """Name of the reference whose stored log-probs the objective reads (the --name of remit score)."""
    leave_out: Literal["any", "reference"] = "any"
    """Rows that could not be scored train on nothing: those of any reference of the folder, so that runs with different
    objectives and references train on the same rows, or those of --reference alone (none with ntp)."""
    context: Literal["auto", "packed", "document"] = "auto"
    """Attention over the whole row or within each document; auto: as the reference was scored."""
    max_steps: int | None = None
    """Optimizer steps; overrides --epochs. A mixture needs them, since it has no end of its own. A larger number lets a run go
    on where its --schedule allows it."""
    epochs: float = 1.0
    """Passes over the rows of one folder."""
    global_batch_size: int = 64
    """Rows per optimizer step."""
    micro_batch_size: int = 1
    """Rows per forward pass; more is faster and takes more memory, the result is the same (but for --scope micro, and what
    --router-aux-loss balances)."""
    learning_rate: float = 3e-4
    """Peak of the learning rate."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """After the warm-up: fall to --min-learning-rate by a cosine or a line; stay at the peak and fall in the last
    --decay-fraction of the steps (wsd: warm-up, stable, decay); or stay constant."""
    decay_fraction: float = 0.2
    """Share of the steps in which the learning rate of --schedule wsd falls, along a line."""
    min_learning_rate: float = LOWEST
    """Learning rate at the last step, or --learning-rate where that is less; 0: it falls to nothing."""
    warmup_steps: int | None = None
    """Steps of linear warm-up; default: 1 % of the steps."""
    weight_decay: float = 0.1
    """AdamW weight decay, on matrices only."""
    decay_embeddings: bool = False
    """Weight decay on the input embedding too. OLMo 2, Olmo 3 and SmolLM3 spare it, and with it a head that is tied to it; an
    output embedding of its own decays like any matrix."""
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    z_loss: float = 0.0
    """Coefficient of the mean square of the softmax's log-normaliser, added to the loss so that logits do not drift; OLMo 2
    and Olmo 3: 1e-5. 0: without."""
    skip_spikes: float | None = None
    """Leave out the update of a step whose loss or gradient norm is more than so many standard deviations above the mean of
    the 128 steps before it; OLMo-core: 6. Default: never."""
    average: str | None = None
    """Also export the mean of the weights of several steps, to OUT/model-average: last:N, of the last N steps, or
    ema:DECAY, an exponential moving average, as ema:0.999."""
    on_nonfinite: str = "stop"
    """Where a loss or a gradient is not finite: stop, or skip:N, leave out the update and stop after N such steps in a row."""
    skip_steps: tuple[str, ...] = ()
    """Steps that train on nothing and whose rows are not read, such as 9001..9002, for a batch that a run cannot get over; a
    resume may add some."""
    resume_from: Path | None = None
    """Begin with weights and optimizer of a checkpoint of another run, RUN/checkpoints/step-000100, and go on after its step,
    for instance to let the learning rate fall from there."""
    seed: int = 0
    """Decides the order of the rows, together with the epoch."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; weights and optimizer stay in float32. auto: bfloat16 on a GPU, float32 elsewhere."""
    float8: bool = False
    """Matrix products of the decoder layers' linear layers in 8 bit (torchao; in your checkout of remit: pip install '.[float8]'), on
    GPUs that have it, Ada, Hopper and newer; the head stays in bfloat16. Part of what a run is."""
    float8_emulated: bool = False
    """With --float8: round to 8 bit and multiply in float32, slowly, on any device."""
    router_aux_loss: float | None = None
    """For a base with experts: coefficient of the loss that balances their load, which transformers calls aux_loss; 0:
    without. Such a base is refused while this is not given."""
    sharding: Literal["auto", "replicate", "full", "hybrid"] = "auto"
    """With several processes: a replica on each (DDP), weights sharded over all (FSDP2), or sharded within a machine
    and replicated across machines. auto: the first that fits into memory by the formula of remit plan, of replicas (up to 1.5B
    parameters), hybrid (on several machines) and full."""
    activation_checkpointing: bool = False
    """Compute activations again in the backward pass: slower, and much less memory for long rows."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of the decoder layers; auto: on a GPU."""
    deterministic: bool = False
    """On a GPU: the same bits from the same step, whatever process makes it, so that a resumed run equals an
    undisturbed one bit for bit, and not only up to the order of additions; some 13 % slower. A CPU needs no such
    setting."""
    checkpoint_every: int = 500
    """Steps between checkpoints, and one after the last step; 0: none."""
    keep_checkpoints: int = 2
    """The newest so many checkpoints are kept."""
    mirror: str | None = None
    """Also copy checkpoints and exports to this folder of an object store (s3://, gs://) or disk, beside the training; a run whose
    --out has no checkpoint and no model goes on from there. An --out that is behind it is refused."""
    export_every: int = 0
    """Steps between models in mid-run, OUT/exports/step-000100 and so on, as Hugging Face folders; 0: only OUT/model."""
    export_dtype: Literal["base", "float32", "bfloat16"] = "base"
    """Of the weights in the exported models. base: of each tensor as in the base's files, so that a model that was not
    trained is the base; rounding to bfloat16 takes a part of a short training, which float32 keeps."""
    ray_workers: int = 0
    """Have Ray Train start so many processes, on the cluster of RAY_ADDRESS; 0: this process, or those of torchrun."""
    timeout_seconds: float = 600.0
    """How long a process waits for the others before it gives up."""
    eval_shards: str | None = None
    """Held-out shard folder, whose mean loss goes to evaluation.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0: only before the first and after the last step, if --eval-shards is given."""
    eval_tasks: str | None = None
    """Also evaluate the base and models of the run on tasks, beside the training, into OUT/tasks.jsonl: suites or tasks as remit eval
    has them, with commas between (paper,recall), or a YAML file with options of remit eval (its --config)."""
    eval_tasks_every: int = 0
    """Steps between models that --eval-tasks evaluates; they are deleted then, but for those of --export-every. 0: only the base and
    the last one."""
    eval_device: str = "auto"
    """Where --eval-tasks computes: cpu, cuda or cuda:N (N as torch counts). auto: a GPU that the training does not use, else the
    CPU."""
    wandb_project: str | None = None
    """Also log to this project of Weights & Biases (in your checkout of remit: pip install '.[wandb]'); WANDB_MODE=offline: to OUT/wandb."""
    profile: int | None = None
    """Write a profile of this step to OUT/profile, a trace that Perfetto and chrome://tracing show."""
    prometheus: Path | None = None
    """Keep the metrics of the newest step in this file, in the text format of Prometheus, for the textfile collector of its
    node exporter."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    @cached_property
    def mixture(self) -> Mixture:
        """The folder or folders that train; ValueError where a file of --mix does not describe any."""
        mixture = given_mixture(self.shards, self.mix)
        for folder in mixture.folders:
            require_new_folder(self.out, "remit train", shards=folder)
        if mixture.is_mixed and self.epochs != 1:
            raise ValueError(
                f"--epochs is {self.epochs:g}, and a mixture has no passes of its own; give --max-steps, and max_epochs to "
                "sources that must not be repeated more"
            )
        return mixture

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.shards, str | Path):
            object.__setattr__(self, "shards", (str(self.shards),))
        if self.mix is None or self.shards:  # a file is read when it is asked for
            _ = self.mixture
        require_new_folder(self.out, "remit train", eval_shards=self.eval_shards, model=self.model)
        require_at_least(self, 1, "global_batch_size", "micro_batch_size", "keep_checkpoints", "max_steps", "profile")
        require_positive(self, "max_grad_norm", "epochs", "timeout_seconds", "skip_spikes")
        require_not_negative(self, "learning_rate", "min_learning_rate", "weight_decay", "warmup_steps")
        require_not_negative(self, "checkpoint_every", "export_every", "eval_every", "seed", "ray_workers", "z_loss")
        require_not_negative(self, "eval_tasks_every")
        check_eval_device(self.eval_device, self.ray_workers)
        if self.eval_tasks is None and (self.eval_tasks_every or self.eval_device != "auto"):
            name = "--eval-tasks-every" if self.eval_tasks_every else "--eval-device"
            raise ValueError(
                f"{name} is given without --eval-tasks, which it belongs to; give --eval-tasks paper, or leave it out"
            )
        require_not_negative(self, "router_aux_loss", expected="0 (without) or more, as 0.001")
        require(self, lambda share: 0 < share <= 1, "a share of the steps above 0, up to 1", "decay_fraction")
        if self.mirror is not None:
            check_mirror(self.mirror, self.out)
        if self.average is not None:
            parse_average(self.average)
        parse_on_nonfinite(self.on_nonfinite)
        parse_steps(self.skip_steps)
        if self.float8_emulated and not self.float8:
            raise ValueError(
                "--float8-emulated is given without --float8, expected both; give --float8 too, or neither"
            )
        if self.wandb_project is not None and not self.wandb_project.strip():
            raise ValueError(f"--wandb-project is {self.wandb_project!r}, expected the name of a project")
        if self.min_learning_rate > max(self.learning_rate, LOWEST):
            raise ValueError(
                f"--min-learning-rate is {self.min_learning_rate}, expected at most --learning-rate ({self.learning_rate})"
            )


def warmup_of(config: TrainConfig, num_steps: int) -> int:
    """Steps of warm-up; none by default where a run begins with the weights of another one's checkpoint."""
    if config.warmup_steps is not None:
        return config.warmup_steps
    return math.ceil(num_steps / 100) if config.resume_from is None else 0


def learning_rate_at(step: int, config: TrainConfig, num_steps: int, begin: int = 0) -> float:
    """Learning rate of step begin + 1..num_steps: linear warm-up to the peak, then as --schedule says.

    begin: the step whose checkpoint the run began with (--resume-from), from which warm-up and decay are counted.
    """
    warmup = begin + warmup_of(config, num_steps)
    if step <= warmup:
        return config.learning_rate * (step - begin) / (warmup - begin)
    decay_from = warmup
    if config.schedule == "wsd":
        decay_from = max(warmup, num_steps - math.ceil(config.decay_fraction * num_steps))
    if config.schedule == "constant" or step <= decay_from:
        return config.learning_rate
    progress = (step - decay_from) / max(1, num_steps - decay_from)
    left = (1 + math.cos(math.pi * progress)) / 2 if config.schedule == "cosine" else 1 - progress
    lowest = min(config.min_learning_rate, config.learning_rate)
    return lowest + (config.learning_rate - lowest) * left
