"""The most probable tokens of each place: what an entry can be, and its Arrow arrays.

N = places that have an entry, K = tokens of an entry.
"""

import numpy as np
import pyarrow as pa

# Rounding in 16 bit may add this much to a sum of probabilities that is 1
SUM_TOLERANCE = 1e-2


def fault_of_topk(
    tokens_N: np.ndarray,
    logprobs_N: np.ndarray,
    topk_ids_NK: np.ndarray,
    topk_logprobs_NK: np.ndarray,
    vocab_size: int | None,
    step: float = 0.0,
    largest: float = 0.0,
) -> str | None:
    """Why these cannot be the most probable tokens of a distribution; None if they can.

    tokens_N, logprobs_N: the row's own token at each place and its log-prob. vocab_size: ids are below it, None
    where that is not known. step: what log-probs were rounded to, 0 for not. largest: no log-prob is above.
    """
    if topk_ids_NK.min(initial=0) < 0 or (vocab_size is not None and topk_ids_NK.max(initial=0) >= vocab_size):
        return f"an id is not in 0..{'' if vocab_size is None else vocab_size - 1}"
    ordered_NK = np.sort(topk_ids_NK, axis=1)
    if (ordered_NK[:, 1:] == ordered_NK[:, :-1]).any():
        return "a token stands twice in an entry"
    if not np.isfinite(topk_logprobs_NK).all():
        return "a log-prob is not finite"
    if topk_logprobs_NK.max(initial=largest) > largest:
        return f"a log-prob is {topk_logprobs_NK.max():g}, expected at most {largest:g}"
    if (topk_logprobs_NK[:, 1:] > topk_logprobs_NK[:, :-1]).any():
        return "log-probs do not descend in an entry"
    sums_N = np.exp(topk_logprobs_NK).sum(axis=1, dtype=np.float64)
    most = (1 + SUM_TOLERANCE) * np.exp(step / 2)
    if sums_N.max(initial=0) > most:
        return f"the probabilities of an entry sum to {sums_N.max():g}, expected at most {most:g}"
    own_NK = topk_ids_NK == tokens_N[:, None]
    among_N = own_NK.any(axis=1)
    # at most one of an entry is the own token, so these are in the order of the places
    if not np.array_equal(topk_logprobs_NK[own_NK], logprobs_N[among_N]):
        return "the row's own token has another log-prob there"
    if (logprobs_N[~among_N] > topk_logprobs_NK[~among_N, -1]).any():
        return "the row's own token is more probable than the last of an entry that lacks it"
    return None


def topk_array(values_NK: np.ndarray, present_N: np.ndarray) -> pa.FixedSizeListArray:
    """Arrow array with one entry per place, null where `present_N` is False; what stands there becomes 0, so that the
    bytes depend on nothing else."""
    values_NK[~present_N] = 0
    type_ = pa.list_(pa.from_numpy_dtype(values_NK.dtype), values_NK.shape[1])
    return pa.FixedSizeListArray.from_arrays(pa.array(values_NK.reshape(-1)), type=type_, mask=pa.array(~present_N))
