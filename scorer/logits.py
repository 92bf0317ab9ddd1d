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


MIXED_IDS = (7, 31, 101, 211)
"""Whose log-probs decide the draws of a place, beside its own: low ones, since an engine may pad its vocabulary."""


@dataclass(frozen=True)
class Kept:
    """What is kept beside a token's own log-prob. sample_k: tokens to draw from the distribution. temperatures: at which the entropy is asked for; 1 is the first, if any.

    At any other temperature the log partition sum is kept too (shards/entropy.py).
    """

    top_k: int = 0
    temperatures: tuple[float, ...] = ()
    sample_k: int = 0

    @property
    def num_entropies(self) -> int:
        """Values of `entropies`."""
        return max(0, 2 * len(self.temperatures) - 1)

    @property
    def width(self) -> int:
        """Columns of `token_scores`."""
        return 1 + self.top_k + self.sample_k + self.num_entropies

    @property
    def places(self) -> tuple[slice, slice, slice]:
        """Columns of the most probable tokens, of the drawn ones and of the entropies."""
        first, second = 1 + self.top_k, 1 + self.top_k + self.sample_k
        return slice(1, first), slice(first, second), slice(second, self.width)


def token_scores(logits_TV: Any, token_ids_T: Any, kept: Kept, block_entries: int) -> tuple[Any, Any]:
    """Ids, int32, and values, float32, both [T, 1 + K + S + E]: log-probs of the token itself and of the K best, the S drawn
    tokens, which have no values (0), then entropies, which have no ids (0).

    At most block_entries logits at a time are turned into log-probs.
    """
    import torch

    tokens, vocabulary = logits_TV.shape
    rows, (best, drawn, last) = max(1, block_entries // vocabulary), kept.places
    ids_TW = torch.zeros(tokens, kept.width, dtype=torch.int32, device=logits_TV.device)
    values_TW = torch.empty(tokens, kept.width, dtype=torch.float32, device=logits_TV.device)
    ids_TW[:, 0] = token_ids_T
    for start in range(0, tokens, rows):
        place = slice(start, start + rows)
        block_TV = logits_TV[place].log_softmax(dim=-1, dtype=torch.float32)
        values_TW[place, :1] = block_TV.gather(-1, token_ids_T[place, None])
        if kept.top_k:
            ids_TW[place, best], values_TW[place, best] = most_probable(block_TV, kept.top_k)
        if kept.sample_k:
            ids_TW[place, drawn] = draws(block_TV, token_ids_T[place], kept.sample_k).int()
            values_TW[place, drawn] = 0
        if kept.temperatures:
            values_TW[place, last] = entropies(block_TV, kept.temperatures)
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


def draws(logprobs_TV: Any, token_ids_T: Any, count: int) -> Any:
    """Ids, int64 [T, S], drawn as shards/samples.py says; u comes from the bits of the place's own numbers, so that the same
    logits give the same ids, whichever engine has them and however often."""
    import torch

    probabilities_TV = logprobs_TV.exp()
    sums_TV = probabilities_TV.cumsum(-1, dtype=torch.float64)
    own_T = logprobs_TV.gather(-1, token_ids_T[:, None].long())[:, 0]
    # of a token that is nearly sure the log-prob has few bits left, others have more
    others = [logprobs_TV[:, token % logprobs_TV.shape[1]] for token in MIXED_IDS]
    uniform_T1 = _uniform(token_ids_T.long(), own_T, logprobs_TV.amax(-1), *others)[:, None]
    points_TS = (torch.arange(count, device=sums_TV.device) + uniform_T1) / count * sums_TV[:, -1:]
    return torch.searchsorted(sums_TV, points_TS, right=True).clamp_(max=sums_TV.shape[1] - 1)


def _uniform(ids_T: Any, *values_T: Any) -> Any:
    """float64 in 0..1, [T], from the bits of ids and of float32 values: the mixing steps of splitmix64."""
    import torch

    mixed_T = ids_T
    for value_T in (None, *values_T):
        if value_T is not None:
            mixed_T = mixed_T ^ value_T.contiguous().view(torch.int32).long()
        mixed_T = mixed_T - 0x61C8864680B583EB
        mixed_T = (mixed_T ^ (mixed_T >> 30 & (1 << 34) - 1)) * -0x40A7B892E31B1A47
        mixed_T = (mixed_T ^ (mixed_T >> 27 & (1 << 37) - 1)) * -0x6B2FB644ECCEEE15
        mixed_T = mixed_T ^ (mixed_T >> 31 & (1 << 33) - 1)
    return (mixed_T >> 11 & (1 << 53) - 1).double() / (1 << 53)


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
