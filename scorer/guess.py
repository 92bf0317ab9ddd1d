"""Whether a reference knows the rows' ids: how its log-probs of them stand against a guess.

In: what a transformers forward says of the canary's prompts. Out: a ValueError, or a line. It is the only sign where a
reference has no tokenizer to compare, and a weak one: of SmolLM2 on licence texts, -3.2 nat with its own ids, -12.5 with
permuted ones, -10.1 with those of Gemma 3 that it has, which repeat themselves; a guess is -10.8.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from scorer.canary import Forwards
from scorer.engine import EngineConfig
from scorer.tokenizer import has_tokenizer

MARGIN = 1.25  # nat: random models with large weights are up to 0.9 below a guess, as they are sure of anything


def mean_logprob(forwards: Forwards) -> float | None:
    """Mean log-prob in nats that the float32 forward gives the tokens of the prompts; None where no number is finite."""
    logprobs = np.concatenate([np.zeros(0), *(answer.logprobs for answer in forwards.expected)]).astype(np.float64)
    finite = logprobs[np.isfinite(logprobs)]
    return float(finite.mean()) if len(finite) else None


def require_better_than_a_guess(forwards: Forwards, vocab_size: int, model: Path) -> None:
    """ValueError where the model predicts the rows clearly worse than one that holds all its tokens for equally probable.

    A trained model does on ids that mean something else to it. A random one, which knows nothing, is near a guess.
    """
    mean, guess = mean_logprob(forwards), -float(np.log(vocab_size))
    if mean is not None and mean < guess - MARGIN:
        raise ValueError(
            f"{model}: its log-probs of the rows' tokens are {mean:.2f} nat in the mean by a float32 transformers forward, those of a "
            f"guess among its {vocab_size:,} tokens {guess:.2f}, expected better: the rows' ids are those of another tokenizer, "
            "or its weights are damaged; pack with the reference's own tokenizer, or --no-canary if the corpus is so"
        )


def instead_of_tokenizer(forwards: Forwards, vocab_size: int, model: Path) -> tuple[str, dict[str, float | None]]:
    """A line, and its numbers, about what tells of a model without a tokenizer whether the rows' ids are its own."""
    mean, guess = mean_logprob(forwards), -float(np.log(vocab_size))
    found = (
        "nothing else was compared"
        if mean is None
        else f"its log-probs of the first rows are {mean:.2f} nat in the mean"
    )
    return f"{model}: its tokenizer is not compared, it has none; {found}, a guess has {guess:.2f}", {
        "mean_logprob": mean,
        "guess": guess,
    }


class GuessCheck:
    """Looks at the forwards once, before a part is scored. tell: an event for the log, a line, and its numbers."""

    def __init__(self, engine: EngineConfig, tell: Callable[..., None]) -> None:
        self._engine, self._tell, self._looked = engine, tell, False

    def look(self, forwards: Forwards | None) -> None:
        """ValueError where these are worse than a guess; a line where the model has no tokenizer. None: not known yet."""
        if forwards is None or self._looked:
            return
        self._looked, engine = True, self._engine
        if engine.kind != "fake":
            require_better_than_a_guess(forwards, engine.vocab_size, engine.model)
        if not has_tokenizer(engine.model):
            line, facts = instead_of_tokenizer(forwards, engine.vocab_size, engine.model)
            self._tell("no_tokenizer", line, **facts)
