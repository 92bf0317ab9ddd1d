"""What a base must be before its first step: a plain head, attention within documents, rows that fit.

In: a loaded Base. Out: nothing, or a ValueError that names the model, what it does and what to do instead.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from shards.folder import ShardFolder
from shards.modelfolder import require_one_scaling
from trainer.document_attention import DOCUMENTS, VARLEN

if TYPE_CHECKING:
    from trainer.model import Base

FLASH = "flash_attention_2"
TOLERANCE = 1e-4  # of float32 sums in another order, relative to the largest hidden state
EXACT = 1e-5  # where shapes are the same, and nothing but what experts are grouped with is added up otherwise
FLASH_TOLERANCE = 0.02  # of bfloat16 in tiles of other sizes


@contextlib.contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check_plain_head(base: "Base") -> None:
    """ValueError unless the model's logits are its output embedding applied to its last hidden state.

    Soft-capping, logit scaling and the like change what a loss must compute. Rather than by config names,
    which each architecture chooses anew, they are found by running the model: the output embedding is made
    to return a known pattern, wide enough that no cap or factor leaves it alone, and must come out as it is;
    and what went into it must be the last hidden state of the body.
    """
    model, name = base.model, type(base.model).__name__
    refusal = f"{name}: cannot be trained here: "
    head = model.get_output_embeddings()
    kind = type(head).__mro__[2] if isinstance(head, FSDPModule) else type(head)  # FSDP2 makes a class of its own of it
    if kind is not nn.Linear:
        raise ValueError(f"{refusal}its output embedding is {kind.__name__}, expected torch.nn.Linear")
    seen: list[Tensor] = []

    def replace(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen.append(inputs[0])
        return torch.linspace(-200, 200, output.numel(), device=output.device).view_as(output)

    was_training = model.training
    model.eval()
    input_ids = torch.arange(5, device=base.device).remainder(base.num_embeddings)[None]
    with _hook(head.register_forward_hook(replace)), base.autocast():
        logits = model(input_ids=input_ids, use_cache=False).logits
    with base.autocast():
        output = model.get_decoder()(input_ids=input_ids, use_cache=False, return_dict=True)
    body = getattr(output, "last_hidden_state", None)
    model.train(was_training)
    if body is None:
        raise ValueError(f"{refusal}its decoder gives no hidden states, as transformers has it; train another base")
    if len(seen) != 1 or not torch.equal(seen[0], body):
        raise ValueError(f"{refusal}its output embedding is not applied to its last hidden state alone")
    if not torch.equal(logits, torch.linspace(-200, 200, logits.numel(), device=logits.device).view_as(logits)):
        raise ValueError(
            f"{refusal}it changes its logits after the output embedding (soft-capping or scaling), which the loss "
            "head does not do; train a model with a plain head"
        )


def relative(one: Tensor, other: Tensor) -> float:
    """Largest difference, in units of the largest value."""
    return (one.float() - other.float()).abs().max().item() / max(other.float().abs().max().item(), 1e-6)


@contextlib.contextmanager
def in_float32(base: "Base") -> Iterator["Base"]:
    """The base in evaluation, without autocast and without the forms of attention that have no float32."""
    model: Any = base.model
    was_training, attention = model.training, model.config._attn_implementation
    model.eval()
    if attention == FLASH:
        model.set_attn_implementation("sdpa" if getattr(model, "_supports_sdpa", False) else "eager")
    elif attention == VARLEN:
        model.set_attn_implementation(DOCUMENTS)
    try:
        yield replace(base, dtype=torch.float32)
    finally:
        model.train(was_training)
        if attention in (FLASH, VARLEN):
            model.set_attn_implementation(attention)


@torch.no_grad()
def check_runs(base: "Base") -> None:
    """ValueError unless the body looks back alone, and computes the same in training, each time, as in evaluation.

    Settings that are known to be noise are 0 by now (trainer/noise.py); some models add more, which none of their
    settings names.
    """
    name = type(base.model).__name__
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(0, base.num_embeddings, (1, 24), generator=generator).to(base.device)
    other_end = input_ids.clone()
    other_end[:, 16:] = (other_end[:, 16:] + 1) % base.num_embeddings
    devices = [base.device] if base.device.type == "cuda" else []
    with torch.random.fork_rng(devices), in_float32(base) as exact:
        expected = exact.hidden_states(input_ids)
        ahead = relative(exact.hidden_states(other_end)[:, :16], expected[:, :16])
        base.model.train()
        noise = max(relative(exact.hidden_states(input_ids), expected) for _ in range(2))
    if ahead > EXACT:
        raise ValueError(
            f"{name}: is no causal language model: hidden states move by {ahead:.2g} with the tokens that follow, expected 0; "
            "give a model that reads from left to right alone"
        )
    if noise > TOLERANCE:
        raise ValueError(
            f"{name}: is not the same in training as in evaluation (hidden states move by {noise:.2g}, expected at most "
            f"{TOLERANCE:g}): it adds noise that no setting of its config switches off, which would enter the losses; "
            "mid-train another base"
        )


@torch.no_grad()
def check_document_attention(base: "Base", seq_len: int = 0) -> None:
    """ValueError unless restarting position ids confine this model's attention to each document.

    Asked in float32, where the least that leaks shows: softmax attention gets a mask, but the state of linear attention,
    of state-space layers and of short convolutions may run on. With the forms of attention that have 16 bits alone and take all
    rows of a micro-batch as one, also as it will run. seq_len: tokens of the rows that it will train on.
    """
    name, remedy = type(base.model).__name__, "train it from shards with --context packed"
    chunk = getattr(base.model.config.get_text_config(), "attention_chunk_size", None)
    if chunk and seq_len > chunk:
        raise ValueError(
            f"{name}: attends within chunks of {chunk} tokens (attention_chunk_size), which begin where the row begins and not "
            f"its documents, and the rows have {seq_len} tokens, expected at most {chunk}; {remedy}"
        )
    with in_float32(base) as exact:
        try:
            moves = {"with the first one before it": _document_leak(exact), **_swapped_leaks(exact)}
        except TypeError:
            raise ValueError(
                f"{name}: takes no position ids, so its attention cannot be confined to documents; {remedy}"
            ) from None
    limits = {what: TOLERANCE if what.startswith("with") else EXACT for what in moves}
    if base.model.config._attn_implementation in (FLASH, VARLEN):
        flash = {f"{what}, in {base.dtype}": value for what, value in _swapped_leaks(base).items()}
        limits |= dict.fromkeys(flash, FLASH_TOLERANCE)
        moves |= flash
    for what, value in moves.items():
        if not value <= limits[what]:
            raise ValueError(
                f"{name}: its attention is not confined to documents (hidden states of a second document move by {value:.2g} "
                f"{what}, expected at most {limits[what]:g}); {remedy}"
            )


def _documents(base: "Base") -> tuple[Tensor, Tensor]:
    """Token ids of documents, [4, 2, 12], and positions of two documents in a row, [2, 24]."""
    generator = torch.Generator().manual_seed(0)
    documents = torch.randint(0, base.num_embeddings, (4, 2, 12), generator=generator).to(base.device)
    positions = torch.arange(12, device=base.device).repeat(2).expand(2, -1)
    return documents, positions


def _document_leak(base: "Base") -> float:
    """How far the second documents of two rows are from themselves alone."""
    (first, second, *_), positions = _documents(base)
    packed = base.hidden_states(torch.cat([first, second], 1), positions)[:, 12:]
    return relative(packed, base.hidden_states(second, positions[:, :12]))


def _swapped_leaks(base: "Base") -> dict[str, float]:
    """How far documents move where nothing changes but the document before, or the other row: shapes stay the same."""
    (first, second, other, another), positions = _documents(base)
    rows = torch.cat([first, second], 1)
    before = base.hidden_states(rows, positions)
    replaced = base.hidden_states(torch.cat([other, second], 1), positions)
    neighbour = torch.cat([rows[:1], torch.cat([other, another], 1)[1:]])
    above = torch.cat([torch.cat([other, another], 1)[:1], rows[1:]])
    return {
        "as the first one is replaced": relative(replaced[:, 12:], before[:, 12:]),
        "as the row below is replaced": relative(base.hidden_states(neighbour, positions)[0], before[0]),
        "as the row above is replaced": relative(base.hidden_states(above, positions)[1], before[1]),
    }


def check_fits(base: "Base", folder: Path, shards: ShardFolder) -> None:
    """ValueError unless this model can take the rows of `shards`: ids and length in range; of the tokenizer see there."""
    shards.require_positions(base.max_position, str(folder))
    require_one_scaling(base.model.config.get_text_config().to_dict(), shards.manifest.seq_len, str(folder))
    shards.require_embeddings(base.num_embeddings, str(folder))
