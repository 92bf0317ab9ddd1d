"""Before an engine scores anything: a few rows that transformers has scored too.

A wrong kernel, wrong position scaling or wrong weights show here in the first second, not after a week.
"""

from pathlib import Path
from typing import Any

import numpy as np

from scorer.engine import Answer
from scorer.forward import forward_all, spans
from shards.folder import ShardFolder
from shards.schema import list_lengths

CANARY_TOKENS = (1024, 256, 256, 256)  # of each prompt at most; the first is long for the sake of the positions
# Mean |difference| in nats that rounding explains; a wrong model is off by tenths at least. Measured: docs/log.md
TOLERANCE = {"float32": 2e-3, "bfloat16": 0.1, "float16": 0.05}

TOPK_ELSEWHERE = 0.02  # share of an engine's most probable tokens that may be far from transformers'


class CanaryFailed(ValueError):
    """The engine's log-probs are not those of the model."""


def canary_prompts(shards: ShardFolder, part: str, context: str, num_embeddings: int) -> list[np.ndarray]:
    """The first prompts of a part that are long enough to tell something, int [tokens]; at least one if any."""
    prompts: list[np.ndarray] = []
    reader = shards.open_part(part)
    for index in range(reader.num_record_batches):
        batch = reader.get_batch(index)
        ids = batch.column("input_ids").flatten().to_numpy()
        pieces = batch.column("doc_lengths").flatten().to_numpy().astype(np.int64)
        for start, end in spans(list_lengths(batch.column("input_ids")), pieces, context):
            prompt = ids[start:end]
            if prompt.min() >= 0 and prompt.max() < num_embeddings:
                prompts.append(prompt[: CANARY_TOKENS[len(prompts)]])
            if len(prompts) == len(CANARY_TOKENS):
                return prompts
    return prompts


def compute(model: Path, prompts: list[np.ndarray], top_k: int = 0) -> list[Any]:
    """What transformers says of the prompts; a Ray task, because vLLM must not be in its process.

    With top_k tuples, with more of the most probable tokens than that: the last ones of an engine in 16 bit may stand
    further down here.
    """
    return forward_all(model, prompts, 4 * top_k + 16 if top_k else 0)


def compare_topk(answers: list[Answer], expected: list[tuple], dtype: str) -> dict[str, float]:
    """Differences of the engine's most probable tokens to transformers'; CanaryFailed where ids or log-probs are others.

    expected: per prompt log-probs, ids [N, W], log-probs [N, W] of more tokens than the engine gives.
    """
    differences, missing, entries = [], 0, 0
    for answer, (_, wide_ids, wide_logprobs) in zip(answers, expected):
        assert answer.topk_ids is not None
        assert answer.topk_logprobs is not None
        for ids, logprobs, other_ids, other in zip(answer.topk_ids, answer.topk_logprobs, wide_ids, wide_logprobs):
            if np.isnan(other).any() and np.isnan(logprobs).any():
                continue  # a model may be broken for a token of its own, as in `compare`
            known = dict(zip(other_ids.tolist(), other.tolist()))
            found = np.array([known.get(token, np.nan) for token in ids.tolist()])
            missing += int(np.isnan(found).sum())
            entries += len(found)
            differences.append(np.abs(found - logprobs)[~np.isnan(found)])
    all_ = np.concatenate([np.zeros(0), *differences])
    mean, share = float(all_.mean()) if len(all_) else np.inf, missing / max(1, entries)
    if not mean <= TOLERANCE[dtype] or share > TOPK_ELSEWHERE:
        raise CanaryFailed(
            f"the engine's most probable tokens are not the model's: of {entries} entries {missing} are not among the first "
            f"of a transformers forward, the others differ by {mean:.3g} nat in the mean, expected at most "
            f"{TOPK_ELSEWHERE:.0%} and {TOLERANCE[dtype]:g} in {dtype}; try --dtype float32 or another vLLM release"
        )
    return {"topk_mean": mean, "topk_elsewhere": share}


def compare(ours: list[np.ndarray], expected: list[np.ndarray], dtype: str) -> dict[str, float]:
    """Differences of the engine's log-probs to transformers'; CanaryFailed where their mean is beyond tolerance.

    Tokens for which both give no finite number are left out: a model may be broken for a token of its own.
    """
    got, want = np.concatenate(ours).astype(np.float64), np.concatenate(expected).astype(np.float64)
    both_broken = ~np.isfinite(got) & ~np.isfinite(want)
    got, want = got[~both_broken], want[~both_broken]
    if not len(got):
        raise CanaryFailed(
            f"the model gives no finite log-prob for any of {len(both_broken)} tokens; check its weights"
        )
    difference = np.abs(got - want)
    mean, largest = float(difference.mean()), float(difference.max())
    if not mean <= TOLERANCE[dtype]:  # also where it is NaN
        raise CanaryFailed(
            f"the engine's log-probs are not the model's: over {len(got)} tokens they differ from a transformers forward "
            f"by {mean:.3g} nat in the mean and {largest:.3g} at most, expected a mean of at most {TOLERANCE[dtype]:g} in "
            f"{dtype}; try --dtype float32 or another vLLM release, or --no-canary if you know why"
        )
    return {"tokens": float(len(got)), "mean": mean, "max": largest}
