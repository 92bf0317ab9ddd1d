"""Before an engine scores anything: a few prompts that transformers has scored too.

A wrong kernel, wrong position scaling or wrong weights show here in the first second, not after a week. How far an engine
may be off is measured on the same prompts: by how much a transformers forward in the engine's dtype differs from one in
float32.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scorer.engine import Answer
from scorer.forward import load_forward
from scorer.logits import Kept
from shards.contract import check_documents
from shards.folder import ShardFolder
from shards.samples import excess

SHORT_PROMPTS, SHORT_TOKENS = 3, 256  # beside a whole one, which has all positions that an engine will see
FLOOR = 2e-3  # nat: float32 kernels that add in another order; a wrong model is off by tenths
TIMES_OWN = 2  # an engine's kernels round at other places than transformers' do
BIAS_SHARE = 1 / 4  # of the mean |difference|: what does not cancel in a batch matters more
BIAS_DEVIATIONS = 4  # of the mean of as many independent differences: by chance it is exceeded once in 16,000 times
TOPK_ELSEWHERE = 0.02  # share of an engine's most probable tokens that may be far from transformers'


class CanaryFailed(ValueError):
    """The engine's log-probs are not those of the model."""


@dataclass(frozen=True)
class Distance:
    """How far log-probs are from a float32 forward's, in nats: over `tokens` of them mean |difference|, its root mean
    square, the largest, the mean signed difference. topk_mean, topk_elsewhere: of the most probable tokens the mean
    |difference|, and the share that float32 does not have among its first. entropy_mean: of entropies and log partition sums
    the mean |difference|.

    A mean of inf or NaN: not finite where float32 is.
    """

    tokens: int
    mean: float
    rms: float
    max: float
    bias: float
    topk_mean: float = 0.0
    topk_elsewhere: float = 0.0
    entropy_mean: float = 0.0


@dataclass(frozen=True)
class Limits:
    """What passes, in nats: mean |difference|, |mean difference| (bias) beside what chance explains, and likewise of the
    most probable tokens and of entropies. own: distance of a transformers forward in the engine's `dtype`; None in float32, which has none.
    """

    dtype: str
    own: Distance | None = None

    @property
    def mean(self) -> float:
        return FLOOR + TIMES_OWN * (self.own.mean if self.own else 0.0)

    def bias(self, tokens: int) -> float:
        """The mean of `tokens` differences that have no bias strays from 0 by their root mean square / sqrt(tokens)."""
        chance = self.own.rms / max(1, tokens) ** 0.5 if self.own else 0.0
        return self.mean * BIAS_SHARE + BIAS_DEVIATIONS * chance

    @property
    def topk_mean(self) -> float:
        return FLOOR + TIMES_OWN * (self.own.topk_mean if self.own else 0.0)

    @property
    def topk_elsewhere(self) -> float:
        return TOPK_ELSEWHERE + TIMES_OWN * (self.own.topk_elsewhere if self.own else 0.0)

    @property
    def entropy_mean(self) -> float:
        return FLOOR + TIMES_OWN * (self.own.entropy_mean if self.own else 0.0)


@dataclass(frozen=True)
class Forwards:
    """What transformers says of prompts, int [tokens]. expected: of each in float32, with more of the most probable tokens
    than an engine's; distances: of other dtypes from them."""

    prompts: list[np.ndarray]
    expected: list[Answer]
    distances: dict[str, Distance]

    def limits(self, dtype: str) -> Limits:
        """What an engine in `dtype` may differ by."""
        return Limits(dtype, None if dtype == "float32" else self.distances[dtype])


def canary_prompts(shards: ShardFolder, part: str, context: str, num_embeddings: int) -> list[np.ndarray]:
    """The first prompts of a part, int [tokens]; at least one if any.

    The longest of the first record batch is whole, as an engine gets it, in chunks perhaps; the others are cut.
    """
    prompts: list[np.ndarray] = []
    part_rows = shards.open_rows(part, ["input_ids"])
    for number in range(len(part_rows)):
        rows = part_rows.batch(number)
        check_documents(rows)
        found = [rows.ids[start:end] for start, end, _ in rows.spans(context)]
        found = [prompt for prompt in found if prompt.min() >= 0 and prompt.max() < num_embeddings]
        if found and not prompts:
            longest = max(range(len(found)), key=lambda place: len(found[place]))  # the first of those
            prompts.append(found.pop(longest))
        prompts += [prompt[:SHORT_TOKENS] for prompt in found[: 1 + SHORT_PROMPTS - len(prompts)]]
        if len(prompts) == 1 + SHORT_PROMPTS:
            break
    return prompts


def compute(model: Path, prompts: list[np.ndarray], kept: Kept, dtypes: tuple[str, ...], threads: int) -> Forwards:
    """What transformers says of the prompts, in float32 and in `dtypes`; a Ray task, as vLLM must not be in its process.

    kept: what an engine is asked for. threads: 0 for all cores of the node. Of the most probable tokens more: the last of an
    engine in 16 bit may stand further down here. A float16 forward that fails has no finite number.
    """
    import torch

    torch.set_num_threads(threads or node_cores())
    forward = load_forward(model)
    wide = 4 * kept.top_k + 16 if kept.top_k or kept.sample_k else 0
    expected = [_answer(forward, prompt, wide, kept.temperatures) for prompt in prompts]
    del forward  # the weights of one dtype at a time
    distances = {}
    for dtype in dtypes:
        try:
            forward = load_forward(model, dtype)
            own = [_answer(forward, prompt, kept.top_k, kept.temperatures) for prompt in prompts]
            distances[dtype] = measure(own, expected)
            del forward
        except (RuntimeError, NotImplementedError) as error:
            if dtype != "float16" or "memory" in str(error).lower():
                raise
            distances[dtype] = Distance(0, np.inf, np.inf, np.inf, np.inf)
    return Forwards(prompts, expected, distances)


def _answer(forward: Any, prompt: np.ndarray, best: int, temperatures: tuple[float, ...]) -> Answer:
    found = forward(prompt, best=best, temperatures=temperatures)
    return found if isinstance(found, Answer) else Answer(found)


def node_cores() -> int:
    """Cores that this process may use; in a container with a share of a machine what Ray counts is less."""
    import os

    import ray

    cores = len(os.sched_getaffinity(0))
    if not ray.is_initialized():
        return cores
    here = ray.get_runtime_context().get_node_id()
    counted = [int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["NodeID"] == here]
    return max(1, min([cores, *(count for count in counted if count)]))


def measure(answers: list[Answer], expected: list[Answer]) -> Distance:
    """Distance of answers from a float32 forward.

    expected: per prompt, with ids and log-probs of more tokens than the answers have. Tokens for which both give no finite
    number are left out: a model may be broken for a token of its own.
    """
    want = np.concatenate([entry.logprobs for entry in expected]).astype(np.float64)
    got = np.concatenate([answer.logprobs for answer in answers]).astype(np.float64)
    both_broken = ~np.isfinite(got) & ~np.isfinite(want)
    difference = (got - want)[~both_broken]
    if not len(difference):
        raise CanaryFailed(f"the model gives no finite log-prob for any of {len(want)} tokens; check its weights")
    size = np.abs(difference)
    with np.errstate(invalid="ignore"):  # of inf on one side alone, which is a mean of inf
        return Distance(
            len(difference), float(size.mean()), float(np.sqrt((size**2).mean())), float(size.max()),
            float(difference.mean()), *_topk_distance(answers, expected), _entropy_distance(answers, expected),
        )  # fmt: skip


def _entropy_distance(answers: list[Answer], expected: list[Answer]) -> float:
    """Mean |difference| of all entropies and log partition sums; 0 where there are none."""
    sizes = [np.zeros(0)]
    for answer, entry in zip(answers, expected):
        if answer.entropies is not None and entry.entropies is not None:
            known = np.isfinite(entry.entropies)  # as in `measure`
            sizes.append(np.abs(answer.entropies[known].astype(np.float64) - entry.entropies[known]))
    all_ = np.concatenate(sizes)
    return float(all_.mean()) if len(all_) else 0.0


def _topk_distance(answers: list[Answer], expected: list[Answer]) -> tuple[float, float]:
    """Mean |difference| of the most probable tokens that float32 has among its first, and the share of the others; 0, 0
    where there are none."""
    differences, missing, entries = [], 0, 0
    for answer, wide in zip(answers, expected):
        if answer.topk_ids is None or answer.topk_logprobs is None:
            return 0.0, 0.0
        assert wide.topk_ids is not None
        assert wide.topk_logprobs is not None
        places = zip(answer.topk_ids, answer.topk_logprobs, wide.topk_ids, wide.topk_logprobs)
        for ids, logprobs, other_ids, other in places:
            if np.isnan(other).any() and np.isnan(logprobs).any():
                continue  # as in `measure`
            known = dict(zip(other_ids.tolist(), other.tolist()))
            found = np.array([known.get(token, np.nan) for token in ids.tolist()])
            missing += int(np.isnan(found).sum())
            entries += len(found)
            differences.append(np.abs(found - logprobs)[~np.isnan(found)])
    all_ = np.concatenate([np.zeros(0), *differences])
    return float(all_.mean()) if len(all_) else np.inf, missing / max(1, entries)


def sample_excess(answers: list[Answer], expected: list[Answer]) -> float | None:
    """By how much the share of the most probable token among an engine's draws is further from its probability in float32 than
    draws can be, in the mean; None where nothing was drawn."""
    sizes = []
    for answer, wide in zip(answers, expected):
        if answer.sample_ids is not None:
            assert wide.topk_ids is not None
            assert wide.topk_logprobs is not None
            known = np.isfinite(wide.topk_logprobs[:, 0])
            best, probabilities = wide.topk_ids[known, 0], np.exp(wide.topk_logprobs[known, 0].astype(np.float64))
            sizes.append(excess(answer.sample_ids[known], best, probabilities))
    return float(np.concatenate(sizes).mean()) if sizes else None


def compare(answers: list[Answer], expected: list[Answer], limits: Limits) -> dict[str, float]:
    """How far an engine's answers are from the model's; CanaryFailed where that is more than `limits`."""
    if not np.isfinite(limits.mean):
        raise CanaryFailed(
            f"a transformers forward in {limits.dtype} gives numbers that are not finite for rows where a float32 one does, so "
            f"nothing tells whether an engine in {limits.dtype} is right; score with --dtype float32 or bfloat16"
        )
    found = measure(answers, expected)
    remedy = "try --dtype float32 or another vLLM release"
    own = f", {TIMES_OWN} times what {limits.dtype} costs a transformers forward" if limits.own else ""
    if not found.mean <= limits.mean:  # also where it is NaN
        raise CanaryFailed(
            f"the engine's log-probs are not the model's: over {found.tokens} tokens they differ from a transformers forward "
            f"by {found.mean:.3g} nat in the mean and {found.max:.3g} at most, expected a mean of at most "
            f"{limits.mean:.3g} in {limits.dtype}{own}; {remedy}, or --no-canary if you know why"
        )
    if not abs(found.bias) <= limits.bias(found.tokens):
        raise CanaryFailed(
            f"the engine's log-probs are biased: over {found.tokens} tokens they are {found.bias:+.3g} nat from a "
            f"transformers forward's in the mean, expected at most {limits.bias(found.tokens):.3g} either way in "
            f"{limits.dtype}; {remedy}, or --no-canary if you know why"
        )
    drawn = sample_excess(answers, expected)
    if drawn is not None and not drawn <= limits.mean:
        raise CanaryFailed(
            f"the engine's drawn tokens are not from the model's distribution: the share of the most probable one is off by "
            f"{drawn:.3g} in the mean beyond what draws can be, expected at most {limits.mean:.3g} in {limits.dtype}{own}; {remedy}"
        )
    facts = {"tokens": float(found.tokens), "mean": found.mean, "max": found.max, "bias": found.bias}
    facts |= {} if drawn is None else {"sample_excess": drawn}
    if expected[0].entropies is not None:
        facts["entropy_mean"] = found.entropy_mean
        if not found.entropy_mean <= limits.entropy_mean:
            raise CanaryFailed(
                f"the engine's entropies are not the model's: they differ from a transformers forward by {found.entropy_mean:.3g} "
                f"nat in the mean, expected at most {limits.entropy_mean:.3g} in {limits.dtype}{own}; {remedy}, or score without "
                "--entropy"
            )
    if expected[0].topk_ids is None or answers[0].topk_ids is None:
        return facts
    if not found.topk_mean <= limits.topk_mean or found.topk_elsewhere > limits.topk_elsewhere:
        raise CanaryFailed(
            f"the engine's most probable tokens are not the model's: {found.topk_elsewhere:.1%} of them are not among the "
            f"first of a transformers forward, the others differ by {found.topk_mean:.3g} nat in the mean, expected at most "
            f"{limits.topk_elsewhere:.0%} and {limits.topk_mean:.3g} in {limits.dtype}; {remedy}"
        )
    return facts | {"topk_mean": found.topk_mean, "topk_elsewhere": found.topk_elsewhere}
