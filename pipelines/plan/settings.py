"""Settings of remit plan, which has two modes: costs of a project, and weights of a scored corpus (--weights)."""

import math
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from pipelines.plan.planner import GPUS
from trainer.objectives.settings import check_epsilon

WEIGHTS_ONLY = (*("shards", "epsilons", "show_epsilon", "centring", "weight_map", "rows", "top", "min_count", "seed"),)
SHARED = ("weights", "base", "reference", "json", "debug")
POSITIVE = (
    *("epochs", "peak_tflops", "gpu_memory_gb", "mfu_score", "mfu_train", "mfu_online", "remit_cost", "packed_bytes"),
    *("logprob_bytes", "topk_entry_bytes", "measure_seconds", "memory_share"),
)
SHARES = ("mfu_score", "mfu_train", "mfu_online", "memory_share")
COUNTS = ("num_gpus", "gpus_per_node", "global_batch_size", "micro_batch_size")
FROM_ZERO = ("update_seconds", "score_start_seconds", "train_start_seconds", "top_k", "logprob_step")
SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


@dataclass(frozen=True)
class PlanConfig:
    """Tell before training what ReMiT would cost (--base, --reference, --tokens), or do to the tokens (--weights).

    Costs: GPU-hours, disk, memory and break-even from the config.json of both models, without their weights.
    Weights: clipped shares and most affected tokens of a scored corpus, without a model.
    """

    weights: bool = False
    """Tabulate weights, clipped shares and tokens from the stored log-probs of a reference and of the base."""
    base: str = ""
    """Costs: base model, a folder with config.json, or NAME or NAME@REVISION of the hub. --weights: name of its log-probs, default base."""
    reference: str = ""
    """Costs: reference model, likewise. --weights: name of its log-probs (--name of remit score), default rl."""
    json: Path | None = None
    """File to write the figures to, as JSON."""

    shards: str | None = None
    """--weights: shard folder with the log-probs of both: remit score, once with each of them."""
    epsilons: str = "0.05,0.1,0.2,0.3,0.5,inf"
    """--weights: clips to compare, with commas between; inf: no clip."""
    show_epsilon: float = 0.2
    """--weights: clip at which the tokens of the vocabulary are ranked."""
    centring: Literal["row", "document", "none"] = "row"
    """--weights: as for remit train."""
    weight_map: Literal["sigmoid", "exp", "linear"] = "sigmoid"
    """--weights: as for remit train."""
    rows: int = 10_000
    """--weights: random rows to read; 0: all."""
    top: int = 20
    """--weights: tokens to show, of the most up-weighted and of the most down-weighted."""
    min_count: int = 20
    """--weights: tokens that occur less often in the rows are not ranked."""
    seed: int = 0
    """--weights: decides which rows are read."""

    tokens: str | None = None
    """Tokens of the corpus: 50e9, 50B, 2.1M or 50_000_000."""
    epochs: float = 1.0
    """Passes over them in one run."""
    gpu: str | None = None
    """h200, h100, a100, b200, l40s, rtx4090 or cpu; any other name needs --peak-tflops and --gpu-memory-gb. Default:
    h200; that of --calibration; with --measure this machine's."""
    num_gpus: int | None = None
    """GPUs; default 8, or 1 with cpu and with --measure. A CPU counts as one with all its cores."""
    gpus_per_node: int = 8
    """GPUs of one machine; hybrid sharding stays within it."""
    seq_len: int = 4096
    """Tokens per row."""
    global_batch_size: int = 64
    """Rows per optimizer step."""
    micro_batch_size: int | None = None
    """Rows per forward pass; default: the largest power of two that fits."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matrix products; auto: bfloat16 on a GPU, float32 on a CPU."""
    sharding: Literal["auto", "replicate", "full", "hybrid"] = "auto"
    """As for remit train; auto: as it chooses, and sharded where a replica does not fit."""
    activation_checkpointing: Literal["auto", "on", "off"] = "auto"
    """auto: only where training does not fit without."""
    logprob_step: float = 1 / 64
    """As for remit score: 0 stores exact log-probs."""
    top_k: int = 0
    """As for remit score: entries stored per token."""

    peak_tflops: float | None = None
    """Peak of one GPU, in 10^12 floating point operations per second; default: by --gpu and --dtype."""
    gpu_memory_gb: float | None = None
    """Memory of one GPU, in 10^9 bytes; default: by --gpu."""
    memory_share: float = 0.9
    """Share of it that a plan may fill; the rest is for the allocator, kernels and communication."""
    mfu_score: float | None = None
    """Share of the peak that scoring reaches; default 0.4."""
    mfu_train: float | None = None
    """Share of the peak that training reaches, communication included; default 0.4."""
    mfu_online: float | None = None
    """Share of the peak that a reference reaches inside of the training step; default: as --mfu-train."""
    remit_cost: float | None = None
    """Time of a ReMiT step with stored log-probs / time of an NTP step; default 1.01, the bound of make bench-train."""
    update_seconds: float | None = None
    """Clip, AdamW and metrics, per optimizer step; default: 0, it is within --mfu-train."""
    score_start_seconds: float | None = None
    """Start of cluster and engines, and their end; default 180, on a CPU 18."""
    train_start_seconds: float | None = None
    """Start of training and its export; default 120, on a CPU 5."""
    packed_bytes: float = 2.1
    """Bytes on disk per packed token."""
    logprob_bytes: float | None = None
    """Bytes on disk per log-prob; default 1.4, or 3.8 with --logprob-step 0."""
    topk_entry_bytes: float = 4.3
    """Bytes on disk per entry of --top-k, id and log-prob."""

    measure: bool = False
    """Time a few steps of training and of scoring on this machine, with random weights, and calibrate with them."""
    measure_seconds: float = 8.0
    """About how long each of the measurements may take."""
    measure_engine: Literal["auto", "vllm", "transformers"] = "auto"
    """What scores in --measure: remit score on random rows with vLLM, or a transformers forward. auto: vLLM where it is
    installed."""
    calibration: Path | None = None
    """File of utilisations: written by --measure, read without it. Options on the command line win over it."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if not self.weights and not (self.base or self.reference or self.tokens):
            raise ValueError(
                "nothing to plan: give --weights, with --shards DIR, for the weights of a scored corpus; or --base, "
                "--reference and --tokens for the costs of a project"
            )
        self._refuse_options_of_the_other_mode()
        if self.weights:
            object.__setattr__(self, "base", self.base or "base")
            object.__setattr__(self, "reference", self.reference or "rl")
            self._check_weights()
        else:
            self._check_costs()
        for path, option in ((self.json, "--json"), (self.calibration, "--calibration")):
            if path is not None and not path.absolute().parent.is_dir():
                raise ValueError(f"{option} {path}: its folder does not exist; create it")
            if path is not None and path.is_dir():
                raise ValueError(f"{option} {path}: is a folder, expected a file")

    def _refuse_options_of_the_other_mode(self) -> None:
        for setting in fields(self):
            if setting.name in SHARED or getattr(self, setting.name) == setting.default:
                continue
            option = f"--{setting.name.replace('_', '-')}"
            if self.weights and setting.name not in WEIGHTS_ONLY:
                raise ValueError(f"{option} belongs to the plan of costs; leave it out, or --weights")
            if not self.weights and setting.name in WEIGHTS_ONLY:
                raise ValueError(f"{option} belongs to --weights; leave it out, or give --weights")

    def _check_weights(self) -> None:
        if self.shards is None:
            raise ValueError("--shards is not given, expected a folder with log-probs of the reference and of the base")
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

    def _check_costs(self) -> None:
        for name in ("base", "reference"):
            if not getattr(self, name):
                raise ValueError(
                    f"--{name} is not given, expected a model folder with config.json, or NAME or NAME@REVISION of the hub"
                )
        if self.tokens is None:
            raise ValueError("--tokens is not given, expected the tokens of the corpus, for instance 50e9 or 50B")
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
        if self.gpu is not None and self.gpu not in GPUS and self.gpu.lower() in GPUS:
            object.__setattr__(self, "gpu", self.gpu.lower())
        described = self.measure or self.calibration is not None or (self.peak_tflops and self.gpu_memory_gb)
        if self.gpu is not None and self.gpu not in GPUS and not described:
            raise ValueError(
                f"--gpu is {self.gpu!r}, expected one of {', '.join(GPUS)}; for another one give --peak-tflops and "
                "--gpu-memory-gb too"
            )
        if self.seq_len < 2:
            raise ValueError(f"--seq-len is {self.seq_len}, expected at least 2: nothing precedes a row's first token")

    @property
    def num_tokens(self) -> int:
        """--tokens as a number."""
        text = (self.tokens or "").strip().replace(",", "").replace("_", "")
        match = re.fullmatch(r"(\d+\.?\d*(?:[eE]\+?\d+)?|\.\d+)([kKmMbBtT]?)", text)
        value = float(match[1]) * SUFFIXES[match[2].upper()] if match else math.nan
        if not 1 <= value < 1e18 or abs(value - round(value)) > 1e-6 * value:
            raise ValueError(
                f"--tokens is {self.tokens!r}, expected a whole number of tokens below 1e18, for instance 50e9, 50B or 2.1M"
            )
        return round(value)

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
