"""Engines for tests of the RMT loop without vLLM: they think a scripted number of tokens, close the thought, and guess."""

from typing import Any

import numpy as np

from pipelines.rmt.engine import Sampled, Sampling


class FakeEngines:
    """close_ids: the closing tag; vocabulary: ids below it are sampled; loaded: how often weights came."""

    def __init__(self, close_ids: list[int], vocabulary: int) -> None:
        self.close_ids, self.vocabulary = close_ids, vocabulary
        self.loaded: list[dict[str, Any]] = []
        self.asked: list[tuple[list[list[int]], list[Sampling], int]] = []

    def load(self, weights: dict[str, Any]) -> None:
        self.loaded.append({name: tensor.clone() for name, tensor in weights.items()})

    def sample(self, prompts: list[list[int]], samplings: list[Sampling], seed: int) -> list[list[Sampled]]:
        self.asked.append((prompts, samplings, seed))
        random = np.random.default_rng(seed)
        return [
            [self._one(random, sampling) for _ in range(sampling.count)]
            for _, sampling in zip(prompts, samplings, strict=True)
        ]

    def _one(self, random: np.random.Generator, sampling: Sampling) -> Sampled:
        ids = random.integers(1, self.vocabulary, size=int(random.integers(1, sampling.max_tokens + 1))).tolist()
        if sampling.stop is None:
            ids = (ids * sampling.max_tokens)[: sampling.max_tokens]
        elif random.random() < 0.8:
            ids = [*ids[: max(0, sampling.max_tokens - len(self.close_ids))], *self.close_ids]
        return Sampled(tuple(ids), tuple([-3.0] * len(ids)))
