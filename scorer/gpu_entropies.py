"""Entropies of logits on a GPU: two reads of the logits, nothing written but the results.

The same numbers as `scorer.logits.entropies`, which on a GPU would take ten passes over [tokens, vocabulary]. Import this in
a process that has Triton alone.

T = tokens, V = vocabulary, E = entropies and log partition sums.
"""

import torch
import triton
import triton.language as tl

BLOCK_ENTRIES, WARPS = 4096, 8


@triton.jit
def _entropies_kernel(out_ptr, logits_ptr, stride, vocabulary, temperature, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + token * stride
    most = float("-inf")
    for first in range(0, vocabulary, BLOCK):
        place = first + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        most = tl.maximum(most, tl.max(logits, axis=0))
    total = 0.0  # of exp(below), below = logit - most
    mean = 0.0  # of exp(below) * below
    hot_total = 0.0  # of exp(below / temperature)
    hot_mean = 0.0
    for first in range(0, vocabulary, BLOCK):
        place = first + tl.arange(0, BLOCK)
        inside = place < vocabulary
        below = tl.load(row_ptr + place, mask=inside, other=0.0).to(tl.float32) - most
        below = tl.where(below < -1e30, -1e30, below)  # 0 * inf is NaN; a NaN itself stays
        power = tl.where(inside, tl.exp(below), 0.0)
        total += tl.sum(power, axis=0)
        mean += tl.sum(power * below, axis=0)
        if WIDTH == 3:
            hot_power = tl.where(inside, tl.exp(below / temperature), 0.0)
            hot_total += tl.sum(hot_power, axis=0)
            hot_mean += tl.sum(hot_power * below, axis=0)
    tl.store(out_ptr + token * WIDTH, tl.log(total) - mean / total)
    if WIDTH == 3:
        # log p = below - log(total), so its power 1 / t sums to hot_total / total^(1 / t)
        tl.store(out_ptr + token * WIDTH + 1, tl.log(hot_total) - hot_mean / hot_total / temperature)
        tl.store(out_ptr + token * WIDTH + 2, tl.log(hot_total) - tl.log(total) / temperature)


def gpu_entropies(logits_TV: torch.Tensor, temperatures: tuple[float, ...]) -> torch.Tensor:
    """float32 [T, E], as `scorer.logits.entropies` gives them. logits_TV: in any dtype, not changed."""
    tokens, vocabulary = logits_TV.shape
    assert logits_TV.stride(1) == 1
    assert temperatures[0] == 1
    width = 2 * len(temperatures) - 1
    out_TE = torch.empty(tokens, width, dtype=torch.float32, device=logits_TV.device)
    _entropies_kernel[(tokens,)](
        out_TE, logits_TV, logits_TV.stride(0), vocabulary, float(temperatures[-1]),
        WIDTH=width, BLOCK=BLOCK_ENTRIES, num_warps=WARPS,
    )  # fmt: skip
    return out_TE
