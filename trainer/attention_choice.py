"""Which attention over documents a base gets: the fastest that its class and this machine have, tried out before it is used.

In: a loaded base. Out: its attention is set, and a line says which it is and, where it is not the first choice, why (that what it was
loaded with leaves nothing out is made sure of before, by trainer/whole_attention.py). The order: the flash-attn package (trainer/model.py loads the base with it); on a GPU in 16 bits PyTorch's varlen_attn; else its
scaled_dot_product_attention, one document after the other; and where a class does not take its attention from outside, a mask of T x T.
"""

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from trainer.checks import FLASH, TOLERANCE, in_float32, relative
from trainer.distributed import World
from trainer.document_attention import (
    DOCUMENTS,
    HALF,
    TRIAL,
    VARLEN,
    Attention,
    attend_documents,
    attend_varlen,
    locate,
)

if TYPE_CHECKING:
    from trainer.model import Base

LENGTHS = ((1, 7, 1, 12, 3), (12, 12))  # of the documents of two rows
MAX_HEAD_SIZE = 256  # of varlen_attn
VARLEN_TOLERANCE = (
    0.05  # of outputs and gradients in 16 bits, relative to the largest; a position too many is ten times that
)
FAILURES = (ArithmeticError, AttributeError, LookupError, NotImplementedError, RuntimeError, TypeError, ValueError)

SLOWEST_FIRST = ("eager", "sdpa", DOCUMENTS, VARLEN, FLASH)  # others count as the second

Heads = tuple[int, int, int, int]
"""Query heads, key heads, values of a query, values of a value."""


@torch.no_grad()
def choose_attention(base: "Base") -> Attention:
    """Set the attention of a base that trains on documents, and say which it is.

    No form is taken on trust: its hidden states in float32 must be those of each document alone, by the class's own attention.
    """
    model = base.model
    before = model.config._attn_implementation
    if before == FLASH:
        return Attention(before, "the flash-attn package")
    trial = Trial()
    problem = problem_of_class(base, trial)
    if problem:
        return Attention(before, f"masks of T x T ({type(model).__name__} {problem})")
    each = "PyTorch's scaled_dot_product_attention, one document after the other"
    if base.device.type != "cuda" or base.dtype not in HALF:
        found = Attention(DOCUMENTS, each)
    elif problem := trial.beyond_varlen or _problem_of_varlen(base.device, base.dtype, trial.heads):
        found = Attention(DOCUMENTS, f"{each} (varlen_attn {problem})")
    else:
        found = Attention(VARLEN, "PyTorch's varlen_attn")
    model.set_attn_implementation(found.form)
    return found


def agree(base: "Base", world: World) -> None:
    """Have all ranks take the slowest form of attention that one of them has, and its line say so. All ranks take part.

    Their GPUs may differ, or a trial may fail on one of them: other numerics on each, or collectives that never meet.
    """
    own: Any = base.ask(lambda asked: asked.model.config._attn_implementation)
    everyones: list[tuple[str, Attention | None]] = world.from_all((own, base.attention))
    form, attention = min(
        everyones, key=lambda entry: SLOWEST_FIRST.index(entry[0]) if entry[0] in SLOWEST_FIRST else 1
    )
    if all(entry[0] == form for entry in everyones):
        return
    which = ", ".join(str(rank) for rank, entry in enumerate(everyones) if entry[0] == form)
    text = f"{attention.text if attention else form}, on all processes since no better one was found on process {which}"
    base.ask(lambda asked: asked.model.set_attn_implementation(form))
    base.attention = Attention(form, text)


@dataclass
class Trial:
    """What the layers of a class ask of their attention, held against the mask that they would get.

    windows: masks that were made, and how far each lets look back, if not to the beginning. problem: the first difference.
    """

    windows: list[tuple[Tensor, int | None]] = field(default_factory=list)
    heads: set[Heads] = field(default_factory=set)
    problem: str | None = None
    beyond_varlen: str | None = None
    calls: int = 0

    def mask(self, **named: Any) -> Tensor:
        """What transformers calls for a mask."""
        mask_BHTT: Any = sdpa_mask(**(named | {"allow_is_causal_skip": False}))
        self.windows.append((mask_BHTT, named.get("local_size")))
        return mask_BHTT

    def attend(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **named: Any
    ) -> tuple[Tensor, None]:
        """What it calls for the attention of a layer."""
        self.calls += 1
        self.heads.add((query.shape[1], key.shape[1], query.shape[3], value.shape[3]))
        if named.get("softcap") is not None or named.get("s_aux") is not None:
            self.beyond_varlen = "knows no soft-capping and no sinks"
        self.problem = self.problem or self._difference(attention_mask, named)
        return attend_documents(module, query, key, value, **named)

    def _difference(self, mask: Tensor | None, named: dict[str, Any]) -> str | None:
        if named.get("documents") is None:
            return "does not hand on where documents lie"
        made = next(
            (window for own, window in self.windows if mask is not None and own.data_ptr() == mask.data_ptr()), 0
        )
        if mask is None or made == 0:
            return "makes masks of its own"
        if named.get("sliding_window") != made:  # longer than the rows here, so that the mask does not show it
            return f"masks what is {made or 'no'} positions back and tells its attention {named.get('sliding_window')}"
        # a class whose masks take no notice of documents (GPT-OSS) is one whose documents are confined here
        inside_BHTT, wanted_BHTT = _masks(mask.device, made)
        if mask.shape[-2:] != wanted_BHTT.shape[-2:] or not torch.equal(mask & inside_BHTT, wanted_BHTT):
            return "looks at more or less than what precedes in a document"
        return None


def _masks(device: torch.device, window: int | None) -> tuple[Tensor, Tensor]:
    """bool [2, 1, T, T], of the rows of LENGTHS: what is in the same document, and what of it precedes, at most window - 1
    positions back."""
    number_BT = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in LENGTHS]).to(device)
    place_T = torch.arange(number_BT.shape[1], device=device)
    back_TT = place_T[:, None] - place_T
    seen_TT = back_TT >= 0 if window is None else (back_TT >= 0) & (back_TT < window)
    inside_BHTT = number_BT[:, None, :, None] == number_BT[:, None, None]
    return inside_BHTT, inside_BHTT & seen_TT


def problem_of_class(base: "Base", trial: Trial) -> str | None:
    """Why a class cannot have its documents attended to one by one; None where it can, and `trial` knows its heads."""
    model: Any = base.model
    if not (getattr(model, "_supports_attention_backend", False) and model._can_set_attn_implementation()):
        return "does not take its attention from outside"
    before = model.config._attn_implementation
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, base.num_embeddings, (2, sum(LENGTHS[0])), generator=generator).to(base.device)
    positions = torch.stack([torch.cat([torch.arange(length) for length in row]) for row in LENGTHS]).to(base.device)
    AttentionInterface.register(TRIAL, trial.attend)
    AttentionMaskInterface.register(TRIAL, trial.mask)
    try:
        with in_float32(base) as exact:
            model.set_attn_implementation("eager")
            alone = [_each_alone(exact, row_T, lengths) for row_T, lengths in zip(ids, LENGTHS)]
            for form in (TRIAL, DOCUMENTS):
                model.set_attn_implementation(form)
                together_BTH = exact.hidden_states(ids, positions)
    except FAILURES as error:
        return f"cannot do with another attention: {type(error).__name__} {error}".splitlines()[0]
    finally:
        model.set_attn_implementation(before)
        trial.windows.clear()
    if not trial.calls:
        return "does not ask for attention"
    if trial.problem:
        return trial.problem
    apart = relative(together_BTH, torch.cat(alone))
    return None if apart <= TOLERANCE else f"gives other hidden states then, by {apart:.2g}"


def _each_alone(base: "Base", ids_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Hidden states [1, T, H] of a row, from a forward of each of its documents."""
    return torch.cat([base.hidden_states(document_L[None]) for document_L in ids_T.split(lengths)], 1)


def _problem_of_varlen(device: torch.device, dtype: torch.dtype, heads: set[Heads]) -> str | None:
    """Why varlen_attn cannot be used for these heads on this GPU; None where it can. Outputs and gradients are compared."""
    if not {"scale", "window_size", "enable_gqa"} <= inspect.signature(varlen.varlen_attn).parameters.keys():
        return f"of PyTorch {torch.__version__} knows no windows or shared heads"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "needs compute capability 8.0"
    if max(size for *_, query, value in heads for size in (query, value)) > MAX_HEAD_SIZE:
        return f"takes heads of at most {MAX_HEAD_SIZE}"
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS[0])
    documents = locate([length for row in LENGTHS for length in row], device)
    for query_heads, key_heads, size, value_size in sorted(heads):
        shapes = ((query_heads, size), (key_heads, size), (key_heads, value_size), (query_heads, value_size))
        drawn = [torch.randn(2, count, total, width, generator=generator) for count, width in shapes]
        *inputs, upstream = (tensor.to(device, dtype) for tensor in drawn)
        for window in (None, 4):
            results = []
            for attend in (attend_documents, attend_varlen):
                leaves = [tensor.clone().requires_grad_() for tensor in inputs]
                try:
                    with torch.enable_grad(), torch.autocast(device.type, dtype):
                        output, _ = attend(None, *leaves, sliding_window=window, documents=documents)
                    gradients = torch.autograd.grad(output, leaves, upstream.transpose(1, 2))
                except FAILURES as error:
                    return f"does not run here: {type(error).__name__} {error}".splitlines()[0]
                results.append((output.detach(), *gradients))
            apart = max(relative(own, other) for own, other in zip(results[1], results[0]))
            if not apart <= VARLEN_TOLERANCE:
                return f"is off by {apart:.2g} here"
    return None
