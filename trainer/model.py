"""Load a base model and make sure that the loss head computes what its own forward would.

In: a model folder. Out: a Base, whose body gives hidden states and whose output embedding the loss head uses.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from shards.fingerprint import refuse_code_and_pickles
from shards.folder import ShardFolder
from trainer.tokenizer import check_tokenizer


@dataclass
class Base:
    """A causal language model taken apart into body and head.

    dtype: of the matrix products; the weights are kept in float32. max_position: longest sequence, or None
    where the architecture has no bound.
    """

    model: PreTrainedModel
    dtype: torch.dtype

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder layers: the list of modules that holds most of the parameters."""
        lists = [module for module in self.model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
        return list(max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=[]))

    def idle_parameters(self) -> list[nn.Parameter]:
        """Those that no text goes through, such as a vision tower: they have no gradient, for which DDP would wait."""
        used = {id(p) for part in (self.model.get_decoder(), self.head) for p in part.parameters()}
        return [p for p in self.model.parameters() if id(p) not in used]

    @property
    def num_embeddings(self) -> int:
        """Rows of the input embedding; token ids are below it."""
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.shape[0]

    @property
    def max_position(self) -> int | None:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    def autocast(self) -> Any:
        """Context in which matrix products run in `dtype`."""
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext()

    def hidden_states(self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, H] in `dtype`, the input of the output embedding.

        Rows are padded on the right; causal attention keeps the padding out of the tokens before it.
        position_ids_BT: restarting at 0 with each document; transformers then confines attention to the
        documents. None: one sequence per row.
        """
        shape = input_ids_BT.shape
        positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        if position_ids_BT is not None and self.model.config._attn_implementation == "flash_attention_2":
            # transformers looks for documents in batches of one row only; theirs are told apart by their positions
            input_ids_BT, positions = input_ids_BT.view(1, -1), {"position_ids": position_ids_BT.reshape(1, -1)}
        with self.autocast():
            output = self.model.get_decoder()(input_ids=input_ids_BT, use_cache=False, return_dict=True, **positions)
        return output.last_hidden_state.view(*shape, -1).to(self.dtype)

    def prepare(self, activation_checkpointing: bool, compile_layers: str, static: bool = False) -> None:
        """Before the weights are spread over ranks. compile_layers: "auto" (on a GPU), "on", "off".

        static: compile for each shape by itself, and not, as torch does by default, for any shape once it has seen two:
        what a step is made of then depends on the steps before it, which a resumed run has not seen.
        """
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compile_layers == "on" or (compile_layers == "auto" and self.device.type == "cuda"):
            for layer in self.layers:
                layer.compile(dynamic=False if static else None)


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_base(folder: Path, dtype: str, device: torch.device, context: str = "packed") -> Base:
    """Load the model with float32 weights for rows of one sequence (packed) or several (document); ValueError where it is missing, carries code or pickles, or its head is not
    plain."""
    refuse_code_and_pickles(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    # Dropout would add noise to the losses that the weights are made of; mid-training runs without it.
    dropout = {
        name: value
        for name, value in config.to_dict().items()
        if isinstance(value, float) and value > 0 and ("dropout" in name or name.endswith("_pdrop"))
    }
    for name in dropout:
        setattr(config, name, 0.0)
    # PyTorch's own attention is as fast where a row is one sequence, but masks T x T where it holds several
    can_flash = device.type == "cuda" and resolve_dtype(dtype, device) != torch.float32 and is_flash_attn_2_available()
    use_flash = context == "document" and can_flash and architecture_has_flash(config)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation="flash_attention_2" if use_flash else None,
    )
    model, loading = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if loading.get(kind):
            raise ValueError(
                f"{folder}: its weights lack {sorted(map(str, loading[kind]))[0]} ({len(loading[kind])} {kind}); "
                "these would train from random numbers; write the folder again with save_pretrained"
            )
    model.to(device)
    base = Base(model, resolve_dtype(dtype, device))
    for parameter in base.idle_parameters():
        parameter.requires_grad_(False)
    check_plain_head(base)
    model.train()
    return base


def architecture_has_flash(config: Any) -> bool:
    """Whether transformers has flash attention for this architecture."""
    with torch.device("meta"):
        return bool(getattr(AutoModelForCausalLM.from_config(config), "_supports_flash_attn", False))


@contextlib.contextmanager
def _hook(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def check_plain_head(base: Base) -> None:
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
def check_document_attention(base: Base) -> None:
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


def check_fits(base: Base, folder: Path, shards: ShardFolder) -> None:
    """ValueError unless this model can take the rows of `shards`: same tokenizer, ids and length in range."""
    shards.require_positions(base.max_position, str(folder))
    check_tokenizer(folder, shards)
    shards.require_embeddings(base.num_embeddings, str(folder))
