"""Model folders that cannot be a base or a reference are refused by name, from their files alone."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import make_model
from safetensors.torch import load_file, save_file

from shards.modelfolder import max_positions, quantisation, require_base, require_language_model


def change(folder: Path, **settings: object) -> None:
    file = folder / "config.json"
    values = json.loads(file.read_text()) | settings
    file.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))


def add(folder: Path, name: str, tensor: torch.Tensor, drop: str | None = None) -> None:
    tensors = load_file(folder / "model.safetensors") | {name: tensor}
    tensors.pop(drop, None)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


QUANTISED_BY_CONFIG = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "awq": {"quant_method": "awq", "bits": 4},
    "bitsandbytes, 4 bit": {"quant_method": "bitsandbytes", "load_in_4bit": True},
    "bitsandbytes, 8 bit": {"load_in_8bit": True},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "fbgemm_fp8": {"quant_method": "fbgemm_fp8"},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized"},
    "quanto": {"quant_method": "quanto", "weights": "int8"},
    "hqq": {"quant_method": "hqq"},
    "aqlm": {"quant_method": "aqlm"},
    "torchao": {"quant_method": "torchao"},
    "mxfp4": {"quant_method": "mxfp4"},
    "NVFP4": {"quant_algo": "NVFP4"},
    "a method of tomorrow": {"quant_method": "a method of tomorrow"},
}


@pytest.mark.parametrize("method", QUANTISED_BY_CONFIG)
@pytest.mark.parametrize("place", ["quantization_config", "compression_config", "text_config"])
def test_quantised_by_config_is_no_base(tmp_path: Path, method: str, place: str) -> None:
    make_model(tmp_path)
    settings = QUANTISED_BY_CONFIG[method]
    change(tmp_path, **({place: {"quantization_config": settings}} if place == "text_config" else {place: settings}))
    with pytest.raises(ValueError, match=rf"weights are quantised \({method}.*give the folder of 16 or 32 bit"):
        require_base(tmp_path)
    require_language_model(tmp_path)  # vLLM may serve it


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_quantised_by_a_file_beside_is_no_base(tmp_path: Path, name: str) -> None:
    make_model(tmp_path)
    (tmp_path / name).write_text('{"bits": 4}')
    with pytest.raises(ValueError, match=rf"quantised \({name}\)"):
        require_base(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("model.layers.0.mlp.up_proj.qweight", torch.zeros(2, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight_scale_inv", torch.ones(2)),
        ("model.layers.0.mlp.up_proj.weight_packed", torch.zeros(2, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.SCB", torch.ones(2)),
        ("model.layers.0.mlp.up_proj.weight.absmax", torch.ones(2)),
        ("model.layers.0.mlp.up_proj.weight.quant_state.bitsandbytes__nf4", torch.zeros(2, dtype=torch.uint8)),
        ("model.layers.0.mlp.up_proj.weight._data", torch.zeros(2, dtype=torch.int8)),
        ("model.layers.0.mlp.experts.gate_up_proj_blocks", torch.zeros(2, dtype=torch.uint8)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(2, dtype=torch.int8)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(2, dtype=torch.uint8)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(2, dtype=torch.int32)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(2).to(torch.float8_e4m3fn)),
        ("model.layers.0.mlp.up_proj.weight", torch.zeros(2).to(torch.float8_e5m2)),
    ],
)
def test_quantised_by_its_tensors_is_no_base(tmp_path: Path, name: str, tensor: torch.Tensor) -> None:
    """Without a word of it in config.json: transformers would train random weights, or scales as if they were weights."""
    make_model(tmp_path)
    add(tmp_path, name, tensor)
    with pytest.raises(ValueError, match=rf"quantised \({name}"):
        require_base(tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_ordinary_weights_and_masks_are_not_quantised(tmp_path: Path, dtype: torch.dtype) -> None:
    make_model(tmp_path)
    add(tmp_path, "model.layers.0.mlp.up_proj.weight", torch.zeros(96, 64, dtype=dtype))
    add(tmp_path, "model.layers.0.attn.bias", torch.ones(1, 1, 4, 4, dtype=torch.uint8))  # a mask, as in old folders
    add(tmp_path, "model.layers.0.attn.mask", torch.ones(4, 4, dtype=torch.bool))
    add(tmp_path, "model.position_ids", torch.arange(4))
    change(tmp_path, quantization_config=None)
    assert quantisation(tmp_path) is None
    require_base(tmp_path)


@pytest.mark.parametrize("beside", [True, False])
@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"])
def test_adapters_are_refused_alone_and_beside_a_model(tmp_path: Path, name: str, beside: bool) -> None:
    if beside:
        make_model(tmp_path)
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=rf"{name}: an adapter .*merge_and_unload"):
        require_language_model(tmp_path)


def test_adapters_by_their_tensors(tmp_path: Path) -> None:
    make_model(tmp_path)
    add(tmp_path, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"lora_A\.weight is of an adapter"):
        require_language_model(tmp_path)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "no head that predicts the next token"),
        ({"architectures": ["Qwen2ForTokenClassification"]}, "no head that predicts the next token"),
        ({"architectures": ["LlamaForRewardModel"]}, "no head that predicts the next token"),
        ({"architectures": ["InternLM2ForRewardModel"]}, "no head that predicts the next token"),
        ({"architectures": ["Qwen3Model"]}, "no head that predicts the next token"),
        ({"architectures": ["BertForMaskedLM"]}, "no head that predicts the next token"),
        ({"architectures": ["SmolLM3ForQuestionAnswering"]}, "no head that predicts the next token"),
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "an encoder beside its decoder",
        ),
        ({"is_causal": False}, "both directions"),
        ({"text_config": {"use_bidirectional_attention": True}}, "both directions"),
    ],
)
def test_other_heads_are_refused_as_base_and_as_reference(tmp_path: Path, settings: dict, reason: str) -> None:
    make_model(tmp_path)
    change(tmp_path, **settings)
    for require in (require_base, require_language_model):
        with pytest.raises(ValueError, match=rf"config\.json: .*{reason}"):
            require(tmp_path)


def test_a_reward_head_without_a_word_in_config(tmp_path: Path) -> None:
    make_model(tmp_path)
    change(tmp_path, architectures=None)
    require_base(tmp_path)
    add(tmp_path, "score.weight", torch.zeros(1, 64), drop="lm_head.weight")
    with pytest.raises(ValueError, match=r"score\.weight is of a head that predicts no tokens"):
        require_base(tmp_path)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Olmo2ForCausalLM", "Gemma3ForConditionalGeneration", None])
def test_language_models_pass(tmp_path: Path, name: str | None) -> None:
    make_model(tmp_path)
    change(tmp_path, architectures=name and [name])
    require_base(tmp_path)


def test_gguf_alone_is_refused(tmp_path: Path) -> None:
    make_model(tmp_path)
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    require_base(tmp_path)  # beside safetensors nobody reads it
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"model-q4\.gguf: a GGUF file, which is not read; load it in transformers"):
        require_language_model(tmp_path)


@pytest.mark.parametrize(
    "data", [b"", b"\xff" * 8, b"\x10" + b"\0" * 7 + b"no JSON in here!", b"\2" + b"\0" * 7 + b"[]"]
)
def test_damaged_headers_are_named(tmp_path: Path, data: bytes) -> None:
    make_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"model\.safetensors: not a safetensors file, or damaged"):
        require_base(tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}, 256),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, 256),
        ({"rope_parameters": {"full_attention": {"rope_type": "yarn", "factor": 2.0}, "other": {}}}, 128),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}}, 64),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 64),
        ({"rope_parameters": {"rope_type": "default"}}, 64),
        ({"max_position_embeddings": None, "text_config": {"max_position_embeddings": 32}}, 32),
        ({"max_position_embeddings": None}, None),
    ],
)
def test_yarn_lifts_the_bound_on_positions(settings: dict, expected: int | None) -> None:
    values = {"max_position_embeddings": 64} | settings
    assert max_positions({key: value for key, value in values.items() if value is not None}) == expected


@pytest.mark.parametrize("kind", ["gptq", "adapter", "reward"])
@pytest.mark.parametrize("command", ["train", "score", "flywheel"])
def test_commands_refuse_before_anything_starts(
    tmp_path: Path, packed: Path, kind: str, command: str, remit: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One line and exit code 1 or 2; neither Ray nor a model is touched, and nothing is written."""
    model = make_model(tmp_path / "model")
    if kind == "gptq":
        change(model, quantization_config=QUANTISED_BY_CONFIG["gptq"])
    elif kind == "adapter":
        (model / "adapter_config.json").write_text("{}")
    else:
        change(model, architectures=["Olmo2ForSequenceClassification"])
    if (kind, command) == ("gptq", "score"):
        pytest.skip("a quantised reference may be served, see test_references.py")

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", never)
    monkeypatch.setattr("scorer.score.ray_cluster", never)
    if command == "flywheel":
        (tmp_path / "flywheel.yaml").write_text(
            f"base: {model}\ntokenizer: {packed / '_tokenizer'}\ncorpus: [{packed}]\nposttrain: []\nout: {tmp_path / 'out'}\n"
        )
        code, _, err = remit("flywheel", "--config", tmp_path / "flywheel.yaml")
    else:
        own = ("--objective", "ntp", "--ray-workers", 1) if command == "train" else ()
        code, _, err = remit(command, "--shards", packed, "--model", model, "--out", tmp_path / "out", *own)
    assert code in (1, 2)
    assert {"gptq": "quantised (gptq", "adapter": "an adapter", "reward": "SequenceClassification"}[kind] in err
    assert err.count("error: ") == 1
    assert "internal" not in err
    assert not (tmp_path / "out").exists()
