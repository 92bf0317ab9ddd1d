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
    """Tokens, seconds until engines are ready, seconds of scoring: of remit score on random rows, all engines it chooses.

    An engine counts from when it is ready, so tokens / seconds is the rate of all of them together.
    """
    smaller = reduced(config, layers)
    with TemporaryDirectory(prefix="remit-plan-") as name:
        folder = Path(name)
        dtype = getattr(config, "dtype", None) or torch.float32
        AutoModelForCausalLM.from_config(smaller, dtype=dtype).save_pretrained(folder / "model")
        vocabulary = config.get_text_config().vocab_size
        make_shards(folder / "packed", vocabulary, PARTS, max(1, rows // PARTS), seq_len)
        ready: list[float] = []
        tokens = 0

        def progress(state: ScoreProgress) -> None:
            nonlocal tokens
            tokens = state.tokens
            ready.extend([perf_counter()] * (state.engines - len(ready)))

        began = perf_counter()
        settings = ScoreConfig(str(folder / "packed"), str(folder / "model"), str(folder / "scored"))
        score(settings, Reference(folder / "model", "random"), progress)
        ended = perf_counter()
    seconds = sum(ended - at for at in ready) / len(ready)
    return tokens, ended - began - seconds, seconds
