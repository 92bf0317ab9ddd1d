"""Attention over documents without a mask: equal to the masked form, chosen where a class can have it, said where not."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from annotated import run
from torch.nn.attention import varlen
from transformers import masking_utils

from trainer import document_attention
from trainer.attention_choice import _problem_of_varlen, choose_attention
from trainer.checks import check_document_attention
from trainer.config import TrainConfig
from trainer.document_attention import DOCUMENTS, PIECE, VARLEN, Attention, attend_documents, attend_varlen, locate
from trainer.model import Base
from trainer.train import train

CPU = torch.device("cpu")
EACH = "PyTorch's scaled_dot_product_attention, one document after the other"
ROWS = [[1, 7, 1, 1, 12, 2, 40], [64]]  # lengths of documents
WINDOWED: dict[str, Any] = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
CLASSES: dict[str, dict[str, Any]] = {
    "Llama": {"num_key_value_heads": 1},
    "Olmo2": {},
    "Olmo3": WINDOWED,
    "Qwen2": {},
    "Qwen3": {"num_key_value_heads": 4},
    "SmolLM3": {},
    "Mistral": {"sliding_window": 5},
    "Phi3": {"sliding_window": 5, "pad_token_id": 0},
    "Gemma2": {**WINDOWED, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 2.0},
    "Gemma3Text": {**WINDOWED, "query_pre_attn_scalar": 20},
    "Cohere2": WINDOWED,
    "Granite": {"attention_multiplier": 0.3},
    "GPT2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "scale_attn_by_inverse_layer_idx": True},
    "GPTNeoX": {},
    "Youtu": {
        "num_key_value_heads": 4,
        "kv_lora_rank": 32,
        "q_lora_rank": 48,
        "qk_rope_head_dim": 16,
        "v_head_dim": 24,
        "qk_nope_head_dim": 16,
    },
    "GptOss": {**WINDOWED, "num_local_experts": 2, "num_experts_per_tok": 2},
}


def make_tiny(family: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    tokens = {"bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}
    config = getattr(transformers, f"{family}Config")(**(sizes | tokens | settings))
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.15) if parameter.ndim >= 2 else parameter.normal_(1, 0.1)
    return model


def make_rows(vocabulary: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(0, vocabulary, (2, 64), generator=torch.Generator().manual_seed(1))
    return ids, torch.stack([torch.cat([torch.arange(length) for length in row]) for row in ROWS])


def states_and_gradients(model: Any, ids: torch.Tensor, positions: torch.Tensor, form: str, **more: Any) -> Any:
    model.set_attn_implementation(form)
    model.zero_grad()
    hidden = model.get_decoder()(input_ids=ids, position_ids=positions, use_cache=False, **more).last_hidden_state
    (hidden * torch.linspace(-1, 1, hidden.numel()).view_as(hidden)).sum().backward()
    return hidden.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def own_masks(window: int) -> dict[str, torch.Tensor]:
    """Of ROWS, for the two kinds of layers: 0 where something is looked at, the least number elsewhere."""
    number = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in ROWS])
    back = torch.arange(64)[:, None] - torch.arange(64)
    seen = (number[:, None, :, None] == number[:, None, None]) & (back >= 0)
    kinds = {"full_attention": seen, "sliding_attention": seen & (back < window)}
    return {kind: torch.zeros(mask.shape).masked_fill(~mask, torch.finfo().min) for kind, mask in kinds.items()}


def assert_near(found: torch.Tensor, wanted: torch.Tensor, name: str = "") -> None:
    assert (found - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp(min=1), name


@pytest.mark.parametrize("family", CLASSES)
def test_equal_to_the_class_with_a_mask(family: str) -> None:
    """Hidden states and gradients of all weights in float32, against the class's own attention with a mask of T x T."""
    model = make_tiny(family, **CLASSES[family])
    base = Base(model.eval(), torch.float32)
    assert choose_attention(base) == Attention(DOCUMENTS, EACH)
    check_document_attention(base)
    ids, positions = make_rows(base.num_embeddings)
    documents = locate([length for row in ROWS for length in row], CPU)
    found = states_and_gradients(model, ids, positions, DOCUMENTS, documents=documents)
    # by its positions alone GPT-OSS does not know of documents
    masks = {"attention_mask": own_masks(5)} if family == "GptOss" else {}
    wanted = states_and_gradients(model, ids, positions, "eager", **masks)
    assert_near(found[0], wanted[0])
    assert found[1].keys() == wanted[1].keys()
    for name in wanted[1]:
        assert_near(found[1][name], wanted[1][name], name)
    model.set_attn_implementation(DOCUMENTS)
    with torch.no_grad():  # lengths out of the positions, and rows of one document where there are none
        assert torch.equal(base.hidden_states(ids, positions), found[0])
        row_alone = base.hidden_states(ids[1:])
    assert_near(row_alone, wanted[0][1:])


def by_definition(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, lengths: list[int], window: int | None,
    softcap: float | None = None, sinks: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """In float64, one query after another; [B, T, H, E]."""
    batch, heads, length, size = query.shape
    group = heads // key.shape[1]
    begins = [end - own for end, own in zip(torch.tensor(lengths).cumsum(0).tolist(), lengths) for _ in range(own)]
    output = torch.zeros(batch, length, heads, value.shape[-1], dtype=torch.float64)
    for number, begin in enumerate(begins):
        row, place = divmod(number, length)
        first = begin - row * length
        first = first if window is None else max(first, place - window + 1)
        for head in range(heads):
            scores = key[row, head // group, first : place + 1].double() @ query[row, head, place].double() / size**0.5
            scores = scores if softcap is None else softcap * (scores / softcap).tanh()
            if sinks is not None:
                scores = torch.cat([scores, sinks[head : head + 1].double()])
            shares = scores.softmax(0)[: place + 1 - first]
            output[row, place, head] = shares @ value[row, head // group, first : place + 1].double()
    return output


def draw(length: int, heads: int, shared: int, size: int, value_size: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = ((heads, size), (shared, size), (shared, value_size))
    return [torch.randn(2, count, length, width, generator=generator) for count, width in shapes]


@pytest.mark.parametrize(
    ("window", "more"), [(None, {}), (1, {}), (3, {}), (600, {}), (None, {"softcap": 2.0}), (600, {"s_aux": torch.tensor([0.5, -1.0])})]
)  # fmt: skip
def test_equal_to_the_definition(window: int | None, more: dict[str, Any]) -> None:
    """Documents longer than a piece of queries, with windows shorter than both, longer, and in between."""
    length = PIECE + 188
    lengths = [1, length - 1, 90, length - 90]
    inputs = draw(length, 2, 1, 8, 4)
    found, _ = attend_documents(None, *inputs, sliding_window=window, documents=locate(lengths, CPU), **more)
    wanted = by_definition(*inputs, lengths, window, more.get("softcap"), more.get("s_aux"))
    assert_near(found.double(), wanted)


def as_documented(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, cu_seq_q: torch.Tensor, cu_seq_k: torch.Tensor, max_q: int, max_k: int,
    *, scale: float, window_size: tuple[int, int], enable_gqa: bool,
) -> torch.Tensor:  # fmt: skip
    """What torch.nn.attention.varlen promises, and what its kernels ask for, on a CPU."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32
    assert int(cu_seq_q[-1]) == len(query) == len(key) == len(value)
    assert query.shape[-1] == key.shape[-1] == value.shape[-1]
    assert query.shape[-1] % 8 == 0
    assert enable_gqa == (query.shape[1] != key.shape[1])
    assert max_q >= int(cu_seq_q.diff().max())
    assert max_k >= int(cu_seq_k.diff().max())
    left, right = window_size
    outputs = [query[:0]]
    for first, last in zip(cu_seq_q.tolist(), cu_seq_q[1:].tolist()):
        own = [tensor[first:last].transpose(0, 1) for tensor in (query, key, value)]
        back = torch.arange(last - first)[:, None] - torch.arange(last - first)
        seen = (back >= -right) & (back <= (left if left >= 0 else len(query)))
        output = torch.nn.functional.scaled_dot_product_attention(
            *own, attn_mask=seen, scale=scale, enable_gqa=enable_gqa
        )
        outputs.append(output.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture
def varlen_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", as_documented)
    monkeypatch.setattr(document_attention, "HALF", (torch.float32, torch.bfloat16))


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("sizes", [(4, 4, 16, 16), (4, 2, 20, 12)])
def test_varlen_is_asked_for_the_same(varlen_on_cpu: None, window: int | None, sizes: tuple[int, ...]) -> None:
    """Shapes, windows and padding, with what the documentation of varlen_attn says in the place of its kernels."""
    inputs = [tensor.requires_grad_() for tensor in draw(29, *sizes)]
    documents = locate([3, 26, 29], CPU)
    options: dict[str, Any] = {"sliding_window": window, "documents": documents, "scaling": 0.3}
    results = []
    for attend in (attend_documents, attend_varlen):
        output, _ = attend(None, *inputs, **options)
        results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
    for found, wanted in zip(*results):
        assert_near(found, wanted)
    assert _problem_of_varlen(CPU, torch.float32, {sizes}) is None  # type: ignore[arg-type]
    assert _problem_of_varlen(CPU, torch.bfloat16, {sizes}) is None  # type: ignore[arg-type]


def test_varlen_that_is_wrong_or_missing_is_not_used(varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    heads = {(4, 2, 16, 16)}
    assert "heads of at most 256" in str(_problem_of_varlen(CPU, torch.bfloat16, {(4, 2, 512, 512)}))
    monkeypatch.setattr(varlen, "varlen_attn", lambda *inputs, **options: as_documented(*inputs, **options) * 1.1)
    assert "knows no windows" in str(_problem_of_varlen(CPU, torch.bfloat16, heads))

    def beyond(*inputs: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:
        """A window that counts oneself twice."""
        wider = (window_size[0] + 1, 0) if window_size[0] >= 0 else window_size
        return as_documented(*inputs, scale=scale, window_size=wider, enable_gqa=enable_gqa)

    monkeypatch.setattr(varlen, "varlen_attn", beyond)
    assert "is off by" in str(_problem_of_varlen(CPU, torch.bfloat16, heads))

    def absent(*inputs: Any, scale: float, window_size: tuple[int, int], enable_gqa: bool) -> torch.Tensor:
        raise NotImplementedError("no kernel")

    monkeypatch.setattr(varlen, "varlen_attn", absent)
    assert _problem_of_varlen(CPU, torch.bfloat16, heads) == "does not run here: NotImplementedError no kernel"


@pytest.mark.parametrize("family", ["Llama", "Gemma2", "Olmo3"])
def test_varlen_in_a_model(varlen_on_cpu: None, family: str) -> None:
    """Through layers, in float32 and as autocast has it; what it does not know goes document by document."""
    model = make_tiny(family, **CLASSES[family])
    ids, positions = make_rows(97)
    wanted = states_and_gradients(model, ids, positions, "eager")
    documents = locate([length for row in ROWS for length in row], CPU)
    found = states_and_gradients(model, ids, positions, VARLEN, documents=documents)
    assert_near(found[0], wanted[0])
    for name in wanted[1]:
        assert_near(found[1][name], wanted[1][name], name)
    check_document_attention(Base(model, torch.bfloat16))
    assert model.config._attn_implementation == VARLEN


def test_a_leak_of_varlen_is_seen(varlen_on_cpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of its own calls too, and not of those in float32 alone, which go another way."""
    monkeypatch.setattr(document_attention, "HALF", (torch.bfloat16,))

    def joined(*inputs: Any, **options: Any) -> torch.Tensor:
        whole = inputs[3].clone()
        whole[1:] = whole[-1]
        return as_documented(*inputs[:3], whole, whole, len(inputs[0]), len(inputs[0]), **options)

    monkeypatch.setattr(varlen, "varlen_attn", joined)
    model = make_tiny("Llama")
    model.set_attn_implementation(VARLEN)
    with pytest.raises(ValueError, match=r"not confined to documents .* in torch.bfloat16"):
        check_document_attention(Base(model, torch.bfloat16))


@pytest.mark.parametrize(
    ("family", "reason"), [("GPTJ", "does not take its attention from outside"), ("Bloom", "does not take"), ("Mamba", "does not")]
)  # fmt: skip
def test_other_classes_keep_their_masks(family: str, reason: str) -> None:
    base = Base(make_tiny(family).eval(), torch.float32)
    before = base.model.config._attn_implementation
    line = choose_attention(base).text
    assert line.startswith("masks of T x T (")
    assert reason in line
    assert base.model.config._attn_implementation == before


def wrong_window(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    attention.sliding_window = None


def no_documents(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = attention.forward

    def without(*inputs: Any, documents: object = None, **named: Any) -> Any:
        return forward(*inputs, **named)

    attention.forward = without


def other_mask(attention: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = attention.forward

    def prefix(*inputs: Any, attention_mask: Any = None, **named: Any) -> Any:
        if attention_mask is not None and attention_mask.dtype == torch.bool:
            attention_mask[..., :2, :2] = True  # in place, so that it is still the one that was made
        return forward(*inputs, attention_mask=attention_mask, **named)

    attention.forward = prefix


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (wrong_window, "masks what is 40 positions back and tells its attention None"),
        (no_documents, "does not hand on where documents lie"),
        (other_mask, "looks at more or less than what precedes in a document"),
    ],
)
def test_layers_that_do_otherwise_keep_their_masks(change: Any, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A window that is longer than the rows of the trial, for instance."""
    model = make_tiny("Olmo3", **(WINDOWED | {"sliding_window": 40})).eval()
    change(model.model.layers[0].self_attn, monkeypatch)
    assert choose_attention(Base(model, torch.float32)).text == f"masks of T x T (Olmo3ForCausalLM {reason})"
    assert model.config._attn_implementation == "sdpa"


def test_lengths_are_rounded_for_the_compiler() -> None:
    documents = locate([3, 0, 5, 1], CPU)
    assert documents.lengths == (3, 5, 1)
    assert documents.starts.tolist() == [0, 3, 8, 9, 9]
    assert documents.longest == 8
    assert locate([1], CPU).starts.tolist() == [0, 1]


@pytest.mark.parametrize("asked", [{"dropout": 0.1}, {"position_bias": torch.zeros(1)}, {"is_causal": False}])
def test_what_would_change_the_outcome_is_refused(asked: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(asked))}.* is asked for"):
        attend_documents(None, *draw(4, 1, 1, 8, 8), **asked)


def test_a_run_says_which_and_makes_no_mask(
    tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its first lines and in run.json; a resume that has another one says so."""
    out, notes = tmp_path / "out", list[str]()
    settings: dict[str, Any] = {"max_steps": 2, "global_batch_size": 8, "micro_batch_size": 3, "dtype": "float32"}
    config = TrainConfig((str(annotated["document"]),), str(models["base"]), out, checkpoint_every=1, **settings)
    mapping = masking_utils.AttentionMaskInterface._global_mapping
    made = []
    for name, function in list(mapping.items()):
        monkeypatch.setitem(mapping, name, lambda function=function, **named: made.append(named) or function(**named))
    from trainer import train as module

    step = module.train_step
    monkeypatch.setattr(module, "train_step", lambda *inputs: (made.clear(), step(*inputs))[1])
    train(config, note=notes.append, should_stop=lambda: True)
    assert not made
    assert f"attention over documents: {EACH}" in notes
    assert json.loads((out / "run.json").read_text())["attention"] == EACH
    notes.clear()
    monkeypatch.setattr(
        "trainer.trainable.choose_attention",
        lambda base: replace(choose_attention(base), text="the flash-attn package"),
    )
    train(config, note=notes.append)
    assert f"attention over documents was {EACH} when the run began: its last digits may change" in notes


def test_packed_rows_are_left_alone(tmp_path: Path, annotated: dict[str, Path], models: dict[str, Path]) -> None:
    run(tmp_path / "out", annotated["packed"], models["base"])
    assert "attention" not in json.loads((tmp_path / "out/run.json").read_text())
