"""remit plan --measure: time remit score itself, with vLLM, on random rows and a model of random weights.

The driver imports no vLLM; its engines are Ray actors.
"""

from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from pipelines.plan.model import reduced
from pipelines.plan.random_shards import make_shards
from scorer.config import ScoreConfig
from scorer.reference import Reference
from scorer.score import score
from scorer.telemetry import ScoreProgress

PARTS = 16


def time_scoring(config: Any, layers: int, seq_len: int, rows: int) -> tuple[int, float, float]:
    """Tokens, seconds that any such run takes besides, seconds of scoring: of remit score on random rows.

    The rate is that between the moment when all engines score and the last token; what the run took beyond
    tokens / rate (Ray, starts of engines, canary, the end) is what a run of any length takes once.
    """
    smaller = reduced(config, layers)
    with TemporaryDirectory(prefix="remit-plan-") as name:
        folder = Path(name)
        dtype = getattr(config, "dtype", None) or torch.float32
        AutoModelForCausalLM.from_config(smaller, dtype=dtype).save_pretrained(folder / "model")
        vocabulary = config.get_text_config().vocab_size
        make_shards(folder / "packed", vocabulary, PARTS, max(1, rows // PARTS), seq_len)
        seen: list[tuple[float, int, int]] = []  # when, tokens, engines

        def progress(state: ScoreProgress) -> None:
            if not seen or (state.tokens, state.engines) != seen[-1][1:]:
                seen.append((perf_counter(), state.tokens, state.engines))

        began = perf_counter()
        settings = ScoreConfig(str(folder / "packed"), str(folder / "model"), str(folder / "scored"))
        score(settings, Reference(folder / "model", "random"), progress)
        ended = perf_counter()
    tokens, seconds = steady_rate(seen, ended - began)
    return tokens, ended - began - seconds, seconds


def steady_rate(seen: list[tuple[float, int, int]], longest: float) -> tuple[int, float]:
    """Tokens in all, and the seconds that they take at the rate with all engines at work; at most `longest`.

    seen: (when, tokens so far, engines ready), each change once.
    """
    tokens, engines = seen[-1][1], max(entry[2] for entry in seen)
    last, _, _ = next(entry for entry in seen if entry[1] == tokens)
    first, before, _ = next(entry for entry in seen if entry[1] and entry[2] == engines)
    if last <= first:  # too few tokens to see a rate
        return tokens, longest
    return tokens, min(longest, tokens * (last - first) / (tokens - before))
