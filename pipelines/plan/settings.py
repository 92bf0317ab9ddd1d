"""Settings of remit plan. Light to import, so that --help answers at once."""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from pipelines.pages import check_output_file
from pipelines.plan.hardware import GPUS
from shards.entropy import require_entropy
from shards.ranges import require, require_at_least, require_not_negative, require_positive
from trainer.mixture import given_mixture

SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class PlanConfig:
    """What ReMiT would cost: GPU-hours, disk, memory and break-even, from the config.json of both models, without weights."""

    base: str
    """Base model: a folder with config.json, NAME or NAME@REVISION of the hub, or olmo2-1b, olmo2-7b or llama3-8b for its shape."""
    reference: str
    """Reference model, likewise."""
    tokens: str
    """Tokens of the corpus: 50e9, 50B, 2.1M or 50_000_000. With --shards or --mix: tokens that the run trains on."""
    shards: tuple[str, ...] = ()
    """Packed or scored folders that the run is to draw from, as for remit train: A=0.7 B=0.3. The corpus is all of them."""
    mix: Path | None = None
    """In place of --shards: file that describes a mixture, as for remit train."""
    json: Path | None = None
    """File to write the figures to, as JSON."""
    epochs: float = 1.0
    """Passes over the corpus in one run."""
    seq_len: int = 4096
    """Tokens per row."""
    global_batch_size: int | None = None
    """Rows per optimizer step; default 512, as in the paper."""

    gpu: str = "h200"
    """h200, h100, a100, b200, l40s, rtx4090 or cpu; any other name needs --peak-tflops and --gpu-memory-gb."""
    num_gpus: int | None = None
    """GPUs; default 8, or 1 with cpu. A CPU counts as one with all its cores."""
    gpus_per_node: int | None = None
    """GPUs of one machine, default 8; hybrid sharding stays within it."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto: bfloat16 on a GPU, float32 on a CPU."""
    sharding: Literal["auto", "replicate", "full", "hybrid"] = "auto"
    """As for remit train; auto: as it chooses, and sharded where a replica does not fit."""
    micro_batch_size: int | None = None
    """Rows per forward pass; default: the largest power of two that fits."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """auto: only where training does not fit without."""
    top_k: int = 0
    """As for remit score: entries stored per token."""
    top_k_share: float | None = None
    """Share of the tokens with top k, default all; 0.25 for --top-k-below-entropy quantile:0.2 of remit score with its margin."""
    sample_k: int = 0
    """As for remit score: drawn tokens stored per token."""
    entropy: bool = False
    """As for remit score."""
    entropy_temperature: float | None = None
    """As for remit score: two columns more."""

    train_rate: float | None = None
    """Measured tokens/s per GPU of NTP training (tokens_per_second of metrics.jsonl / GPUs), in place of --mfu-train."""
    score_rate: float | None = None
    """Measured tokens/s per GPU of scoring (tokens_per_second of _score.jsonl / GPUs), in place of --mfu-score."""
    online_rate: float | None = None
    """Measured tokens/s per GPU of the reference's forward inside of the training step; default: at the utilisation of training."""
    mfu_train: float | None = None
    """Share of the peak that training reaches between two exchanges; default 0.45, with cpu and unknown GPUs 0.4."""
    mfu_score: float | None = None
    """Share of the peak that scoring reaches; default 0.4."""
    network: float | None = None
    """GB/s per GPU and direction between machines; default 50."""
    link: float | None = None
    """GB/s per GPU and direction inside of a machine; default: by --gpu."""
    peak_tflops: float | None = None
    """Peak of one GPU, in 10^12 floating point operations per second; default: by --gpu and --dtype."""
    gpu_memory_gb: float | None = None
    """Memory of one GPU, in 10^9 bytes; default: by --gpu."""
    logprob_bytes: float | None = None
    """Bytes on disk per log-prob; default 1.4, which --logprob-step 0 of remit score makes 3.8."""

    rmt_steps: int | None = None
    """Also estimate remit rmt, reinforcement mid-training of the base, with so many steps (its --max-steps)."""
    rmt_positions: int | None = None
    """Its --positions-per-step; default 128."""
    rmt_generations: int | None = None
    """Its --num-generations; default 8."""
    rmt_first_budget: int | None = None
    """Its --first-budget; default 800."""
    rmt_least_budget: int | None = None
    """Its --least-budget; default 1."""
    rmt_budget_decay: float | None = None
    """Its --budget-decay; default 0.2."""
    rmt_prompt: float | None = None
    """Mean tokens of a prompt; default: half of --seq-len, or of 4,096 where rows are longer."""
    rmt_answer: float | None = None
    """Mean tokens after a thought, the closing tag among them; default 4."""
    prefill_rate: float | None = None
    """Measured tokens/s per GPU of an engine that reads prompts, in place of --mfu-prefill."""
    decode_rate: float | None = None
    """Measured tokens/s per GPU of an engine that samples, all sequences together (rollout_tokens / rollout_seconds of the
    metrics of remit rmt, / GPUs), in place of --mfu-decode."""
    mfu_prefill: float | None = None
    """Share of the peak that reading prompts reaches; default 0.4."""
    mfu_decode: float | None = None
    """Share of the peak that sampling reaches; default 0.05."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        _ = self.num_tokens
        if self.shards and self.mix is None:
            given_mixture(self.shards, None)
        if self.is_mixed and self.epochs != 1:
            raise ValueError(f"--epochs is {self.epochs:g}, and --tokens says what a mixture trains on; leave it out")
        require_at_least(self, 1, "num_gpus", "gpus_per_node", "global_batch_size", "micro_batch_size")
        require(self, lambda length: length >= 2, "at least 2: nothing precedes a row's first token", "seq_len")
        require_positive(self, "epochs", "peak_tflops", "gpu_memory_gb", "link", "network", "logprob_bytes")
        require_positive(self, "train_rate", "score_rate", "online_rate", "mfu_train", "mfu_score")
        require(self, lambda share: 0 < share <= 1, "a share of the tokens above 0, up to 1", "top_k_share")
        require_not_negative(self, "sample_k")
        require(self, lambda share: share <= 1, "a share of at most 1, for instance 0.4", "mfu_train", "mfu_score")
        require_not_negative(self, "top_k")
        require_entropy(self)
        self._check_rmt()
        for what in ("train", "score", "prefill", "decode"):
            if None not in (getattr(self, f"{what}_rate"), getattr(self, f"mfu_{what}")):
                raise ValueError(f"--{what}-rate and --mfu-{what} are both given; leave one of them out")
        if self.gpu.lower() in GPUS:
            object.__setattr__(self, "gpu", self.gpu.lower())
        elif not (self.peak_tflops and self.gpu_memory_gb):
            raise ValueError(
                f"--gpu is {self.gpu!r}, expected one of {', '.join(GPUS)}; for another one give --peak-tflops and "
                "--gpu-memory-gb too"
            )
        if self.json is not None:
            check_output_file("--json", self.json)

    def _check_rmt(self) -> None:
        names = [entry.name for entry in fields(self) if entry.name.startswith("rmt_") and entry.name != "rmt_steps"]
        names += ["prefill_rate", "decode_rate", "mfu_prefill", "mfu_decode"]
        alone = [name for name in names if getattr(self, name) is not None]
        if self.rmt_steps is None and alone:
            option = f"--{alone[0].replace('_', '-')}"
            raise ValueError(
                f"{option} is given without --rmt-steps; give --rmt-steps to estimate remit rmt, or leave {option} out"
            )
        require_at_least(self, 1, "rmt_steps", "rmt_positions", "rmt_first_budget", "rmt_least_budget")
        require(self, lambda number: number >= 2, "at least 2, to compare them", "rmt_generations")
        require(self, lambda share: 0 < share <= 1, "a factor above 0, up to 1", "rmt_budget_decay")
        require_positive(self, "rmt_prompt", "prefill_rate", "decode_rate", "mfu_prefill", "mfu_decode")
        require_not_negative(self, "rmt_answer")
        require(self, lambda share: share <= 1, "a share of at most 1, for instance 0.1", "mfu_prefill", "mfu_decode")

    @property
    def is_mixed(self) -> bool:
        """Whether folders are given."""
        return bool(self.shards) or self.mix is not None

    @property
    def num_entropies(self) -> int:
        """Columns of --entropy and --entropy-temperature."""
        return self.entropy + 2 * (self.entropy_temperature is not None)

    @property
    def num_tokens(self) -> int:
        """--tokens as a number."""
        text = self.tokens.strip().replace(",", "").replace("_", "")
        match = re.fullmatch(r"(\d+\.?\d*(?:[eE]\+?\d+)?|\.\d+)([kKmMbBtT]?)", text)
        value = float(match[1]) * SUFFIXES[match[2].upper()] if match else math.nan
        if not 1 <= value < 1e18 or abs(value - round(value)) > 1e-6 * value:
            raise ValueError(
                f"--tokens is {self.tokens!r}, expected a whole number of tokens below 1e18, for instance 50e9, 50B or 2.1M"
            )
        return round(value)
