"""What goes in comes out, and what is evaluated is what is exported; looked at with safetensors and transformers alone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors
import torch
import transformers
from annotated import run
from conftest import VOCABULARY, score_to
from exporting import KINDS, edit_weights, make_base, raw, require_same_weights
from oracles import load, read_rows, remit_step, row_logprobs

from trainer.config import TrainConfig
from trainer.export import export
from trainer.layout import read_layout
from trainer.model import load_base
from trainer.safetensors_writer import SafetensorsWriter
from trainer.train import train

Remit = Callable[..., tuple[int, str, str]]
EXPERTS = ("Qwen3Moe", "Olmoe", "Mixtral", "DeepseekV3", "Glm4Moe")


def options(kind: str) -> dict[str, object]:
    """Models with experts are trained without their balancing loss here."""
    has = "router_aux_loss" in TrainConfig.__dataclass_fields__ and kind in EXPERTS
    return {"router_aux_loss": 0.0} if has else {}


def words(settings: dict[str, object]) -> list[object]:
    return [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", value)]


def dress(base: Path, tokenizer: Path) -> None:
    """Files as they stand beside real weights: by other versions and hands, some not as transformers would write them."""
    for file in tokenizer.iterdir():
        shutil.copyfile(file, base / file.name)
    config = (base / "config.json").read_text()
    value = json.loads(config)
    value |= {"transformers_version": "4.39.0.dev0", "own_key": {"kept": [1, None]}, "torch_dtype": value.pop("dtype")}
    value.pop("attention_bias", None)  # a default that is not written down
    (base / "config.json").write_text(json.dumps(value, indent=4))
    (base / "generation_config.json").write_text('{"temperature": 0.6,\t"top_p": 0.9, "own": 1}')  # without do_sample
    (base / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (base / "preprocessor_config.json").write_text('{"size": 1}')
    (base / "recipe.json").write_text("{}\n")
    (base / "LICENSE").write_text("free")
    (base / "README.md").write_text("of the base alone")
    (base / "original").mkdir()
    (base / "original" / "consolidated.00.pth").write_bytes(b"pickle")


def train_at_0(base: Path, out: Path, shards: Path, **settings: object) -> None:
    run(out, shards, base, learning_rate=0.0, objective="ntp", max_steps=2, global_batch_size=4, **settings)


def evaluations(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "evaluation.jsonl").read_text().splitlines()]


def entry(out: Path, name: str = "model") -> dict:
    return json.loads((out / "exported.json").read_text())["models"][name]


def loss_of(model: Path, shards: Path) -> float:
    """Mean over all tokens of `shards`, in float64 from logits of transformers."""
    with torch.no_grad():
        return float(remit_step(load(model), read_rows(shards), "packed", None, 0.2)["ntp_loss"])


def notes_of(base: Path, out: Path, shards: Path, **settings: object) -> list[str]:
    notes: list[str] = []
    defaults: dict = {
        "max_steps": 2,
        "global_batch_size": 4,
        "dtype": "float32",
        "objective": "ntp",
        "learning_rate": 1e-4,
    }
    train(TrainConfig(str(shards), str(base), out, **(defaults | settings)), note=notes.append)
    return notes


def require_same_files(ours: Path, base: Path, *changed: str) -> None:
    """Byte for byte, but for the weights."""

    def files(folder: Path) -> dict[str, bytes]:
        paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".safetensors"]
        return {str(path.relative_to(folder)): path.read_bytes() for path in paths}

    left, right = files(ours), files(base)
    for name in ("README.md", "original/consolidated.00.pth"):
        right.pop(name, None)
    assert left.keys() == right.keys()
    assert [name for name in left if left[name] != right[name]] == list(changed)


@pytest.mark.parametrize("kind", KINDS)
def test_learning_rate_0_gives_the_base(
    tmp_path: Path, annotated: dict[str, Path], tokenizer_folder: Path, remit: Remit, kind: str
) -> None:
    base, out = make_base(tmp_path / "base", kind), tmp_path / "out"
    assert len(list(base.glob("*.safetensors"))) > 2
    dress(base, tokenizer_folder)
    code, _, errors = remit(
        *("train", "--shards", annotated["packed"], "--model", base, "--out", out, "--learning-rate", 0),
        *("--max-steps", 2, "--global-batch-size", 4, *words(options(kind))),
    )
    assert code == 0, errors
    require_same_weights(out / "model", base)
    require_same_files(out / "model", base)
    assert json.loads((out / "exported.json").read_text())["models"]["model"]["updated_weights"] == 0


def redundant_head(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()


def head_in_float32(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].float().clone()


def without_prefix(tensors: dict[str, torch.Tensor]) -> None:
    for name in list(tensors):
        tensors[name.removeprefix("model.")] = tensors.pop(name)


def norms_in_float32(tensors: dict[str, torch.Tensor]) -> None:
    for name in tensors:
        if "norm" in name:
            tensors[name] = tensors[name].float() + 1e-6


def zeros_with_a_sign(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"][3] = -0.0


def head_alone(tensors: dict[str, torch.Tensor]) -> None:
    tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")


@pytest.mark.parametrize(
    "change",
    [redundant_head, head_in_float32, without_prefix, norms_in_float32, zeros_with_a_sign, head_alone],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_odd_files_come_out_as_they_are(
    tmp_path: Path, annotated: dict[str, Path], change: Callable, dtype: torch.dtype
) -> None:
    base = make_base(tmp_path / "base", "Qwen3", dtype, shard="5GB")
    edit_weights(base, change)
    train_at_0(base, tmp_path / "out", annotated["packed"])
    require_same_weights(tmp_path / "out/model", base)
    # and after training every tensor still has its dtype, and the two places of a tied head one value
    run(tmp_path / "more", annotated["packed"], base, max_steps=2, learning_rate=1e-3, eval_shards=annotated["packed"])
    before, after = raw(base), raw(tmp_path / "more/model")
    assert {name: tensor.dtype for name, (_, tensor) in after.items()} == {
        name: tensor.dtype for name, (_, tensor) in before.items()
    }
    if "lm_head.weight" in after and "model.embed_tokens.weight" in after:
        assert torch.equal(after["lm_head.weight"][1].float(), after["model.embed_tokens.weight"][1].float())
    last = evaluations(tmp_path / "more")[-1]
    assert last["exported_loss"] == pytest.approx(loss_of(tmp_path / "more/model", annotated["packed"]), abs=1e-5)


def test_names_and_buffers_of_older_files(tmp_path: Path, annotated: dict[str, Path]) -> None:
    """As GPT-2 is published: names without the prefix of the class, and masks that are no longer read."""
    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64}
    base = make_base(tmp_path / "base", "GPT2", torch.float32, "5GB", **sizes)

    def age(tensors: dict[str, torch.Tensor]) -> None:
        for name in list(tensors):
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)
        for layer in range(2):
            tensors[f"h.{layer}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()

    edit_weights(base, age)
    train_at_0(base, tmp_path / "out", annotated["packed"])
    require_same_weights(tmp_path / "out/model", base)
    run(tmp_path / "more", annotated["packed"], base, max_steps=2, learning_rate=1e-3, eval_shards=annotated["packed"])
    assert raw(tmp_path / "more/model").keys() == raw(base).keys()
    last = evaluations(tmp_path / "more")[-1]
    assert last["exported_loss"] == pytest.approx(loss_of(tmp_path / "more/model", annotated["packed"]), abs=1e-5)


def test_a_head_of_its_own_beside_a_config_that_ties(tmp_path: Path, annotated: dict[str, Path]) -> None:
    """transformers keeps the two apart when it loads them; so must whoever loads the export."""
    base = make_base(tmp_path / "base", "Qwen3", shard="5GB")
    torch.manual_seed(5)
    edit_weights(base, lambda tensors: tensors.update({"lm_head.weight": torch.randn(VOCABULARY, 64).bfloat16()}))
    assert json.loads((base / "config.json").read_text())["tie_word_embeddings"] is True
    train_at_0(base, tmp_path / "out", annotated["packed"])
    require_same_weights(tmp_path / "out/model", base)
    config = json.loads((tmp_path / "out/model/config.json").read_text())
    assert config == json.loads((base / "config.json").read_text()) | {"tie_word_embeddings": False}

    shards = annotated["packed"]
    run(tmp_path / "more", shards, base, max_steps=4, learning_rate=1e-3, eval_shards=shards, export_dtype="float32")
    last = evaluations(tmp_path / "more")[-1]
    assert last["loss"] == last["exported_loss"] == pytest.approx(loss_of(tmp_path / "more/model", shards), abs=1e-5)


@pytest.mark.usefixtures("ray_session")
def test_vllm_reads_a_head_of_its_own(
    tmp_path: Path, annotated: dict[str, Path], packed: Path, tokenizer_folder: Path
) -> None:
    base = make_base(tmp_path / "start", "Qwen3", shard="5GB")
    dress(base, tokenizer_folder)
    edit_weights(base, lambda tensors: tensors.update({"lm_head.weight": torch.randn(VOCABULARY, 64).bfloat16() / 4}))
    run(tmp_path / "out", annotated["packed"], base, max_steps=2, learning_rate=1e-3)
    score_to(tmp_path / "scored", packed, tmp_path / "out/model")
    model = load(tmp_path / "out/model")
    with torch.no_grad():
        for row in read_rows(tmp_path / "scored")[:5]:
            want = [None if value is None else value.item() for value in row_logprobs(model, row, "packed")]
            assert row["rl_logprobs"] == [None if value is None else pytest.approx(value, abs=0.01) for value in want]


def test_layers_that_the_class_does_not_load(tmp_path: Path, annotated: dict[str, Path]) -> None:
    base = make_base(tmp_path / "base", "Glm4Moe", shard="5GB")
    own = {name: tensor for name, (_, tensor) in raw(base).items() if name.startswith("model.layers.1.")}
    extra = {name.replace("layers.1.", "layers.2."): tensor + 1 for name, tensor in own.items()}
    extra["model.layers.2.eh_proj.weight"] = torch.randn(64, 128)
    edit_weights(base, lambda tensors: tensors.update(extra))
    notes = notes_of(base, tmp_path / "out", annotated["packed"], learning_rate=1e-2, **options("Glm4Moe"))
    assert f"{len(extra)} weights of the base not read by Glm4MoeForCausalLM (model.layers.2." in notes[0]
    assert sorted(json.loads((tmp_path / "out/exported.json").read_text())["carried_over"]) == sorted(extra)
    after = raw(tmp_path / "out/model")
    assert after.keys() == raw(base).keys()
    assert all(torch.equal(after[name][1], tensor) for name, tensor in extra.items())
    assert not torch.equal(after["lm_head.weight"][1], raw(base)["lm_head.weight"][1])
    assert (tmp_path / "out/model/config.json").read_bytes() == (base / "config.json").read_bytes()


def test_a_multimodal_wrapper(tmp_path: Path, annotated: dict[str, Path]) -> None:
    text = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "head_dim": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "eos_token_id": 0,
        "bos_token_id": None,
        "pad_token_id": None,
        "query_pre_attn_scalar": 32,
    }
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=5, boi_token_index=6,
        eoi_token_index=7,
    )  # fmt: skip
    transformers.Gemma3ForConditionalGeneration(config).bfloat16().save_pretrained(
        tmp_path / "base", max_shard_size="60KB"
    )
    (tmp_path / "base/preprocessor_config.json").write_text('{"do_resize": true}')
    train_at_0(tmp_path / "base", tmp_path / "out", annotated["packed"])
    require_same_weights(tmp_path / "out/model", tmp_path / "base")
    assert (tmp_path / "out/model/config.json").read_bytes() == (tmp_path / "base/config.json").read_bytes()
    assert (tmp_path / "out/model/preprocessor_config.json").exists()

    notes = notes_of(tmp_path / "base", tmp_path / "more", annotated["packed"], learning_rate=1e-2)
    assert "weights of the base not used on text (model.vision_tower." in notes[0]
    before, after = raw(tmp_path / "base"), raw(tmp_path / "more/model")
    changed = {name.split(".")[0] for name in before if not torch.equal(before[name][1], after[name][1])}
    assert changed == {"language_model"}
    load(tmp_path / "more/model")


@pytest.mark.parametrize("kind", ["Olmo2", "SmolLM3", "Youtu", "Qwen3Moe", "Mixtral", "DeepseekV3"])
def test_what_is_evaluated_is_what_is_exported(tmp_path: Path, annotated: dict[str, Path], kind: str) -> None:
    base, shards = make_base(tmp_path / "start", kind), annotated["packed"]
    settings = {"max_steps": 4, "learning_rate": 1e-3, "eval_shards": shards, "export_every": 2, **options(kind)}
    losses = {}
    for dtype in ("base", "float32", "bfloat16"):
        run(tmp_path / dtype, shards, base, export_dtype=dtype, **settings)
        lines = evaluations(tmp_path / dtype)
        assert [line["step"] for line in lines] == [0, 2, 4]
        for line, model in zip(lines[1:], ("exports/step-000002", "model")):
            assert line["exported_loss"] == pytest.approx(loss_of(tmp_path / dtype / model, shards), abs=1e-5)
        losses[dtype] = lines
    assert [line["loss"] for line in losses["base"]] == [line["loss"] for line in losses["float32"]]
    for line in losses["float32"][1:]:
        assert line["exported_loss"] == line["loss"]
    assert abs(losses["base"][-1]["exported_loss"] - losses["base"][-1]["loss"]) > 1e-4

    for dtype, name in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert json.loads((tmp_path / dtype / "model/config.json").read_text())["dtype"] == dtype
        weights = raw(tmp_path / dtype / "model")
        biases = {name for name in weights if name.endswith("e_score_correction_bias")}
        assert {weights[weight][1].dtype for weight in weights.keys() - biases} == {name}
        assert all(weights[bias][1].dtype == torch.float32 for bias in biases)  # routing depends on their last digits
        index = json.loads((tmp_path / dtype / "model/model.safetensors.index.json").read_text())
        assert index["weight_map"] == {name: file for name, (file, _) in weights.items()}
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in weights.values())


def test_logits_of_the_export_are_those_in_memory(tmp_path: Path) -> None:
    """Also where experts are fused in memory: each weight comes back to its own place."""
    from trainer.export import export
    from trainer.layout import read_layout
    from trainer.model import load_base

    for kind in KINDS:
        base = load_base(make_base(tmp_path / kind, kind), "float32", torch.device("cpu"))
        layout = read_layout(tmp_path / kind, base.model)
        with torch.no_grad():
            for parameter in base.model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
        ids = torch.arange(20)[None]
        want = base.model.eval()(input_ids=ids).logits
        state = {name: tensor.clone() for name, tensor in base.model.state_dict().items()}
        export(base.model, layout, state, tmp_path / "out" / kind, "float32")
        assert not state
        assert torch.equal(load(tmp_path / "out" / kind)(input_ids=ids).logits, want), kind


def test_share_of_the_weights_that_rounding_returns(tmp_path: Path, annotated: dict[str, Path]) -> None:
    base, shards = make_base(tmp_path / "base", "Llama"), annotated["packed"]
    notes = notes_of(base, tmp_path / "out", shards, learning_rate=1e-5)
    notes_of(base, tmp_path / "float32", shards, learning_rate=1e-5, export_dtype="float32")
    before, after, trained = raw(base), raw(tmp_path / "out/model"), raw(tmp_path / "float32/model")
    updated = returned = 0
    for name, (_, start) in before.items():
        is_updated = trained[name][1] != start.float()
        updated += int(is_updated.sum())
        returned += int((is_updated & (after[name][1] == start)).sum())
        assert torch.equal(after[name][1], trained[name][1].bfloat16())
    assert (entry(tmp_path / "out")["updated_weights"], entry(tmp_path / "out")["returned_weights"]) == (
        updated,
        returned,
    )
    assert entry(tmp_path / "float32")["returned_weights"] == 0 < updated
    assert returned / updated > 0.9
    assert notes == [
        f"rounding returned {returned / updated:.0%} of the updated weights to the base's values, so that a part of the "
        "training is not in the exported model; --export-dtype float32 keeps all of it"
    ]


def test_a_line_where_rounding_costs_a_part_of_the_gain(tmp_path: Path, annotated: dict[str, Path]) -> None:
    base, shards = make_base(tmp_path / "base", "Llama"), annotated["packed"]
    settings = {"eval_shards": str(shards), "max_steps": 6}
    (line,) = notes_of(base, tmp_path / "small", shards, learning_rate=3e-5, **settings)
    first, last = evaluations(tmp_path / "small")[0], evaluations(tmp_path / "small")[-1]
    cost, gain = last["exported_loss"] - last["loss"], first["loss"] - last["loss"]
    assert f"rounding costs {cost:.4f} nat per token, {cost / gain:.0%} of the gain" in line
    assert not notes_of(base, tmp_path / "float32", shards, learning_rate=3e-5, export_dtype="float32", **settings)
    assert not notes_of(base, tmp_path / "large", shards, learning_rate=1e-2, **settings)


def test_a_tiny_learning_rate_leaves_every_tensor(tmp_path: Path, annotated: dict[str, Path]) -> None:
    base = make_base(tmp_path / "base", "DeepseekV3")
    run(tmp_path / "out", annotated["packed"], base, max_steps=1, learning_rate=1e-12, **options("DeepseekV3"))
    require_same_weights(tmp_path / "out/model", base)


def test_another_export_dtype_is_not_answered_with_the_old_export(tmp_path: Path, annotated: dict[str, Path]) -> None:
    base, shards, out = make_base(tmp_path / "base", "Llama"), annotated["packed"], tmp_path / "out"
    settings = {"max_steps": 2, "learning_rate": 1e-4, "eval_shards": shards, "checkpoint_every": 1}
    run(out, shards, base, **settings)
    run(out, shards, base, **settings)
    with pytest.raises(
        ValueError, match=r"out/model: was exported with --export-dtype base, float32 asked for now; delete"
    ):
        run(out, shards, base, export_dtype="float32", **settings)
    shutil.rmtree(out / "model")
    run(out, shards, base, export_dtype="float32", **settings)
    assert {tensor.dtype for _, tensor in raw(out / "model").values()} == {torch.float32}
    assert entry(out)["export_dtype"] == "float32"
    lines = evaluations(out)
    assert [line["step"] for line in lines] == [0, 2]
    assert lines[-1]["export_dtype"] == "float32"
    assert lines[-1]["exported_loss"] == lines[-1]["loss"] == pytest.approx(loss_of(out / "model", shards), abs=1e-5)


def test_an_export_that_fails_is_made_again(
    tmp_path: Path, annotated: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, shards, out = make_base(tmp_path / "base", "Olmoe"), annotated["packed"], tmp_path / "out"
    settings = {"max_steps": 2, "checkpoint_every": 1, "eval_shards": shards, **options("Olmoe")}
    run(tmp_path / "whole", shards, base, **settings)
    written: list[str] = []

    def full(self: SafetensorsWriter, name: str, *values: object) -> None:
        if len(written) == 9:
            raise OSError(28, "No space left on device")
        written.append(name)
        write(self, name, *values)

    write = SafetensorsWriter.write
    monkeypatch.setattr(SafetensorsWriter, "write", full)
    with pytest.raises(OSError, match="No space"):
        run(out, shards, base, **settings)
    assert not (out / "model").exists()
    monkeypatch.setattr(SafetensorsWriter, "write", write)
    run(out, shards, base, **settings)
    require_same_weights(out / "model", tmp_path / "whole/model")
    assert evaluations(out) == evaluations(tmp_path / "whole")
    assert entry(out) == entry(tmp_path / "whole")
    assert not list(out.glob(".*"))


def test_float16_that_overflows(tmp_path: Path) -> None:
    from trainer.export import export
    from trainer.layout import read_layout
    from trainer.model import load_base

    base = load_base(make_base(tmp_path / "base", "Llama", torch.float16), "float32", torch.device("cpu"))
    layout = read_layout(tmp_path / "base", base.model)
    state = {name: tensor * 1e6 for name, tensor in base.model.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"has values of up to .*, more than torch.float16 holds; .*--export-dtype float32"
    ):
        export(base.model, layout, state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_weights_that_cannot_be_written_back_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import trainer.layout
    from trainer.model import load_base

    base = load_base(make_base(tmp_path, "Olmoe"), "float32", torch.device("cpu"))
    monkeypatch.setattr(trainer.layout, "revert_weight_conversion", lambda model, state: state)
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts.\w+ is not found in its files under a name"):
        trainer.layout.read_layout(tmp_path, base.model)
    with torch.no_grad():
        base.model.lm_head.weight[0, 0] += 1
    monkeypatch.undo()
    with pytest.raises(ValueError, match=r"lm_head.weight would not be written back with the values that were read"):
        trainer.layout.read_layout(tmp_path, base.model)


def test_float32_keeps_what_the_class_wants_in_float32(tmp_path: Path) -> None:
    """GPT-OSS asks for its norms in float32; in a bfloat16 base their training must not be rounded away either."""
    config = transformers.GptOssConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, num_local_experts=4, num_experts_per_tok=2,
        layer_types=["full_attention"] * 2,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    base = load_base(tmp_path / "base", "float32", torch.device("cpu"))
    trained = {name: (tensor.detach() * 1.0005).clone() for name, tensor in base.model.state_dict().items()}
    layout = read_layout(tmp_path / "base", base.model)
    rounding = export(base.model, layout, trained, tmp_path / "out", "float32")
    assert rounding.returned_weights == 0
    with safetensors.safe_open(tmp_path / "out" / "model.safetensors", "pt") as tensors:
        assert {tensors.get_tensor(name).dtype for name in tensors.keys()} == {torch.float32}  # noqa: SIM118
        assert torch.equal(tensors.get_tensor("model.norm.weight"), torch.full((32,), 1.0005))
