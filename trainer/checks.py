"""What a base must be before its first step: a plain head, attention within documents, rows that fit.

In: a loaded Base. Out: nothing, or a ValueError that names the model, what it does and what to do instead.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shards.folder import ShardFolder
from shards.modelfolder import require_one_scaling
from trainer.tokenizer import check_tokenizer

if TYPE_CHECKING:
    from trainer.model import Base


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
    if type(head) is not nn.Linear:
        raise ValueError(f"{refusal}its output embedding is {type(head).__name__}, expected torch.nn.Linear")
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
        body = model.get_decoder()(input_ids=input_ids, use_cache=False, return_dict=True).last_hidden_state
    model.train(was_training)
    if len(seen) != 1 or not torch.equal(seen[0], body):
        raise ValueError(f"{refusal}its output embedding is not applied to its last hidden state alone")
    if not torch.equal(logits, torch.linspace(-200, 200, logits.numel(), device=logits.device).view_as(logits)):
        raise ValueError(
            f"{refusal}it changes its logits after the output embedding (soft-capping or scaling), which the loss "
            "head does not do; train a model with a plain head"
        )


@torch.no_grad()
def check_document_attention(base: "Base") -> None:
    """ValueError unless restarting position ids confine this model's attention to each document."""
    model = base.model
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randint(0, base.num_embeddings, (2, 2, 8), generator=generator).to(base.device)
    positions = torch.arange(8, device=base.device).expand(2, 8)
    try:
        packed = base.hidden_states(torch.cat([first, second], 1), torch.cat([positions, positions], 1))[:, 8:]
    except TypeError:
        raise ValueError(
            f"{type(model).__name__}: takes no position ids, so its attention cannot be confined to documents; "
            "train it from shards with --context packed"
        ) from None
    alone = base.hidden_states(second, positions)
    model.train(was_training)
    tolerance = 1e-4 if base.dtype == torch.float32 else 0.1
    difference = (packed - alone).abs().max().item() / max(alone.abs().max().item(), 1e-6)
    if difference > tolerance:
        raise ValueError(
            f"{type(model).__name__}: its attention is not confined to documents (hidden states of a second document "
            f"move by {difference:.2g} with the first one before it, expected at most {tolerance}); "
            "train it from shards with --context packed"
        )


def check_fits(base: "Base", folder: Path, shards: ShardFolder) -> None:
    """ValueError unless this model can take the rows of `shards`: same tokenizer, ids and length in range."""
    shards.require_positions(base.max_position, str(folder))
    require_one_scaling(base.model.config.get_text_config().to_dict(), shards.manifest.seq_len, str(folder))
    check_tokenizer(folder, shards)
    shards.require_embeddings(base.num_embeddings, str(folder))
