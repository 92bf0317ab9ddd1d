"""Load a base model and make sure that the loss head computes what its own forward would.

In: a model folder. Out: a Base, whose body gives hidden states and whose output embedding the loss head uses.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from shards.modelfolder import max_positions, require_base
from trainer.attention_choice import agree
from trainer.checks import check_plain_head, check_runs
from trainer.distributed import World, spread
from trainer.document_attention import FORMS, Attention, lengths_of, locate
from trainer.expert_products import use_autocast_in_experts
from trainer.noise import silence
from trainer.sharded import Shares, load_sharded
from trainer.weight_map import Unmapped
from trainer.whole_attention import honour

Answer = TypeVar("Answer")

VARIANTS = 64
"""Compiled variants of a layer's code that dynamo keeps."""


@dataclass
class Base:
    """A causal language model taken apart into body and head.

    dtype: of the matrix products; the weights are kept in float32. max_position: longest sequence, or None
    where the architecture has no bound. dropout: the settings of the config, by dotted name, that were set to 0 for training
    (trainer/noise.py). sharding: how `spread` spreads it over the ranks; shares: where each process holds a part of the weights already,
    until then. attention: where one was chosen over what the base was loaded with (trainer/attention_choice.py, whole_attention.py).
    """

    model: PreTrainedModel
    dtype: torch.dtype
    dropout: dict[str, float] = field(default_factory=dict)
    sharding: str = "replicate"
    shares: Shares | None = None
    attention: Attention | None = None

    def ask(self, question: Callable[..., Answer], *more: Any) -> Answer:
        """question(base, *more), which runs the model as it was loaded; of a base in shares all ranks ask."""
        if self.shares is None:
            return question(self, *more)
        answer: Answer = self.shares.ask(lambda: question(self, *more))
        return answer

    @property
    def device(self) -> torch.device:
        model = self.model if self.shares is None else self.shares.asked.model  # not that of a model without values
        return model.device

    @property
    def head(self) -> nn.Linear:
        head = self.model.get_output_embeddings()
        assert isinstance(head, nn.Linear)
        return head

    @property
    def layers(self) -> list[nn.Module]:
        return layers_of(self.model)

    @property
    def num_embeddings(self) -> int:
        """Rows of the input embedding; token ids are below it."""
        embeddings: Any = self.model.get_input_embeddings()
        return embeddings.weight.shape[0]

    @property
    def max_position(self) -> int | None:
        text = self.model.config.get_text_config()
        # by attribute too, because some architectures have other names for it in their config.json
        return max_positions(
            text.to_dict() | {"max_position_embeddings": getattr(text, "max_position_embeddings", None)}
        )

    def autocast(self) -> Any:
        """Context in which matrix products run in `dtype`."""
        mixed = self.dtype != torch.float32
        return torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext()

    def hidden_states(self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None) -> Tensor:
        """Last hidden states [B, T, H] in `dtype`, the input of the output embedding."""
        return self.run_body(input_ids_BT, position_ids_BT)[0]

    def run_body(
        self,
        input_ids_BT: Tensor,
        position_ids_BT: Tensor | None = None,
        routed: bool = False,
        doc_lengths: Sequence[int] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states [B, T, H] in `dtype`; with routed also the router logits of each layer with experts.

        Rows are padded on the right; causal attention keeps the padding out of the tokens before it.
        position_ids_BT: restarting at 0 with each document; transformers then confines attention to the
        documents. None: one sequence per row. doc_lengths: of the same documents, row after row, the padding included, so that a GPU
        need not be asked for them.
        """
        shape = input_ids_BT.shape
        positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        if position_ids_BT is not None and self.model.config._attn_implementation == "flash_attention_2":
            # transformers looks for documents in batches of one row only; theirs are told apart by their positions
            input_ids_BT, positions = input_ids_BT.view(1, -1), {"position_ids": position_ids_BT.reshape(1, -1)}
        options: dict[str, Any] = positions | ({"output_router_logits": True} if routed else {})
        if self.model.config._attn_implementation in FORMS:
            if doc_lengths is None:
                doc_lengths = [shape[1]] * shape[0] if position_ids_BT is None else lengths_of(position_ids_BT)
            options["documents"] = locate(doc_lengths, input_ids_BT.device)
        with self.autocast():
            output = self.model.get_decoder()(input_ids=input_ids_BT, use_cache=False, return_dict=True, **options)
        hidden_BTH = output.last_hidden_state.view(*shape, -1).to(self.dtype)
        return hidden_BTH, tuple(output.router_logits) if routed else ()

    def prepare(
        self,
        activation_checkpointing: bool,
        compile_layers: str,
        static: bool = False,
        swap_layers: Callable[[], None] = lambda: None,
    ) -> None:
        """Before the weights are spread over ranks. compile_layers: "auto" (on a GPU), "on", "off".

        static: compile for each shape by itself, and not, as torch does by default, for any shape once it has seen two:
        what a step is made of then depends on the steps before it, which a resumed run has not seen. swap_layers: called
        before layers are compiled, to put others in their place (--float8).
        """
        if self.shares is not None:
            self.model = self.shares.skeleton()  # its weights come in `spread`
            self.model.train()
        if self.attention is not None and self.model.config._attn_implementation != self.attention.form:
            # of another model than the one that it was tried with
            self.model.set_attn_implementation(self.attention.form)
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.dtype != torch.float32:
            use_autocast_in_experts(self.model)
        swap_layers()
        if compile_layers == "on" or (compile_layers == "auto" and self.device.type == "cuda"):
            # All layers share their code, of which dynamo keeps 8 variants by default: kinds of layers, shapes, with and without
            # gradients. An evaluation before the first step would use them up, and training would run as it is.
            torch._dynamo.config.recompile_limit = max(VARIANTS, torch._dynamo.config.recompile_limit)  # type: ignore[attr-defined]
            for layer in self.layers:
                layer.compile(dynamic=False if static else None)

    def spread(self, module: nn.Module, world: World) -> nn.Module:
        """What to call for the forward of `module`, which has the prepared model as its `model`, spread over the ranks."""
        shares, self.shares = self.shares, None
        spread_module = spread(
            module, self.layers, world, self.sharding, self.dtype, None if shares is None else shares.mesh
        )
        if shares is not None:
            shares.settle(module)
        if spread_module is module and world.size > 1 and self.dtype != torch.float32:
            # FSDP2 gathers the embedding in 16 bits, and what layers add to would be rounded to 16 bits after each of them
            self.model.get_input_embeddings().register_forward_hook(in_float32_from_here)
        return spread_module


def in_float32_from_here(module: nn.Module, inputs: Any, embedded_BTH: Tensor) -> Tensor:
    """A forward hook of the input embedding: the sum that all layers add to is float32, as it is without sharding."""
    return embedded_BTH.float()


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 on a GPU that has it, float32 elsewhere."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def load_base(
    folder: Path,
    dtype: str,
    device: torch.device,
    context: str = "packed",
    world: World | None = None,
    sharding: str = "replicate",
    note: Callable[[str], None] = lambda line: None,
) -> Base:
    """Load the model with float32 weights for rows of one sequence (packed) or several (document); ValueError where it is missing, carries code or pickles, or its head is not
    plain.

    world, sharding: with "full" or "hybrid" each process holds its share of the weights, and all take part in what runs the
    model. note: told where the files cannot be read in shares, so that each process holds all of them for a while.
    """
    require_base(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    dropout = silence(config)
    # PyTorch's own attention is as fast where a row is one sequence, but masks T x T where it holds several
    can_flash = device.type == "cuda" and resolve_dtype(dtype, device) != torch.float32 and is_flash_attn_2_available()
    use_flash = context == "document" and can_flash and architecture_has_flash(config)
    if world is not None:  # on all machines or on none: the checks of a base in shares are collectives
        use_flash = int(world.sum(torch.tensor(int(use_flash)))) == world.size
    attention = "flash_attention_2" if use_flash else None
    base = None
    if world is not None and world.size > 1 and sharding != "replicate":
        try:
            shares = load_sharded(folder, config, attention, world, sharding, freeze_idle, layers_of)
            base = Base(shares.asked.model, resolve_dtype(dtype, device), dropout, sharding, shares)
        except Unmapped as reason:
            note(f"{folder}: each process holds all of its weights before they are sharded, since {reason}")
    if base is None:
        base = Base(load_whole(folder, config, attention).to(device), resolve_dtype(dtype, device), dropout, sharding)
        freeze_idle(base.model)
    base.attention = base.ask(honour)
    if world is not None:
        agree(base, world)
    base.ask(check_plain_head)
    base.ask(check_runs)
    base.model.train()
    return base


def load_whole(folder: Path, config: Any, attention: str | None) -> Any:
    """The model with all of its weights, float32, on the CPU; ValueError where its files lack some."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder,
        config=config,
        dtype=torch.float32,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation=attention,
    )
    model, loading = loaded
    for kind in ("missing_keys", "mismatched_keys"):
        if loading.get(kind):
            raise ValueError(
                f"{folder}: its weights lack {sorted(map(str, loading[kind]))[0]} ({len(loading[kind])} {kind}); "
                "these would train from random numbers; write the folder again with save_pretrained"
            )
    return model


def layers_of(model: Any) -> list[nn.Module]:
    """The decoder layers: the list of modules that holds most of the parameters."""
    lists = [module for module in model.get_decoder().modules() if isinstance(module, nn.ModuleList)]
    return list(max(lists, key=lambda module: sum(p.numel() for p in module.parameters()), default=[]))


def freeze_idle(model: Any) -> None:
    """Take the gradients from weights that no text goes through, such as a vision tower: they have none, and DDP would wait."""
    used = {id(p) for part in (model.get_decoder(), model.get_output_embeddings()) for p in part.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in used:
            parameter.requires_grad_(False)


def architecture_has_flash(config: Any) -> bool:
    """Whether transformers has flash attention for this architecture."""
    with torch.device("meta"):
        return bool(getattr(AutoModelForCausalLM.from_config(config), "_supports_flash_attn", False))
