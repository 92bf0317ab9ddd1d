"""Bases: plain heads are told from others, attention is confined to documents, hidden states are the model's own."""

from pathlib import Path

import pytest
import torch
import transformers
from conftest import make_model
from oracles import load

from trainer.model import Base, check_document_attention, check_plain_head, load_base

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
