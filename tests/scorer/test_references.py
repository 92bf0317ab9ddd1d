"""References of less common kinds: wrappers, quantised weights, scaled positions. Equal to transformers, or refused."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from compressed_tensors import CompressionFormat
from conftest import VOCABULARY, make_model, score_to, source_texts, write_corpus
from safetensors.torch import load_file, save_file
from test_score import compare

from scorer.config import PackConfig
from scorer.pack import pack
from scorer.reference import Reference, check_reference
from scorer.textonly import text_tensors
from shards import ShardFolder

pytestmark = pytest.mark.usefixtures("ray_session")

Remit = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Callable[[int], Path]:
    """A small packed folder with rows of so many tokens."""
    folder = tmp_path_factory.mktemp("rows")

    def make(seq_len: int) -> Path:
        out = folder / f"packed-{seq_len}"
        if not out.exists():
            write_corpus(folder / "a.jsonl", source_texts(24, seed=7))
            pack(
                PackConfig(
                    [str(folder / "a.jsonl")], str(tokenizer_folder), out, seq_len=seq_len, tokens_per_shard=4096
                )
            )
        return out

    return make


def make_wrapper(folder: Path) -> Path:
    """A tiny Gemma 3 with a vision tower, its weights under the names of transformers 5."""
    torch.manual_seed(5)
    text = {
        "vocab_size": VOCABULARY + 7,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 64,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=VOCABULARY + 1
    )
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.15)
    model.save_pretrained(folder)
    # what the published folders have beside the weights; nothing of it may be needed
    (folder / "preprocessor_config.json").write_text('{"image_processor_type": "Gemma3ImageProcessor"}')
    (folder / "processor_config.json").write_text('{"processor_class": "Gemma3Processor", "image_seq_length": 1}')
    return folder


@pytest.mark.parametrize("names", ["transformers 5", pytest.param("transformers 4", marks=pytest.mark.slow)])
def test_a_multimodal_wrapper_scores_text_alone(tmp_path: Path, rows: Callable, names: str) -> None:
    model = make_wrapper(tmp_path / "wrapper")
    if names == "transformers 4":  # language_model.model.layers.., vision_tower..
        tensors = load_file(model / "model.safetensors")
        old = {
            name.replace("model.language_model.", "language_model.model.").removeprefix(
                "model." if "language" not in name else "-"
            ): tensor
            for name, tensor in tensors.items()
        }
        assert any(name.startswith("vision_tower.") for name in old)
        save_file(old, model / "model.safetensors", metadata={"format": "pt"})
    folder = score_to(tmp_path / "scored", rows(64), model, canary=True, logprob_step=0.0)
    assert compare(folder, model, "rl", "packed", 1e-4) > 2000


def test_names_of_tensors_in_wrappers() -> None:
    names = {
        "model.language_model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "language_model.model.layers.0.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
        "language_model.lm_head.weight": "lm_head.weight",
        "lm_head.weight": "lm_head.weight",
        "model.text_model.norm.weight": "model.norm.weight",
        "model.vision_tower.head.probe": None,
        "multi_modal_projector.linear_1.weight": None,
    }
    for name, expected in names.items():
        assert [name for name, _ in text_tensors([(name, None)])] == ([expected] if expected else [])


def test_a_wrapper_without_a_language_model_of_its_own_is_refused(tmp_path: Path, rows: Callable) -> None:
    make_model(tmp_path)
    values = {"model_type": "qwen2_vl", "architectures": ["Qwen2VLForConditionalGeneration"]}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match=r"Qwen2VLConfig holds Qwen2VLTextConfig, expected a language model"):
        check_reference(ShardFolder(rows(64)), Reference(tmp_path, "x"))


def make_phi3(folder: Path) -> Path:
    scaling = {"type": "longrope", "short_factor": [1.0] * 16, "long_factor": [8.0] * 16}
    return make_model(
        folder,
        "Phi3",
        positions=256,
        original_max_position_embeddings=64,
        rope_scaling=scaling,
        sliding_window=None,
    )


@pytest.mark.parametrize(
    ("seq_len", "context"),
    [
        pytest.param(32, "packed", marks=pytest.mark.slow),
        (64, "packed"),
        pytest.param(64, "document", marks=pytest.mark.slow),
    ],
)
def test_longrope_up_to_the_original_length(tmp_path: Path, rows: Callable, seq_len: int, context: str) -> None:
    """At exactly 64 tokens vLLM, which is given room for 65, would take the long factors."""
    model = make_phi3(tmp_path / "model")
    folder = score_to(tmp_path / "out", rows(seq_len), model, context=context, canary=True, logprob_step=0.0)
    assert compare(folder, model, "rl", context, 1e-4) > 2000


def test_longrope_beyond_the_original_length_is_refused(tmp_path: Path, rows: Callable, remit: Remit) -> None:
    model = make_phi3(tmp_path / "model")
    for command in (("score",), ("train", "--objective", "ntp")):
        code, _, err = remit(*command, "--shards", rows(128), "--model", model, "--out", tmp_path / "out")
        assert code == 1
        assert "rows of 128 tokens, expected at most 64, the original_max_position_embeddings of its longrope" in err
        assert not (tmp_path / "out").exists()


def test_yarn_with_max_position_embeddings_left_as_it_was(tmp_path: Path, rows: Callable, remit: Remit) -> None:
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    model = make_model(tmp_path / "model", "Llama", positions=64, rope_scaling=scaling)
    folder = score_to(tmp_path / "scored", rows(256), model, logprob_step=0.0)
    assert compare(folder, model, "rl", "packed", 1e-4) > 2000
    arguments = ("--model", model, "--global-batch-size", 2, "--max-steps", 1)
    code, _, err = remit("train", "--shards", folder.path, *arguments, "--out", tmp_path / "run")
    assert code == 0, err
    code, _, err = remit("train", "--shards", rows(320), *arguments, "--objective", "ntp", "--out", tmp_path / "run2")
    assert code == 1
    assert "takes at most 256 tokens" in err


@pytest.mark.parametrize("size", [16, 48])
def test_heads_that_the_cpu_engine_lacks(tmp_path: Path, rows: Callable, remit: Remit, size: int) -> None:
    model = make_model(tmp_path / "model", "Qwen3", head_dim=size)
    code, _, err = remit("score", "--shards", rows(64), "--model", model, "--out", tmp_path / "out")
    assert code == 1
    assert f"has attention heads of {size} numbers, expected one of 32, 64," in err
    assert not (tmp_path / "out").exists()


def quantise(folder: Path) -> None:
    """Linear weights of a saved model to int8 with a scale for each row, as compressed-tensors stores them."""
    tensors = load_file(folder / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        weight = tensors.pop(name).float()
        scale = weight.abs().amax(1, keepdim=True) / 127
        tensors[name] = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        tensors[f"{name}_scale"] = scale.bfloat16()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "dynamic": True, "strategy": "token"}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": CompressionFormat.int_quantized.value,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }
    (folder / "config.json").write_text(json.dumps(config))


def test_a_quantised_reference_that_vllm_serves(tmp_path: Path, rows: Callable, remit: Remit) -> None:
    model = make_model(tmp_path / "model", "Llama", hidden_size=64, num_attention_heads=2)
    quantise(model)
    code, _, err = remit(
        "score", "--shards", rows(64), "--model", model, "--out", tmp_path / "out", "--dtype", "bfloat16"
    )
    assert code == 0, err
    code, _, err = remit("train", "--shards", tmp_path / "out", "--model", model, "--out", tmp_path / "run")
    assert code == 1
    assert "its weights are quantised (compressed-tensors" in err


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes"])
def test_a_quantised_reference_without_a_second_opinion(
    tmp_path: Path, rows: Callable, remit: Remit, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The packages that transformers needs to read these are not here: one line before Ray starts."""
    model = make_model(tmp_path / "model", "Llama")
    file = model / "config.json"
    settings = {"quant_method": method, "bits": 4, "group_size": 128, "load_in_4bit": method == "bitsandbytes"}
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))

    def never(*args: object, **kwargs: object) -> None:
        raise AssertionError("started")

    monkeypatch.setattr("scorer.score.ray_cluster", never)
    code, _, err = remit("score", "--shards", rows(64), "--model", model, "--out", tmp_path / "out")
    assert code == 1
    assert f"quantised ({method}, 4 bit, quantization_config of config.json), and the transformers forward" in err
    assert "--no-canary scores without a second opinion" in err


def test_a_quantised_reference_that_config_does_not_explain(tmp_path: Path, rows: Callable, remit: Remit) -> None:
    model = make_model(tmp_path / "model", "Llama")
    (model / "quantize_config.json").write_text('{"bits": 4}')
    code, _, err = remit("score", "--shards", rows(64), "--model", model, "--out", tmp_path / "out")
    assert code == 1
    assert "but config.json has no quantization_config to read them by" in err
