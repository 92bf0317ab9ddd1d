"""Settings of remit pack, remit score and remit select, checked once. Light to import, so that --help answers at once."""

import math
from dataclasses import dataclass, field
from typing import Literal

from scorer.engine_args import parse_engine_args
from scorer.pack_config import PackConfig as PackConfig
from shards.entropy import require_entropy
from shards.output_folder import require_new_folder
from shards.ranges import require, require_at_least, require_not_negative
from shards.schema import logprobs_column

MARGIN = 0.05  # of a quantile: a step's own moves around that of the corpus


@dataclass(frozen=True)
class BelowEntropy:
    """A threshold in nats, or a quantile of the corpus with the margin that is added to it."""

    threshold: float | None = None
    quantile: float | None = None
    margin: float = 0.0


def parse_below(text: str) -> BelowEntropy:
    """The value of --top-k-below-entropy; ValueError where it is none."""
    expected = "nats, for instance 1.5, or quantile:0.2, a share of the tokens, with a margin as in quantile:0.2+0.05"
    word, colon, value = text.partition(":")
    try:
        if not colon:
            found = BelowEntropy(threshold=float(word))
            if 0 <= float(word) < math.inf:
                return found
        elif word == "quantile":
            share, _, margin = value.partition("+")
            found = BelowEntropy(quantile=float(share), margin=float(margin or MARGIN))
            if float(share) > 0 and found.margin >= 0 and float(share) + found.margin < 1:
                return found
    except ValueError:
        pass
    raise ValueError(f"--top-k-below-entropy is {text}, expected {expected}")


@dataclass(frozen=True)
class ScoreConfig:
    """Add a reference's log-prob of every token to a shard folder."""

    shards: str
    """Shard folder to annotate, from remit pack or an earlier remit score."""
    model: str
    """Reference model: a Hugging Face folder, or NAME or NAME@REVISION (branch, tag or commit) of the hub."""
    out: str
    """Shard folder to write; the same command again finishes an interrupted run."""
    name: str = "rl"
    """Name of the reference; its column is NAME_logprobs."""
    context: Literal["packed", "document"] = "packed"
    """What a token is conditioned on: all that precedes it in its row, or in its document only."""
    dtype: Literal["auto", "float16", "bfloat16", "float32"] = "auto"
    """Of the engine; logits are float32 in any. auto: the model's own, but for a bfloat16 model float16 where a few rows
    show that it is finite and nearer to float32."""
    logprob_step: float = 1 / 64
    """Log-probs are rounded to multiples of this many nats, which makes the column compress well; 0: exact."""
    top_k: int = 0
    """Also store the reference's most probable tokens at every place, this many, in columns NAME_topk_ids and
    NAME_topk_logprobs; 0: none."""
    top_k_below_entropy: str | None = None
    """With --top-k and --entropy: keep the most probable tokens only where the entropy (that at --entropy-temperature, if given)
    is at most so many nats, null elsewhere; or quantile:0.2, for the share of the tokens with the lowest: the threshold is
    estimated on a sample first, for that share and a margin of 0.05 (quantile:0.2+0.05)."""
    sample_k: int = 0
    """Also store this many tokens at every place that are drawn from the reference's whole distribution, in column
    NAME_sample_ids, for --objective sampled; 0: none."""
    entropy: bool = False
    """Also store the entropy of the reference's prediction at every place, in column NAME_entropy."""
    entropy_temperature: float | None = None
    """With --entropy: store also the entropy and the log partition sum at this temperature, in columns NAME_entropy_t2 and
    NAME_log_partition_t2 for 2."""
    num_engines: int | None = None
    """Engines at once; default: one per GPU (and tensor-parallel group), else as many as the CPUs carry."""
    tensor_parallel_size: int = 1
    """GPUs (or CPU core groups) per engine."""
    max_num_batched_tokens: int | None = None
    """Tokens per engine step; default: chosen from vocabulary, dtype and memory so that the logits fit."""
    engine_args: list[str] = field(default_factory=list)
    """KEY=VALUE pairs for vLLM, for instance kv_cache_dtype=fp8 pipeline_parallel_size=2; part of what the reference is."""
    progress_timeout_seconds: float = 600.0
    """An engine that has parts and makes no progress for this long is killed; its parts are tried again."""
    max_bad_rows: float = 0.05
    """End the run where more than this share of its rows come out without log-probs, because they are not finite for instance; 1:
    never. The same command with a larger share goes on."""
    grace_seconds: float = 60.0
    """After SIGTERM or SIGINT: how long the parts in work may take to be committed."""
    canary: bool = True
    """Before it gets parts, compare each engine on a few rows with a transformers forward of the same model."""
    engine: Literal["vllm", "fake"] = "vllm"
    """fake: numbers from a hash instead of a model, to try the machinery; remit train refuses them."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks and what the engines print."""

    def __post_init__(self) -> None:
        logprobs_column(self.name)
        parse_engine_args(self.engine_args)
        require_new_folder(self.out, "remit score", shards=self.shards, model=self.model)
        require(self, lambda step: 0 <= step <= 1, "0 (exact) to 1, for instance 0.015625", "logprob_step")
        if self.logprob_step and math.frexp(self.logprob_step)[0] != 0.5:
            raise ValueError(
                f"--logprob-step is {self.logprob_step}, expected a power of two so that multiples are exact in float32"
            )
        require_not_negative(self, "top_k", expected="0 (store none) or more, for instance 8")
        require(self, lambda draws: 0 <= draws <= 4096, "0 (store none) to 4096, for instance 25", "sample_k")
        require(self, lambda share: 0 <= share <= 1, "a share of the rows, 0 to 1, for instance 0.05", "max_bad_rows")
        require_entropy(self)
        if self.below_entropy is not None and not (self.top_k and self.entropy):
            missing = "--top-k" if not self.top_k else "--entropy"
            raise ValueError(
                f"--top-k-below-entropy is {self.top_k_below_entropy} without {missing}, expected all three"
            )
        if self.grace_seconds < 0 or self.progress_timeout_seconds <= 0:
            raise ValueError("--grace-seconds and --progress-timeout-seconds must be positive")
        require_at_least(self, 1, "num_engines", "tensor_parallel_size", "max_num_batched_tokens")

    @property
    def below_entropy(self) -> "BelowEntropy | None":
        """What --top-k-below-entropy says."""
        return None if self.top_k_below_entropy is None else parse_below(self.top_k_below_entropy)

    @property
    def temperatures(self) -> tuple[float, ...]:
        """At which the entropy is stored."""
        if not self.entropy:
            return ()
        return (1.0,) if self.entropy_temperature is None else (1.0, self.entropy_temperature)

    @property
    def devices_per_engine(self) -> int:
        """GPUs, or groups of CPU cores, of one engine."""
        return self.tensor_parallel_size * parse_engine_args(self.engine_args).get("pipeline_parallel_size", 1)


@dataclass(frozen=True)
class SelectConfig:
    """Keep the rows that a teacher predicts best compared with a small reference (MiniPLM's difference sampling)."""

    shards: str
    """Shard folder that remit score has annotated with both references."""
    teacher: str
    """Name of the large reference, whose column is NAME_logprobs."""
    small: str
    """Name of the small reference, scored in the same context."""
    out: str
    """Shard folder to write; the same command again finishes an interrupted run."""
    keep_ratio: float = 0.8
    """Share of the rows to keep, over the whole corpus: those with the highest mean log p(teacher) - log p(small)."""
    num_workers: int | None = None
    """Parts read or written at once; default: one per CPU. About as many are in memory."""
    debug: bool = field(default=False, repr=False)
    """Show tracebacks."""

    def __post_init__(self) -> None:
        require_new_folder(self.out, "remit select", shards=self.shards)
        require(self, lambda ratio: 0 < ratio < 1, "more than 0 and less than 1, for instance 0.8", "keep_ratio")
        if self.teacher == self.small:
            raise ValueError(
                f"--teacher and --small are both {self.small!r}, expected two references; all rows would tie"
            )
        require_at_least(self, 1, "num_workers")
