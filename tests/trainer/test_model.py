"""Bases: plain heads are told from others, attention is confined to documents, hidden states are the model's own."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model
from oracles import load

from trainer.attention_choice import choose_attention
from trainer.checks import check_document_attention, check_plain_head, check_runs
from trainer.export import export
from trainer.layout import read_layout
from trainer.model import Base, load_base
from trainer.noise import silence, write_back

CPU = torch.device("cpu")


def as_base(model: transformers.PreTrainedModel) -> Base:
    return Base(model.eval(), torch.float32)


@pytest.mark.parametrize("family", ["Olmo2", "SmolLM3", "Llama", "Qwen3", "Youtu", "Gemma2"])
def test_documents_do_not_see_each_other(tmp_path: Path, family: str) -> None:
    """Hidden states of packed documents equal those of each document alone; Gemma 2 with a window of 4 tokens."""
    model = load(make_model(tmp_path, family, **({"sliding_window": 4} if family == "Gemma2" else {})))
    base = as_base(model)
    check_document_attention(base)
    lengths = [1, 7, 1, 1, 12, 2]
    ids = torch.randint(0, base.num_embeddings, (2, sum(lengths)), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(2, -1)
    with torch.no_grad():
        together = base.hidden_states(ids, positions)
        start = 0
        for length in lengths:
            alone = model.get_decoder()(input_ids=ids[:, start : start + length]).last_hidden_state
            torch.testing.assert_close(together[:, start : start + length], alone, atol=2e-5, rtol=1e-4)
            start += length
        whole = base.hidden_states(ids)
    assert (whole[:, 1:8] - together[:, 1:8]).abs().max() > 1e-2  # packed context does see what came before


def test_padding_on_the_right_changes_nothing(tmp_path: Path) -> None:
    base = as_base(load(make_model(tmp_path)))
    ids = torch.randint(1, base.num_embeddings, (1, 9))
    with torch.no_grad():
        padded = base.hidden_states(torch.cat([ids, torch.zeros(1, 5, dtype=torch.long)], 1))[:, :9]
        torch.testing.assert_close(padded, base.hidden_states(ids), atol=1e-5, rtol=1e-5)


def test_a_model_without_position_ids_is_refused_for_documents() -> None:
    config = transformers.BloomConfig(vocab_size=50, hidden_size=16, n_layer=1, n_head=2)
    base = as_base(transformers.BloomForCausalLM(config))
    with pytest.raises(ValueError, match=r"BloomForCausalLM: .*--context packed"):
        check_document_attention(base)


LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
HYBRIDS: dict[str, dict] = {
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "Qwen3Next": {"num_experts": 0, "layer_types": ["linear_attention", "full_attention"], **LINEAR},
    "Qwen3_5Text": {"layer_types": ["linear_attention", "full_attention"], **LINEAR},
    "FalconH1": MAMBA | {"mamba_d_ssm": 128},
    "Bamba": MAMBA | {"attn_layer_indices": [1]},
    "Mamba": {"state_size": 16},
    "Mamba2": {"num_heads": 4, "head_dim": 32, "state_size": 16, "n_groups": 1},
    "Rwkv": {"attention_hidden_size": 64, "context_length": 64},
    "RecurrentGemma": {"lru_width": 64, "attention_window_size": 8},
    "OlmoHybrid": {"layer_types": ["linear_attention", "full_attention"]},
}
WINDOWS: dict[str, dict] = {
    "Mistral": {"sliding_window": 4},
    "Olmo3": {"sliding_window": 4},
    "Cohere2": {"sliding_window": 4},
    "Gemma3Text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "GPTNeoX": {},
}


def make_tiny(family: str, **settings: object) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**(sizes | tokens | settings))
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", HYBRIDS)
@pytest.mark.usefixtures("starts_processes")
def test_state_that_runs_on_is_seen_in_any_dtype(family: str, dtype: torch.dtype) -> None:
    """Short convolutions, linear attention, state spaces and recurrences take no notice of position ids."""
    model = make_tiny(family, **HYBRIDS[family])
    base = Base(model, dtype)
    check_runs(base)  # in packed context it is a base like any other
    with pytest.raises(ValueError, match=rf"{type(model).__name__}: its attention is not confined .*--context packed"):
        check_document_attention(base)
    choose_attention(base)  # where a class can do without a mask, its state runs on all the same
    with pytest.raises(ValueError, match=rf"{type(model).__name__}: its attention is not confined .*--context packed"):
        check_document_attention(base)
    assert model.training is base.model.training


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", WINDOWS)
def test_windows_keep_to_documents(family: str, dtype: torch.dtype) -> None:
    base = Base(make_tiny(family, **WINDOWS[family]), dtype)
    check_runs(base)
    check_document_attention(base, 64)
    choose_attention(base)
    check_document_attention(base, 64)


def test_chunks_that_begin_with_the_row_are_refused() -> None:
    base = as_base(make_tiny("Llama"))
    base.model.config.attention_chunk_size = 32
    check_document_attention(base, 32)
    with pytest.raises(ValueError, match=r"chunks of 32 tokens .* the rows have 33 tokens"):
        check_document_attention(base, 33)


@pytest.mark.parametrize("leak", ["row above", "row below"])
def test_state_between_rows_is_seen(leak: str) -> None:
    """As where the rows of a micro-batch are joined into one sequence and the layers are not told."""
    model = make_tiny("Llama")
    layer = model.model.layers[0]
    forward = layer.forward

    def leaking(hidden_states: torch.Tensor, *args: object, **kwargs: object) -> torch.Tensor:
        output = forward(hidden_states, *args, **kwargs)
        return output + 1e-3 * output.mean(1, keepdim=True).roll(1 if leak == "row above" else -1, 0)

    layer.forward = leaking
    with pytest.raises(ValueError, match=r"not confined to documents"):
        check_document_attention(as_base(model))


def test_a_model_that_looks_ahead_is_refused(tmp_path: Path) -> None:
    model = make_tiny("Llama")
    model.model.layers[0].self_attn.forward = lambda hidden_states, **_: (hidden_states.flip(1), None)
    with pytest.raises(ValueError, match="LlamaForCausalLM: is no causal language model"):
        check_runs(as_base(model))


NOISY: dict[str, dict] = {
    "Mixtral": {"router_jitter_noise": 0.1, "attention_dropout": 0.2, "num_local_experts": 2},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 2, "embd_pdrop": 0.1, "resid_pdrop": 0.1, "attn_pdrop": 0.1},
    "OPT": {"layerdrop": 0.9, "dropout": 0.1, "ffn_dim": 96, "word_embed_proj_dim": 64},
    "BioGpt": {"layerdrop": 0.5, "hidden_dropout_prob": 0.1, "activation_dropout": 0.1},
    "Olmo2": {"attention_dropout": 0.3},
}


@pytest.mark.parametrize("family", NOISY)
def test_noise_by_any_name_is_off_and_written_back(tmp_path: Path, family: str) -> None:
    settings = NOISY[family]
    make_tiny(family, **settings).save_pretrained(tmp_path / "in")
    with pytest.raises(ValueError, match="is not the same in training as in evaluation"):
        check_runs(Base(load(tmp_path / "in"), torch.float32))
    base = load_base(tmp_path / "in", "float32", CPU)
    noisy = {name: value for name, value in settings.items() if isinstance(value, float)}
    assert noisy.items() <= base.dropout.items()
    assert all(getattr(base.model.config, name) == 0 for name in noisy)
    export(base.model, read_layout(tmp_path / "in", base.model), dict(base.model.state_dict()), tmp_path / "out")
    exported = transformers.AutoConfig.from_pretrained(tmp_path / "out")
    assert {name: getattr(exported, name) for name in noisy} == noisy


def test_noise_in_nested_configs() -> None:
    config = transformers.DbrxConfig()
    config.ffn_config.moe_jitter_eps = 0.01
    config.attn_config.attn_pdrop = 0.1
    found = silence(config)
    assert found == {"attn_config.attn_pdrop": 0.1, "ffn_config.moe_jitter_eps": 0.01}
    assert config.ffn_config.moe_jitter_eps == config.attn_config.attn_pdrop == 0
    write_back(config, found)
    assert config.ffn_config.moe_jitter_eps == 0.01


def test_noise_that_no_setting_names_is_refused(tmp_path: Path) -> None:
    """PhiMoE draws its experts at random in training; what it calls jitter is a threshold, in evaluation too."""
    make_tiny("Phimoe", num_local_experts=4, num_experts_per_tok=2, router_jitter_noise=0.3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"PhimoeForCausalLM: is not the same in training .* no setting"):
        load_base(tmp_path, "float32", CPU)


@pytest.mark.parametrize("family", ["Olmo2", "SmolLM3", "Llama", "Qwen3", "Youtu"])
def test_plain_heads_pass(tmp_path: Path, family: str) -> None:
    assert load_base(make_model(tmp_path, family), "float32", CPU).model.training


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("Gemma2", {}),
        ("Gemma2", {"final_logit_softcapping": 1e4}),
        ("Granite", {"logits_scaling": 1.0001}),
        ("Cohere", {"logit_scale": 0.9999}),
    ],
)
def test_any_other_head_is_refused_however_slight(tmp_path: Path, family: str, changes: dict) -> None:
    with pytest.raises(ValueError, match=f"{family}ForCausalLM: .*soft-capping or scaling"):
        load_base(make_model(tmp_path, family, **changes), "float32", CPU)


@pytest.mark.parametrize("change", ["bias after", "scaled before", "not linear", "not used"])
def test_heads_changed_by_hand_are_refused(tmp_path: Path, change: str) -> None:
    model = load(make_model(tmp_path, "Llama"))
    forward = model.forward
    if change == "bias after":

        def changed(*args: object, **kwargs: object) -> object:
            output = forward(*args, **kwargs)
            output.logits = output.logits + 1e-3
            return output

        model.forward = changed
    elif change == "scaled before":
        model.lm_head.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 1.01,))
    elif change == "not linear":

        class Head(torch.nn.Linear):
            pass

        head = Head(64, model.config.vocab_size, bias=False)
        model.lm_head = head
    else:

        def unused(input_ids: torch.Tensor, **kwargs: object) -> object:
            hidden = model.model(input_ids=input_ids).last_hidden_state
            return transformers.modeling_outputs.CausalLMOutput(logits=hidden @ model.lm_head.weight.T)

        model.forward = unused
    with pytest.raises(ValueError, match="LlamaForCausalLM: cannot be trained here"):
        check_plain_head(as_base(model))


def test_missing_weights_do_not_train_from_random_numbers(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    make_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lack model.layers.1.mlp.up_proj.weight"):
        load_base(tmp_path, "float32", CPU)
