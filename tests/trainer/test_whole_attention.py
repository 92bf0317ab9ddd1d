"""What a class asks of its attention is done: soft-capping and sinks, which PyTorch's own attention computes without."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from annotated import rows_of_step, run
from conftest import make_model
from oracles import remit_step
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from scorer.forward import load_network
from trainer.attention_choice import choose_attention
from trainer.checks import FLASH
from trainer.document_attention import DOCUMENTS, Attention
from trainer.model import load_base
from trainer.whole_attention import honour

CAPPED = {"attn_logit_softcapping": 0.3, "final_logit_softcapping": None}
CASES: dict[str, dict[str, Any]] = {
    "Gemma2": CAPPED | {"sliding_window": 5},
    "VaultGemma": CAPPED | {"head_dim": 32, "query_pre_attn_scalar": 32, "sliding_window": 5},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 2, "head_dim": 32},
}
OWN = "the class's own, since sdpa leaves out soft-capping of its scores"


def logits(folder: Path, ids: torch.Tensor, attention: str) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention
    )
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("family", [*CASES])
def test_logits_are_those_of_the_class(tmp_path: Path, family: str) -> None:
    folder = make_model(tmp_path / "model", family, **CASES[family])
    base = load_base(folder, "float32", torch.device("cpu"))
    ids = torch.randint(0, base.num_embeddings, (3, 40))
    wanted = logits(folder, ids, "eager")
    if family != "GptOss":  # which has no other by itself
        assert (logits(folder, ids, "sdpa") - wanted).abs().max() > 0.01
        assert base.attention == Attention("eager", OWN)
    for form in ("eager", DOCUMENTS):
        assert base.model.config._attn_implementation == form
        with torch.no_grad():
            torch.testing.assert_close(base.head(base.hidden_states(ids)), wanted, atol=1e-5, rtol=1e-5)
        choose_attention(base)


def test_a_run_in_packed_context_trains_with_it(tmp_path: Path, annotated: dict[str, Path]) -> None:
    folder = make_model(tmp_path / "model", "Gemma2", **CASES["Gemma2"])
    shards = annotated["packed"]
    metrics = run(tmp_path / "out", shards, folder, objective="ntp", seed=4)[0]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    wanted = remit_step(model, rows_of_step(shards, 0, 8, seed=4), "packed", None, 0.2)
    assert metrics["loss"] == pytest.approx(wanted["loss"].item(), abs=1e-4)
    dropped = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    other = remit_step(dropped, rows_of_step(shards, 0, 8, seed=4), "packed", None, 0.2)
    assert metrics["loss"] != pytest.approx(other["loss"].item(), abs=1e-3)
    said = json.loads((tmp_path / "out" / "run.json").read_text())["attention"]
    assert said == "PyTorch's scaled_dot_product_attention, one document after the other"


def test_a_final_soft_cap_is_refused_with_either_attention(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "Gemma2", **CASES["Gemma2"] | {"final_logit_softcapping": 30.0})
    with pytest.raises(ValueError, match="soft-capping or scaling"):
        load_base(folder, "float32", torch.device("cpu"))


def test_the_scorer_forwards_with_it(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", "Gemma2", **CASES["Gemma2"] | {"final_logit_softcapping": 2.0})
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        found = load_network(folder, "float32")(input_ids=ids).logits
    torch.testing.assert_close(found, logits(folder, ids, "eager"), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(("family", "left_out"), [("Gemma2", None), ("GptOss", "sinks"), ("Llama", None)])
def test_flash_attn_knows_soft_caps_and_no_sinks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, left_out: str | None
) -> None:
    """The package is not here: its name alone stands in the config where the model is not run."""
    base = load_base(make_model(tmp_path / "model", family, **CASES.get(family, {})), "float32", torch.device("cpu"))
    set_attention = base.model.set_attn_implementation

    def set_or_name(form: str) -> None:
        if form == FLASH:
            base.model.config._attn_implementation = FLASH
        else:
            set_attention(form)

    monkeypatch.setattr(base.model, "set_attn_implementation", set_or_name)
    set_or_name(FLASH)
    wanted = left_out and Attention("eager", f"the class's own, since {FLASH} leaves out {left_out}")
    assert honour(base) == wanted
    assert base.model.config._attn_implementation == ("eager" if left_out else FLASH)


def test_what_differs_for_another_reason_is_left_to_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
    monkeypatch.setitem(
        ALL_ATTENTION_FUNCTIONS._global_mapping,
        "sdpa",
        lambda *inputs, **named: sdpa(*inputs, **named | {"scaling": 0.3}),
    )
    base = load_base(make_model(tmp_path / "model", "Llama"), "float32", torch.device("cpu"))
    assert base.attention == Attention("eager", "the class's own, since sdpa leaves out a part of it")


def test_a_class_that_takes_no_other_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def keeps(model: object, form: str) -> None:
        if form == "eager":
            raise ValueError("no")

    monkeypatch.setattr(transformers.Gemma2ForCausalLM, "set_attn_implementation", keeps)
    with pytest.raises(
        ValueError, match=r"Gemma2ForCausalLM: .* sdpa, which leaves out soft-capping of its scores, and it takes no"
    ):
        load_base(make_model(tmp_path / "model", "Gemma2", **CASES["Gemma2"]), "float32", torch.device("cpu"))
