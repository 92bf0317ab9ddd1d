"""Tiny bases of every kind of layout, as they are published, and what their files hold, read by safetensors alone."""

import json
from pathlib import Path

import torch
import transformers
from conftest import FAMILIES, VOCABULARY
from safetensors import safe_open
from safetensors.torch import load_file, save_file

EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "head_dim": 32}
MLA = {"kv_lora_rank": 32, "q_lora_rank": 48, "qk_rope_head_dim": 32, "v_head_dim": 32, "qk_nope_head_dim": 32}
ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "first_k_dense_replace": 1}
GROUPED = {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "num_nextn_predict_layers": 1}
KINDS: dict[str, dict] = {
    **{family: FAMILIES[family] for family in ("Olmo2", "SmolLM3", "Llama", "Qwen3", "Youtu")},
    "Qwen3Moe": {**EXPERTS, "decoder_sparse_step": 1},
    "Olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "Mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {**MLA, **ROUTED, **GROUPED},
    "Glm4Moe": {**ROUTED, **GROUPED, "head_dim": 32},
    "Olmo3": {},
    "Phi3": {},
    "GPTNeoX": {},
    "GPT2": {},
    "Gemma3Text": {"head_dim": 32, "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
}


def make_base(
    folder: Path, kind: str, dtype: torch.dtype = torch.bfloat16, shard: str = "60KB", **changes: object
) -> Path:
    """A base of `kind` in `dtype`, router biases in float32 as published, over several files with an index."""
    torch.manual_seed(1)
    settings: dict = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    config = getattr(transformers, f"{kind}Config")(**(settings | KINDS[kind] | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim >= 2 else parameter.normal_(1, 0.1)
    model.to(dtype)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            parent = model.get_submodule(name.rpartition(".")[0])
            parent.e_score_correction_bias = torch.linspace(6.82, 7.06, len(buffer))  # type: ignore[assignment]
    model.save_pretrained(folder, max_shard_size=shard)
    return folder


def edit_weights(folder: Path, change) -> None:  # type: ignore[no-untyped-def]
    """Have `change` alter the tensors of a base that is one file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def edit_json(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes, indent=4) + "\n\n")


def raw(folder: Path) -> dict[str, tuple[str, torch.Tensor]]:
    """Every tensor of a folder's weight files: its file and value."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found[name] = (path.name, tensors.get_tensor(name))
    return found


def require_same_weights(ours: Path, base: Path) -> None:
    """Same names, in the same files, of the same dtype, and the same bits."""
    left, right = raw(ours), raw(base)
    assert left.keys() == right.keys()
    for name, (file, tensor) in right.items():
        assert left[name][0] == file, name
        assert left[name][1].dtype == tensor.dtype, name
        assert torch.equal(left[name][1].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8)), name
