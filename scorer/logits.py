"""What is kept of a model's logits: the log-probs of the tokens, of the most probable ones, and entropies.

The logits go through a float32 log-softmax in blocks that stay in a core's cache, and no token is ranked against the whole
vocabulary: of both, vLLM's own path makes passes over [tokens, vocabulary].

T = tokens, V = vocabulary, K = most probable tokens that are asked for, E = entropies and log partition sums that are
asked for; both may be 0.
"""

from dataclasses import dataclass
from typing import Any

LEAST = (
    -1e30
)  # for a log-prob of -inf, as of padding: a probability of 0 adds nothing to an entropy, and 0 * inf is NaN


@dataclass(frozen=True)
class Kept:
    """What is kept beside a token's own log-prob. temperatures: at which the entropy is asked for; 1 is the first, if any.

    At any other temperature the log partition sum is kept too (shards/entropy.py).
    """

    top_k: int = 0
    temperatures: tuple[float, ...] = ()

    @property
    def num_entropies(self) -> int:
        """Values of `entropies`."""
        return max(0, 2 * len(self.temperatures) - 1)

    @property
    def width(self) -> int:
        """Columns of `token_scores`."""
        return 1 + self.top_k + self.num_entropies


def token_scores(logits_TV: Any, token_ids_T: Any, kept: Kept, block_entries: int) -> tuple[Any, Any]:
    """Ids, int32, and values, float32, both [T, 1 + K + E]: log-probs of the token itself and of the K best, then entropies.

    The last E ids are 0. At most block_entries logits at a time are turned into log-probs.
    """
    import torch

    tokens, vocabulary = logits_TV.shape
    rows, end = max(1, block_entries // vocabulary), 1 + kept.top_k
    ids_TW = torch.zeros(tokens, kept.width, dtype=torch.int32, device=logits_TV.device)
    values_TW = torch.empty(tokens, kept.width, dtype=torch.float32, device=logits_TV.device)
    ids_TW[:, 0] = token_ids_T
    for start in range(0, tokens, rows):
        place = slice(start, start + rows)
        block_TV = logits_TV[place].log_softmax(dim=-1, dtype=torch.float32)
        values_TW[place, :1] = block_TV.gather(-1, token_ids_T[place, None])
        if kept.top_k:
            ids_TW[place, 1:end], values_TW[place, 1:end] = most_probable(block_TV, kept.top_k)
        if kept.temperatures:
            values_TW[place, end:] = entropies(block_TV, kept.temperatures)
    return ids_TW, values_TW


def most_probable(logprobs_TV: Any, top_k: int) -> tuple[Any, Any]:
    """Ids, int64, and log-probs, float32, both [T, K], by descending log-prob, the lower id first where two are equal.

    16-bit logits have many equal values. torch.topk leaves open which of those at the K-th place it takes, and that
    differs between devices and releases; here the lowest ids are taken.
    """
    import torch

    values_TK, ids_TK = logprobs_TV.topk(top_k, dim=-1)
    last_T1 = values_TK[:, -1:]
    equal_TV = logprobs_TV == last_T1
    above_T = (values_TK > last_T1).sum(-1)  # the places of an entry that are not open
    row, token = equal_TV.nonzero(as_tuple=True)  # rows ascending, and ids in each
    counts_T = equal_TV.sum(-1)
    first_T = counts_T.cumsum(0) - counts_T
    place = above_T[row] + torch.arange(len(row), device=row.device) - first_T[row]
    taken = place < top_k
    ids_TK[row[taken], place[taken]] = token[taken]
    ids_TK = ids_TK.sort(dim=-1).values
    ordered = logprobs_TV.gather(-1, ids_TK).sort(dim=-1, descending=True, stable=True)
    return ids_TK.gather(-1, ordered.indices), ordered.values


def entropies(logprobs_TV: Any, temperatures: tuple[float, ...]) -> Any:
    """float32 [T, E]: the entropy at temperature 1, then at any other one the entropy and the log partition sum.

    logprobs_TV, float32, is changed.
    """
    import torch

    logprobs_TV.clamp_(min=LEAST)  # NaN stays
    found = []
    for temperature in temperatures:
        scaled_TV = logprobs_TV if temperature == 1 else logprobs_TV / temperature
        shares_TV = scaled_TV.softmax(-1)  # quicker than exp on a CPU, and cannot overflow
        log_partition_T = scaled_TV.amax(-1) - shares_TV.amax(-1).log()
        sum_T = shares_TV.sum(-1)  # 1 but for rounding
        entropy_T = log_partition_T - shares_TV.mul_(scaled_TV).sum(-1) / sum_T
        found += [entropy_T] if temperature == 1 else [entropy_T, log_partition_T]
    return torch.stack(found, dim=-1)
