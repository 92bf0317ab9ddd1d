"""An engine whose log-probs come from a hash: for tests of the machinery around it, never for training.

It starts at once and gives the same numbers everywhere, so that a run which was killed can be compared with one
which was not. REMIT_FAKE_ENGINE, a JSON object, makes it fail: {"nan": [17]} answers NaN for prompts that hold the
token 17, likewise inf, positive, zeros, topk one token twice among the most probable, sample a drawn token beyond the vocabulary, and entropy a negative entropy; hang,
die and raise do what they say; "once": FILE limits that to the first time; "seconds": S makes each step take S seconds.
REMIT_FAKE_NODE, of a node's own environment, likewise: "start": raise or S seconds, "wrong": true for numbers that are off
by half a nat, which "canary": true of all nodes finds out.
"""

import json
import os
import signal
import time
from typing import Any

import numpy as np

from scorer.canary import Distance, Forwards
from scorer.engine import Answer
from scorer.logits import Kept
from shards.samples import draw

PROMPTS_PER_STEP = 8
SETTINGS = ("once", "seconds", "start", "wrong", "canary")  # what is not looked for in prompts


def faults() -> dict[str, Any]:
    """What REMIT_FAKE_ENGINE asks for."""
    return json.loads(os.environ.get("REMIT_FAKE_ENGINE", "{}"))


def hashed_logprobs(prompt: np.ndarray) -> np.ndarray:
    """float32 [tokens - 1] in (-8, 0), from each token, the one before it and its position alone."""
    ids = prompt.astype(np.uint64)
    mixed = (ids[1:] * np.uint64(2654435761) ^ ids[:-1] * np.uint64(40503)) + np.arange(1, len(ids), dtype=np.uint64)
    mixed ^= mixed >> np.uint64(13)
    return (-((mixed % np.uint64(8000)).astype(np.float32) + 1) / 1001).astype(np.float32)


def hashed_forwards(prompts: list[np.ndarray], dtype: str, kept: Kept = Kept(), vocab_size: int = 0) -> Forwards:  # noqa: B008
    """What engines in `dtype` that keep so much are compared with; no prompts where nothing is to be compared."""
    expected = []
    for prompt in prompts:
        logprobs = hashed_logprobs(prompt)
        wide = kept.top_k or kept.sample_k
        answer = hashed_topk(prompt, logprobs, vocab_size, min(vocab_size, 4 * wide + 16)) if wide else Answer(logprobs)
        if kept.temperatures:
            answer = answer._replace(entropies=hashed_entropies(logprobs, vocab_size, kept.temperatures))
        expected.append(answer)
    return Forwards(prompts, expected, {dtype: Distance(0, 0, 0, 0, 0)})


def hashed_topk(prompt: np.ndarray, logprobs: np.ndarray, vocab_size: int, top_k: int) -> Answer:
    """The `top_k` most probable tokens of a distribution that has these `logprobs`, float32 [tokens - 1].

    What a token leaves of the probability goes to the others of the vocabulary, from a place that its log-prob
    chooses on: a half to the first of them, a quarter to the second and so on.
    """
    own_N1, others = prompt[1:, None].astype(np.int64), min(top_k, vocab_size - 1)
    first_N1 = (-logprobs[:, None] * 1001).astype(np.int64)
    ids_NW = (own_N1 + 1 + (first_N1 + np.arange(others)) % max(1, vocab_size - 1)) % vocab_size
    rest_N1 = np.log1p(-np.exp(logprobs[:, None].astype(np.float64)))
    logprobs_NW = (rest_N1 - np.log(2) * np.arange(1, others + 1)).astype(np.float32)
    ids_NW = np.concatenate([own_N1, ids_NW], axis=1)
    logprobs_NW = np.concatenate([logprobs[:, None], logprobs_NW], axis=1)
    order_NK = np.lexsort((ids_NW, -logprobs_NW), axis=-1)[:, :top_k]
    best = np.take_along_axis(ids_NW, order_NK, -1).astype(np.int32)
    return Answer(logprobs, best, np.take_along_axis(logprobs_NW, order_NK, -1))


def hashed_entropies(logprobs: np.ndarray, vocab_size: int, temperatures: tuple[float, ...]) -> np.ndarray:
    """Entropies, float32 [tokens - 1, E] as of scorer.logits, of distributions that have these `logprobs`, float32 [tokens
    - 1]: all other tokens of the vocabulary have the same probability."""
    own, others = logprobs.astype(np.float64), max(1, vocab_size - 1)
    rest = np.log1p(-np.exp(own)) - np.log(others)
    found = []
    for temperature in temperatures:
        log_partition = np.logaddexp(own / temperature, rest / temperature + np.log(others))
        own_t, rest_t = own / temperature - log_partition, rest / temperature - log_partition
        entropy = -np.exp(own_t) * own_t - others * np.exp(rest_t) * rest_t
        found += [entropy] if temperature == 1 else [entropy, log_partition]
    return np.stack(found, axis=1).astype(np.float32)


def hashed_samples(prompt: np.ndarray, logprobs: np.ndarray, vocab_size: int, draws: int) -> np.ndarray:
    """Ids, int32 [tokens - 1, draws], drawn from the first tokens of `hashed_topk`."""
    found = hashed_topk(prompt, logprobs, vocab_size, min(vocab_size, 16))
    assert found.topk_ids is not None
    assert found.topk_logprobs is not None
    whole = np.zeros((len(logprobs), vocab_size))
    np.put_along_axis(whole, found.topk_ids.astype(np.int64), np.exp(found.topk_logprobs.astype(np.float64)), axis=1)
    return draw(whole, np.abs(logprobs.astype(np.float64)) * 618.034 % 1, draws)


class FakeEngine:
    """Answers eight prompts a step."""

    def __init__(self, vocab_size: int, kept: Kept) -> None:
        self._vocab_size, self._kept = vocab_size, kept
        self.description: dict[str, Any] = {"engine": "fake"}
        self._faults = faults() | json.loads(os.environ.get("REMIT_FAKE_NODE", "{}"))
        self._queue: list[tuple[str, np.ndarray]] = []
        start = self._faults.get("start", 0)
        if start == "raise":
            raise RuntimeError("the fake engine was told not to start")
        time.sleep(start)

    def add(self, key: str, prompt: np.ndarray) -> None:
        self._queue.append((key, prompt))

    def step(self) -> list[tuple[str, Answer]]:
        time.sleep(self._faults.get("seconds", 0))
        batch, self._queue = self._queue[:PROMPTS_PER_STEP], self._queue[PROMPTS_PER_STEP:]
        return [(key, self._answer(prompt)) for key, prompt in batch]

    def forget(self) -> None:
        """Nothing is left behind."""

    def _answer(self, prompt: np.ndarray) -> Answer:
        logprobs = hashed_logprobs(prompt) - np.float32(0.5 * self._faults.get("wrong", False))
        answer = Answer(logprobs)
        if self._kept.top_k:
            answer = hashed_topk(prompt, logprobs, self._vocab_size, self._kept.top_k)
        if self._kept.temperatures:
            answer = answer._replace(entropies=hashed_entropies(logprobs, self._vocab_size, self._kept.temperatures))
        if self._kept.sample_k:
            drawn = hashed_samples(prompt, logprobs, self._vocab_size, self._kept.sample_k)
            answer = answer._replace(sample_ids=drawn)
        for fault, tokens in self._faults.items():
            if fault in SETTINGS or not np.isin(prompt, tokens).any() or not self._first_time():
                continue
            if fault == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "hang":
                time.sleep(3600)
            elif fault == "raise":
                raise RuntimeError("the fake engine was told to fail")
            elif fault == "topk":
                assert answer.topk_ids is not None
                answer.topk_ids[len(logprobs) // 3, -1] = answer.topk_ids[len(logprobs) // 3, 0]
            elif fault == "sample":
                assert answer.sample_ids is not None
                answer.sample_ids[len(logprobs) // 3, 0] = self._vocab_size
            elif fault == "entropy":
                assert answer.entropies is not None
                answer.entropies[len(logprobs) // 3, 0] = -0.5
            else:
                values = {"nan": np.nan, "inf": -np.inf, "positive": 0.5, "zeros": 0.0}
                logprobs[len(logprobs) // 3 if fault != "zeros" else 0 :] = values[fault]
        return answer

    def _first_time(self) -> bool:
        if "once" not in self._faults:
            return True
        try:
            os.close(os.open(self._faults["once"], os.O_CREAT | os.O_EXCL))
            return True
        except FileExistsError:
            return False
