"""Attention within documents, each of them by itself: no mask of T x T, and nothing computed that such a mask throws away.

In: queries, keys and values of rows that hold documents, and where these lie. Out: what causal attention gives that ends where a
document begins. Two forms, under the names that transformers finds them by: DOCUMENTS calls PyTorch's
scaled_dot_product_attention once per document, on any device in any dtype; VARLEN calls its varlen_attn once, on a GPU in
16 bits. trainer/attention_choice.py decides which one a base gets, after a TRIAL.

B rows of T positions, N = B T, documents of L positions, H heads of E values (keys and values may have fewer heads).
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

DOCUMENTS, VARLEN, TRIAL = "remit_documents", "remit_varlen", "remit_trial"
FORMS = (DOCUMENTS, VARLEN, TRIAL)
HALF = (torch.bfloat16, torch.float16)
PIECE = 512  # queries of a document that are taken at once where a window is shorter than the document


@dataclass(frozen=True)
class Attention:
    """What a base has. form: what transformers calls it; text: for a line and for run.json."""

    form: str
    text: str


@dataclass(frozen=True)
class Documents:
    """Where the documents of a micro-batch lie.

    lengths: positions of each, row after row, the padding included. starts: int32, on the device: the first of the N positions
    of each, then N, repeated until the number of entries is one more than a power of two. longest: the longest one's length,
    rounded up to a power of two. Rounded, since each shape is compiled anew; documents without positions cost nothing.
    """

    lengths: tuple[int, ...]
    starts: Tensor
    longest: int


def locate(lengths: Iterable[int], device: torch.device) -> Documents:
    """The Documents of these lengths; a GPU is not waited for."""
    own = tuple(length for length in lengths if length)
    ends = torch.tensor(own, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    starts = torch.full((_power_of_two(len(own)) + 1,), int(ends[-1]), dtype=torch.int32)
    starts[0] = 0
    starts[1 : len(own) + 1] = ends
    if device.type == "cuda":
        starts = starts.pin_memory().to(device, non_blocking=True)
    return Documents(own, starts, _power_of_two(max(own)))


def _power_of_two(number: int) -> int:
    """The least one that is not smaller."""
    return 1 << (number - 1).bit_length()


def lengths_of(position_ids_BT: Tensor) -> list[int]:
    """Lengths of the documents, row after row, where positions restart at 0 with each. Waits for a GPU."""
    begins_BT = position_ids_BT == 0
    begins_BT[:, 0] = True
    starts = begins_BT.flatten().nonzero()[:, 0].tolist()
    return [end - start for start, end in zip(starts, [*starts[1:], begins_BT.numel()])]


@torch.compiler.disable  # the loop would be compiled anew for each set of lengths
def attend_documents(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers asks for it, document by document: [B, T, H, E] from queries [B, H, T, E].

    sliding_window: positions that are looked back at, oneself included. softcap: scores are brought below it by a tanh. s_aux: of
    each head a score that takes its part of the softmax and adds nothing. documents: None: each row is one. attention_mask is not
    looked at. ValueError for what is asked for besides and would change the outcome.
    """
    _require_plain(others)
    batch, _, length, size = query.shape
    lengths = list(documents.lengths) if documents else [length] * batch
    scale = size**-0.5 if scaling is None else scaling
    # split, since the gradients of its parts are put together once, and those of slices each take a whole tensor
    parts = [_flat(tensor_BHTE).split(lengths) for tensor_BHTE in (query, key, value)]
    outputs = []
    for query_LHE, key_LHE, value_LHE in zip(*parts):
        query_1HLE, key_1HLE, value_1HLE = (part.transpose(0, 1)[None] for part in (query_LHE, key_LHE, value_LHE))
        output_1HLE = _attend_one(query_1HLE, key_1HLE, value_1HLE, scale, sliding_window, softcap, s_aux)
        outputs.append(output_1HLE[0].transpose(0, 1))
    return torch.cat(outputs).unflatten(0, (batch, length)), None


def attend_varlen(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    documents: Documents | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """`attend_documents` in one call of torch.nn.attention.varlen; where that cannot do it, in float32 for instance, it is that."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    if documents is None or dtype not in HALF or softcap is not None or s_aux is not None:
        return attend_documents(
            module, query, key, value, scaling=scaling, sliding_window=sliding_window, softcap=softcap, s_aux=s_aux,
            documents=documents, **others,
        )  # fmt: skip
    _require_plain(others)
    batch, heads, length, size = query.shape
    width = -(-max(size, value.shape[-1]) // 8) * 8  # its kernels take multiples of 8, the same for all three
    query_NHE, key_NHE, value_NHE = (
        pad(_flat(tensor_BHTE).to(dtype), (0, width - tensor_BHTE.shape[-1])) for tensor_BHTE in (query, key, value)
    )
    output_NHE: Any = varlen.varlen_attn(
        query_NHE,
        key_NHE,
        value_NHE,
        documents.starts,
        documents.starts,
        documents.longest,
        documents.longest,
        scale=size**-0.5 if scaling is None else scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),  # it does not count oneself
        enable_gqa=key.shape[1] != heads,
    )
    return output_NHE[..., : value.shape[-1]].unflatten(0, (batch, length)), None


AttentionInterface.register(DOCUMENTS, attend_documents)
AttentionInterface.register(VARLEN, attend_varlen)
# no masks are registered under these names: transformers then makes none


def _flat(tensor_BHTE: Tensor) -> Tensor:
    """[N, H, E]"""
    return tensor_BHTE.transpose(1, 2).flatten(0, 1)


def _require_plain(others: dict[str, Any]) -> None:
    is_given = {
        "dropout": bool(others.get("dropout")),
        "position_bias": others.get("position_bias") is not None,
        "is_causal=False": others.get("is_causal") is False,
    }
    for name in (name for name, given in is_given.items() if given):
        raise ValueError(f"attention over documents: {name} is asked for, which it does not know")


def _attend_one(
    query_1HLE: Tensor,
    key_1HLE: Tensor,
    value_1HLE: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """Causal attention over one document, [1, H, L, E]."""
    length, heads = query_1HLE.shape[2], query_1HLE.shape[1]
    if key_1HLE.shape[1] != heads:
        key_1HLE, value_1HLE = (
            shared.repeat_interleave(heads // shared.shape[1], 1) for shared in (key_1HLE, value_1HLE)
        )
    plain = softcap is None and sinks_H is None
    if plain and (window is None or length <= window):
        return scaled_dot_product_attention(query_1HLE, key_1HLE, value_1HLE, is_causal=True, scale=scale)
    outputs, first = [], 0
    for piece_1HPE in query_1HLE.split(PIECE, 2):
        last = first + piece_1HPE.shape[2]
        begin = 0 if window is None else max(0, first - window + 1)
        keys_1HKE, values_1HKE = (tensor_1HLE[:, :, begin:last] for tensor_1HLE in (key_1HLE, value_1HLE))
        back_PK = (
            torch.arange(first, last, device=query_1HLE.device)[:, None]
            - torch.arange(begin, last, device=query_1HLE.device)
        )  # fmt: skip
        seen_PK = back_PK >= 0 if window is None else (back_PK >= 0) & (back_PK < window)
        if plain:
            output = scaled_dot_product_attention(piece_1HPE, keys_1HKE, values_1HKE, attn_mask=seen_PK, scale=scale)
        else:
            output = _by_scores(piece_1HPE, keys_1HKE, values_1HKE, seen_PK, scale, softcap, sinks_H)
        outputs.append(output)
        first = last
    return torch.cat(outputs, 2)


def _by_scores(
    query_1HPE: Tensor,
    key_1HKE: Tensor,
    value_1HKE: Tensor,
    seen_PK: Tensor,
    scale: float,
    softcap: float | None,
    sinks_H: Tensor | None,
) -> Tensor:
    """The same with all scores in memory, for what PyTorch's own attention does not know."""
    scores_1HPK = (query_1HPE @ key_1HKE.transpose(2, 3)).float() * scale
    if softcap is not None:
        scores_1HPK = softcap * torch.tanh(scores_1HPK / softcap)
    scores_1HPK = scores_1HPK.masked_fill(~seen_PK, -torch.inf)
    if sinks_H is not None:
        sinks_1HP1 = sinks_H.float().view(1, -1, 1, 1).expand(*scores_1HPK.shape[:3], 1)
        scores_1HPK = torch.cat([scores_1HPK, sinks_1HP1], -1)
    shares_1HPK = scores_1HPK.softmax(-1)[..., : key_1HKE.shape[2]]
    return shares_1HPK.to(value_1HKE.dtype) @ value_1HKE
