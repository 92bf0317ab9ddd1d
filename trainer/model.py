"""Load a base model and make sure that the loss head computes what its own forward would.

In: a model folder. Out: a Base, whose body gives hidden states and whose output embedding the loss head uses.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import is_flash_attn_2_available

from shards.modelfolder import max_positions, require_base
from trainer.checks import check_plain_head, check_runs
from trainer.expert_products import use_autocast_in_experts
from trainer.noise import silence


@dataclass
class Base:
    """A causal language model taken apart into body and head.

    dtype: of the matrix products; the weights are kept in float32. max_position: longest sequence, or None
    where the architecture has no bound. dropout: the settings of the config, by dotted name, that were set to 0 for training
    (trainer/noise.py).
    """

    model: PreTrainedModel
    dtype: torch.dtype
    dropout: dict[str, float] = field(default_factory=dict)

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
        self, input_ids_BT: Tensor, position_ids_BT: Tensor | None = None, routed: bool = False
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Last hidden states [B, T, H] in `dtype`; with routed also the router logits of each layer with experts.

        Rows are padded on the right; causal attention keeps the padding out of the tokens before it.
        position_ids_BT: restarting at 0 with each document; transformers then confines attention to the
        documents. None: one sequence per row.
        """
        shape = input_ids_BT.shape
        positions = {} if position_ids_BT is None else {"position_ids": position_ids_BT}
        if position_ids_BT is not None and self.model.config._attn_implementation == "flash_attention_2":
            # transformers looks for documents in batches of one row only; theirs are told apart by their positions
            input_ids_BT, positions = input_ids_BT.view(1, -1), {"position_ids": position_ids_BT.reshape(1, -1)}
        options: dict[str, Any] = positions | ({"output_router_logits": True} if routed else {})
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
        if activation_checkpointing:
            self.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.dtype != torch.float32:
            use_autocast_in_experts(self.model)
        swap_layers()
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
    require_base(folder)
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    dropout = silence(config)
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
    base = Base(model, resolve_dtype(dtype, device), dropout)
    for parameter in base.idle_parameters():
        parameter.requires_grad_(False)
    check_plain_head(base)
    check_runs(base)
    model.train()
    return base


def architecture_has_flash(config: Any) -> bool:
    """Whether transformers has flash attention for this architecture."""
    with torch.device("meta"):
        return bool(getattr(AutoModelForCausalLM.from_config(config), "_supports_flash_attn", False))
