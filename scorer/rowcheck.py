"""What a log-prob can be, and what a row of them can be; rounding for storage."""

import numpy as np

POSITIVE_TOLERANCE = 1e-4  # log-softmax rounding may give a positive log-prob this small for a certain token
# A probability of 1 to 24 bits is rare even for a token that is sure to come; half a row of them means that the
# engine has not computed them.
ZERO_SHARE, ZERO_TOKENS = 0.5, 32


def fault_of_row(logprobs: np.ndarray) -> str | None:
    """Why these log-probs of a row, float32 [tokens] as the engine gave them, cannot be right; None if they can."""
    finite = np.isfinite(logprobs)
    if not finite.all():
        return f"{_count(~finite)} not finite, for instance {logprobs[~finite][0]}"
    positive = logprobs > POSITIVE_TOLERANCE
    if positive.any():
        return f"{_count(positive)} positive, for instance {logprobs[positive][0]:g}"
    zero = logprobs == 0
    if len(logprobs) >= ZERO_TOKENS and zero.mean() > ZERO_SHARE:
        return f"{_count(zero)} exactly 0 before rounding"
    return None


def _count(mask: np.ndarray) -> str:
    return f"{int(mask.sum())} of {len(mask)} log-probs are"


def fault_of_ids(input_ids: np.ndarray, num_embeddings: int) -> str | None:
    """Why a model with `num_embeddings` embedding rows cannot read these tokens; None if it can."""
    if input_ids.min() < 0 or input_ids.max() >= num_embeddings:
        bad = input_ids[(input_ids < 0) | (input_ids >= num_embeddings)]
        return f"token id {bad[0]} is not in the reference's embedding, 0..{num_embeddings - 1}"
    return None


def round_logprobs(logprobs: np.ndarray, step: float) -> np.ndarray:
    """At most 0, and rounded to the nearest multiple of `step` (0: exact); -0.0 becomes 0.0. float32 [tokens]."""
    return round_nats(np.minimum(logprobs, np.float32(0)), step)


def round_nats(values: np.ndarray, step: float) -> np.ndarray:
    """Rounded to the nearest multiple of `step` (0: exact); -0.0 becomes 0.0. float32 [tokens]."""
    if not step:
        return values + np.float32(0)
    return (np.rint(values.astype(np.float64) / step) * step + 0.0).astype(np.float32)
