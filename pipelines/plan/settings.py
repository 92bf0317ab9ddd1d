"""Settings of remit plan (what a project costs) and of remit weights (what an epsilon does to a scored corpus)."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.pages import check_output_file
from pipelines.plan.hardware import GPUS
from trainer.objectives.settings import check_epsilon

POSITIVE = (
    *(
        "epochs",
        "peak_tflops",
        "gpu_memory_gb",
        "link",
        "network",
        "train_rate",
        "score_rate",
        "mfu_score",
        "mfu_train",
    ),
    *("mfu_online", "remit_cost", "packed_bytes", "logprob_bytes", "topk_entry_bytes", "memory_share"),
)
SHARES = ("mfu_score", "mfu_train", "mfu_online", "memory_share")
COUNTS = ("num_gpus", "gpus_per_node", "global_batch_size", "micro_batch_size")
FROM_ZERO = ("score_start_seconds", "train_start_seconds", "top_k")
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class PlanConfig:
    """What ReMiT would cost: GPU-hours, disk, memory and break-even, from the config.json of both models, without weights."""

    base: str
    """Base model: a folder with config.json, NAME or NAME@REVISION of the hub, or olmo2-1b, olmo2-7b or llama3-8b for its shape."""
    reference: str
    """Reference model, likewise."""
    tokens: str
    """Tokens of the corpus: 50e9, 50B, 2.1M or 50_000_000."""
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

    train_rate: float | None = None
    """Measured tokens/s per GPU of NTP training (tokens_per_second of metrics.jsonl / GPUs), in place of --mfu-train."""
    score_rate: float | None = None
    """Measured tokens/s per GPU of scoring (tokens_per_second of _score.jsonl / GPUs), in place of --mfu-score."""
    mfu_train: float | None = None
    """Share of the peak that training reaches between two exchanges; default 0.45, with cpu and unknown GPUs 0.4."""
    mfu_score: float | None = None
    """Share of the peak that scoring reaches; default 0.4."""
    mfu_online: float | None = None
    """Share of the peak that a reference reaches inside of the training step; default: as training."""
    network: float | None = None
    """GB/s per GPU and direction between machines; default 50."""
    link: float | None = None
    """GB/s per GPU and direction inside of a machine; default: by --gpu."""
    peak_tflops: float | None = None
    """Peak of one GPU, in 10^12 floating point operations per second; default: by --gpu and --dtype."""
    gpu_memory_gb: float | None = None
    """Memory of one GPU, in 10^9 bytes; default: by --gpu."""
    memory_share: float | None = None
    """Share of it that a plan may fill, default 0.9; the rest is for the allocator, kernels and communication."""
    remit_cost: float | None = None
    """Time of a ReMiT step with stored log-probs / time of an NTP step; default 1.01, the bound of make bench-train."""
    score_start_seconds: float | None = None
    """Start of cluster and engines, and their end; default 180, on a CPU 18."""
    train_start_seconds: float | None = None
    """Start of training and its export; default 120, on a CPU 5."""
    packed_bytes: float | None = None
    """Bytes on disk per packed token; default 2.1."""
    logprob_bytes: float | None = None
    """Bytes on disk per log-prob; default 1.4, which --logprob-step 0 of remit score makes 3.8."""
    topk_entry_bytes: float | None = None
    """Bytes on disk per entry of --top-k, id and log-prob; default 4.3."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        _ = self.num_tokens
        for name in (*POSITIVE, *FROM_ZERO, *COUNTS):
            value, option = getattr(self, name), f"--{name.replace('_', '-')}"
            if value is None:
                continue
            if name in COUNTS and value < 1:
                raise ValueError(f"{option} is {value}, expected at least 1")
            if name in FROM_ZERO and not 0 <= value < math.inf:
                raise ValueError(f"{option} is {value:g}, expected 0 or more")
            if name in POSITIVE and not 0 < value < math.inf:
                raise ValueError(f"{option} is {value:g}, expected a number above 0")
            if name in SHARES and value > 1:
                raise ValueError(f"{option} is {value:g}, expected a share of at most 1, for instance 0.4")
        for rate, share in (("train_rate", "mfu_train"), ("score_rate", "mfu_score")):
            if None not in (getattr(self, rate), getattr(self, share)):
                options = [f"--{name.replace('_', '-')}" for name in (rate, share)]
                raise ValueError(f"{options[0]} and {options[1]} are both given; leave one of them out")
        if self.gpu.lower() in GPUS:
            object.__setattr__(self, "gpu", self.gpu.lower())
        elif not (self.peak_tflops and self.gpu_memory_gb):
            raise ValueError(
                f"--gpu is {self.gpu!r}, expected one of {', '.join(GPUS)}; for another one give --peak-tflops and "
                "--gpu-memory-gb too"
            )
        if self.seq_len < 2:
            raise ValueError(f"--seq-len is {self.seq_len}, expected at least 2: nothing precedes a row's first token")
        if self.json is not None:
            check_output_file("--json", self.json)

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


@dataclass(frozen=True)
class WeightsConfig:
    """What an epsilon would do to a scored corpus: clipped shares and most affected tokens, without a model."""

    shards: str
    """Shard folder with the log-probs of both: remit score, once with each of them."""
    reference: str = "rl"
    """Name of the reference's log-probs (--name of remit score)."""
    base: str = "base"
    """Name of the base's log-probs."""
    json: Path | None = None
    """File to write the figures to, as JSON."""
    epsilons: str = "0.05,0.1,0.2,0.3,0.5,inf"
    """Clips to compare, with commas between; inf: no clip."""
    show_epsilon: float = 0.2
    """Clip at which the tokens of the vocabulary are ranked."""
    centring: Literal["row", "document", "none"] = "row"
    """As for remit train."""
    weight_map: Literal["sigmoid", "exp", "linear"] = "sigmoid"
    """As for remit train."""
    rows: int = 10_000
    """Random rows to read; 0: all."""
    top: int = 20
    """Tokens to show, of the most up-weighted and of the most down-weighted."""
    min_count: int = 20
    """Tokens that occur less often in the rows are not ranked."""
    seed: int = 0
    """Decides which rows are read."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.reference == self.base:
            raise ValueError(
                f"--reference and --base are both {self.base!r}, expected the names of two columns; score the folder "
                "with the other model too, under another --name"
            )
        for name, least in (("rows", 0), ("top", 1), ("min_count", 1), ("seed", 0)):
            if getattr(self, name) < least:
                what = f"{least} (all) or more" if name == "rows" else f"at least {least}"
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(self, name)}, expected {what}")
        check_epsilon("--show-epsilon", self.show_epsilon)
        _ = self.epsilon_values
        if self.json is not None:
            check_output_file("--json", self.json)

    @property
    def epsilon_values(self) -> tuple[float, ...]:
        """Those of --epsilons, in its order, each once."""
        values = []
        for text in self.epsilons.split(","):
            try:
                values.append(float(text))
            except ValueError:
                raise ValueError(
                    f"--epsilons is {self.epsilons!r}, expected numbers with commas between, for instance 0.1,0.2,inf"
                ) from None
            check_epsilon("--epsilons", values[-1], "has")
        return tuple(dict.fromkeys(values))
