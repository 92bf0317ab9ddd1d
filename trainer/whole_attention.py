"""Make sure that the attention a base was loaded with does all that the class asks of it.

In: a loaded base. Out: where something is left out, the class's own attention is set, "eager". transformers hands on
soft-capping (Gemma 2, VaultGemma) and sinks (GPT-OSS) to PyTorch's scaled_dot_product_attention, which knows neither, and
computes without them; vLLM, which scores the reference, does not.
"""

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.attention_choice import FAILURES
from trainer.checks import FLASH, TOLERANCE, in_float32, relative
from trainer.document_attention import DOCUMENTS, Attention

if TYPE_CHECKING:
    from trainer.model import Base

EAGER = "eager"
ASKED = {"softcap": "soft-capping of its scores", "s_aux": "sinks"}
KNOWN = {FLASH: {"softcap"}}
"""What a form of attention knows of these."""
TOKENS = 24


@torch.no_grad()
def honour(base: "Base") -> Attention | None:
    """Set the class's own attention where the one that the base was loaded with leaves something out; None where it does not.

    ValueError where the class takes no other one.
    """
    model: Any = base.model
    before = model.config._attn_implementation
    if before == EAGER:
        return None
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, base.num_embeddings, (1, TOKENS), generator=generator).to(base.device)
    with in_float32(base) as exact:
        loaded = model.config._attn_implementation  # PyTorch's in the place of flash-attn, which has no float32
        if loaded == EAGER:  # cannot be listened to
            model.set_attn_implementation(DOCUMENTS)
            loaded = DOCUMENTS
        with listened(loaded) as asked:
            found_BTH = exact.hidden_states(input_ids)
        missing = ", ".join(text for name, text in ASKED.items() if name in asked - KNOWN.get(before, set()))
        own_BTH = _by_class(exact, input_ids, loaded)
    if not missing and (own_BTH is None or loaded != before or relative(found_BTH, own_BTH) <= TOLERANCE):
        return None
    if own_BTH is None:
        raise ValueError(
            f"{type(model).__name__}: its attention is loaded as {before}, which leaves out {missing}, and it takes no other; "
            "train another base"
        )
    model.set_attn_implementation(EAGER)
    return Attention(EAGER, f"the class's own, since {before} leaves out {missing or 'a part of it'}")


def _by_class(base: "Base", input_ids: Tensor, before: str) -> Tensor | None:
    """Hidden states by the class's own attention; None where it cannot be set. The attention is `before` again afterwards."""
    model: Any = base.model
    try:
        model.set_attn_implementation(EAGER)
        return base.hidden_states(input_ids) if model.config._attn_implementation == EAGER else None
    except FAILURES:
        return None
    finally:
        model.set_attn_implementation(before)


@contextlib.contextmanager
def listened(form: str) -> Iterator[set[str]]:
    """What of ASKED the layers of a model ask of this form of attention in the meantime."""
    asked: set[str] = set()
    attend: Any = ALL_ATTENTION_FUNCTIONS.get(form)
    if attend is None:
        yield asked
        return

    def listening(*arguments: Any, **named: Any) -> Any:
        asked.update(name for name in ASKED if named.get(name) is not None)
        return attend(*arguments, **named)

    ALL_ATTENTION_FUNCTIONS[form] = listening
    try:
        yield asked
    finally:
        del ALL_ATTENTION_FUNCTIONS[form]
